"""What is taken for a model: modules, wrappers that only pass their arguments on, programs and graphs.

In: whatever a caller has. Out: the module to capture, or an error that says what to give instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from sbs_fx.plan.errors import InputError, TraceError

_INNER = ("module", "_orig_mod")
_QUANTISED = ("quantized", "quantized_decomposed", "torchao")  # namespaces of operators


def unwrapped(model: Any) -> nn.Module:
    """The module inside wrappers that only pass their arguments on (data parallel, compiled, averaged), or that of an
    exported program.

    Raises:
        InputError: no model. TraceError: a model that is quantised already, or a scripted or lazy one.
    """
    if isinstance(model, ExportedProgram):
        model = model.module(check_guards=False)
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; expected an nn.Module, an ExportedProgram or a name")
    model = looked_through(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("a scripted model cannot be captured again; give the nn.Module that it was made from")
    if names := [name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]:
        raise TraceError(
            f"the sub-module {names[0]!r} is scripted; put the nn.Module that it was made from in its place"
        )
    if names := [n for n, t in [*model.named_parameters(), *model.named_buffers()] if is_lazy(t)]:
        raise TraceError(f"{names[0]!r} has no shape yet; run the model once on an input, so that lazy modules get one")
    if (what := _quantised(model)) is not None:
        raise TraceError(f"this model is quantised already ({what}); give the float model that it was made from")
    return model


def looked_through(model: nn.Module) -> nn.Module:
    """What wrappers that only pass their arguments on hold."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _pass_on(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.module(*args, **kwargs)


def _inner(model: nn.Module) -> nn.Module | None:
    """What a wrapper passes its arguments on to; None for a module that is no wrapper."""
    name = next((name for name in _INNER if name in model._modules), None)
    if name is None:
        return None
    forward = getattr(type(model), "forward", None)
    code = getattr(forward, "__code__", None)
    known = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or name == "_orig_mod"
    passes = code is not None and (code.co_code, code.co_names, len(code.co_varnames)) == (
        _pass_on.__code__.co_code,
        _pass_on.__code__.co_names,
        len(_pass_on.__code__.co_varnames),
    )
    missing = forward is nn.Module.forward  # reason: holds a module, to be read and not called
    hooked = model._forward_hooks or model._forward_pre_hooks
    return model._modules[name] if (known or passes or missing) and not hooked else None


def _quantised(model: nn.Module) -> str | None:
    """What shows that a model is quantised, if it is."""
    for graph_module in (m for m in model.modules() if isinstance(m, fx.GraphModule)):
        for node in graph_module.graph.nodes:
            if getattr(node.target, "namespace", None) in _QUANTISED:
                return f"it calls {node.target}"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_quantized or type(tensor) not in (torch.Tensor, nn.Parameter) and "uant" in type(tensor).__name__:
            return f"{name!r} is a {tensor.dtype} {type(tensor).__name__}"
    packed = next(
        (name for name, m in model.named_modules() if hasattr(m, "_packed_params") or hasattr(m, "_weight_bias")), None
    )
    return None if packed is None else f"the sub-module {packed!r} holds packed integer weights"


def put_in_eval_mode(model: nn.Module) -> None:
    """Graphs that were exported have no modes, and stay as they are."""
    for module in model.modules():
        module.training = False
