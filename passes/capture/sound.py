"""What must be sound of a float model before a plan is made for it: its values, and that it runs.

In: a module, or its graph and inputs. Out: nothing, or an error that names what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sbs_fx.passes.graph import attribute
from sbs_fx.plan.errors import InputError, TraceError, WeightsError


def check_weights(module: nn.Module) -> None:
    """Refuse NaN, Inf and what has no values before anything is computed from them. Raises WeightsError."""
    if names := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
        raise WeightsError(
            f"{len(names)} parameters are on the meta device and have no values, the first: {names[:3]}; load weights "
            "first (`model.to_empty(device=...)`, then `load_state_dict`)",
            names=names,
        )
    names = [n for n, p in module.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if names:
        raise WeightsError(
            f"NaN or Inf in {len(names)} parameters, the first: {names[:3]}; load sound weights", names=names
        )


def check_graph(graph: fx.GraphModule) -> None:
    """Refuse statistics that are NaN and texts among the outputs, which no file can hold. Raises WeightsError,
    InputError."""
    (output,) = graph.graph.find_nodes(op="output")
    if texts := [leaf for leaf in pytree.tree_leaves(output.args) if isinstance(leaf, str)]:
        raise InputError(
            f"the text {texts[0]!r} is among the model's outputs, which cannot be saved; return tensors, numbers and "
            "None alone"
        )
    # reason: of what the graph reads; a buffer that nothing reads may hold anything, a mask may hold -Inf
    if names := [n for n, b in graph.named_buffers() if b.is_floating_point() and bool(torch.isnan(b).any())]:
        raise WeightsError(f"NaN in {len(names)} buffers, the first: {names[:3]}; load sound ones", names=names)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default):
        variance = node.args[4]
        if isinstance(variance, fx.Node) and variance.op == "get_attr":
            values = attribute(graph, str(variance.target))
            if not bool((torch.isfinite(values) & (values >= 0)).all()):
                raise WeightsError(
                    f"the running variance {variance.target!r} has {float(values.min()):.3g} to "
                    f"{float(values.max()):.3g}; a variance is a finite number of at least 0: load sound ones",
                    names=[str(variance.target)],
                )


def check_same(graph: fx.GraphModule, call: Callable[[], Any], inputs: Sequence[Tensor]) -> None:
    """Refuse what capture does not see: operators that real tensors do not go through, and a model that computes
    something else while it is exported than in a call.

    Args:
        call: the module on the same inputs; what draws random numbers is not compared.

    Raises:
        InputError: the graph does not run on these inputs. TraceError: it gives something else.
    """
    if any(x.is_meta for x in (*inputs, *graph.parameters(), *graph.buffers())):
        return
    try:
        given = _tensors(graph(*(x.clone() for x in inputs)))
    except Exception as error:
        raise InputError(
            f"the model was captured, but does not run on the example inputs: {type(error).__name__}: {error}; give "
            "inputs and a model that run together, all of one floating dtype"
        ) from error
    expected = _tensors(call())
    problem = _difference(given, expected)
    if problem and not _difference(expected, _tensors(call())):
        raise TraceError(
            f"the model computes something else while it is exported than when it is called: {problem}; a branch of "
            "forward depends on it (`torch.compiler.is_exporting()` or `is_compiling()`, "
            "`torch.jit.is_tracing()` or a flag): take the branch of the call, or give a module without it"
        )


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _difference(given: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """What tells outputs apart beyond rounding, in words; empty if nothing does."""
    if len(given) != len(expected):
        return f"{len(given)} tensors instead of {len(expected)}"
    for i, (a, b) in enumerate(zip(given, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {a.dtype} of {tuple(a.shape)} instead of {b.dtype} of {tuple(b.shape)}"
        finite = torch.isfinite(a) & torch.isfinite(b)
        if a.is_floating_point() and bool(finite.any()):
            x, y = a[finite].double(), b[finite].double()
            error = float((x - y).norm() / y.norm().clamp_min(torch.finfo(a.dtype).tiny))
            if error > torch.finfo(a.dtype).eps ** 0.5:
                return f"output {i} differs by {error:.2g} of its norm"
    return ""
