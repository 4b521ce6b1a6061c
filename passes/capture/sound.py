"""What must be sound of a float model before a plan is made for it: its values, and that it runs.

In: a module, or its graph and inputs. Out: nothing, or an error that names what is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sbs_fx.passes.graph import attribute
from sbs_fx.plan.errors import InputError, WeightsError


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


def check_runs(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Refuse statistics that are NaN, texts among the outputs, which no file can hold, and what capture does not see:
    operators that real tensors do not go through. Raises WeightsError, InputError."""
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
    try:
        with torch.no_grad():
            graph(*inputs)
    except Exception as error:
        raise InputError(
            f"the model was captured, but does not run on the example inputs: {type(error).__name__}: {error}; give "
            "inputs and a model that run together, all of one floating dtype"
        ) from error
