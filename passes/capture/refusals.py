"""What is said of a model that cannot be captured: where it stopped, why, and what to do.

In: what `torch.export` raised, or a program in which a size is fixed. Out: a `TraceError` that names the sub-module,
the line of source and the remedy; an `InputError` where the model does not run on its inputs at all.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sbs_fx.passes.capture.signature import Signature
from sbs_fx.plan.errors import InputError, TraceError

SIZE = re.compile(r"L\['(\w+)'\](?:\[(\d+)\])?\.size\(\)\[(\d+)\]")  # how torch names the size of a dimension
_SHAPES = ("size", "shape", "sizes", "repeats", "end", "output_size")


def fixed_size(
    program: ExportedProgram, module: nn.Module, dimension: tuple[int, fx.Node, int], name: str
) -> TraceError:
    """What is said of a dimension that the model fixes: where its size stands, or is taken as a number."""
    _, source, place = dimension
    size = int(source.meta["val"].shape[place])
    first = next((n for n in program.graph.nodes if size in _shape_arguments(n) and _depends(n, source)), None)
    apart = next((n for n in program.graph.nodes if _gives(n, size) and _depends(n, source)), None)
    submodule, line = _module_of(first or apart), _line_of_guard(dimension, size)
    if first is not None:
        where = f"{_where(first.meta.get('stack_trace'))} calls {_operator(first)} with the number {size}"
    elif line is not None and not line.filename.startswith(tuple(torch.__path__)):
        submodule = _module_at(module, line)
        inside = f" in sub-module {submodule}" if submodule else ""
        where = f"{_place(line.filename, line.lineno, line.line)}{inside} takes it as a number, as len(x), int(...), "
        where += "comparisons and caches of an earlier call do"
    elif apart is not None:
        where = f"{_where(apart.meta.get('stack_trace'))} takes it apart into {size} tensors, as a loop over it does"
    else:
        where = "it is taken as a number somewhere, as len(x), int(...), comparisons and caches of an earlier call do"
    return TraceError(
        f"the model takes a {name} of {size} alone, that of the example inputs: {where}; write -1 or x.shape[...] "
        "where that size stands, or name the dimensions that may change with dynamic=",
        submodule=submodule,
        reason=f"{name} is fixed to {size}",
    )


def _gives(node: fx.Node, size: int) -> bool:
    """Whether an operator gives a list of that many tensors."""
    value = node.meta.get("val")
    return isinstance(value, (list, tuple)) and len(value) == size


def _line_of_guard(dimension: tuple[int, fx.Node, int], size: int) -> traceback.FrameSummary | None:
    """Where torch met the number: the guard "this dimension is `size`" says which line asked for it."""
    number, source, place = dimension
    try:
        shapes = source.meta["val"].fake_mode.shape_env
        for guard in shapes.guards:
            symbol = guard.expr.args[0] if isinstance(guard.expr, sympy.Eq) and guard.expr.args[1] == size else None
            for match in (SIZE.fullmatch(of.name) for of in shapes.var_to_sources.get(symbol, ())):
                if match and int(match[3]) == place and match[2] in (None, str(number)):
                    line = guard.sloc.framework_loc
                    if isinstance(line, traceback.FrameSummary) and (match[2] or match[1] == source.name):
                        return line
    except (AttributeError, TypeError):  # reason: torch's own records, which another version may keep elsewhere
        pass
    return None


def _module_at(module: nn.Module, line: traceback.FrameSummary) -> str:
    """Path of the first sub-module of a class in whose source a line is; "" for the module itself, or for none."""
    for name, inner in module.named_modules():
        for cls in type(inner).__mro__:
            function = vars(cls).get(line.name)
            code = getattr(function, "__code__", None)
            if code is not None and code.co_filename == line.filename:
                lines = [number for _, _, number in code.co_lines() if number is not None]
                if min(lines) <= (line.lineno or 0) <= max(lines):
                    return name
    return ""


def _shape_arguments(node: fx.Node) -> list[Any]:
    """The numbers that an operator is given as a shape."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    names = [argument.name for argument in node.target._schema.arguments]
    named = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return [x for name in _SHAPES if name in named for x in pytree.tree_leaves(named[name]) if isinstance(x, int)]


def _depends(node: fx.Node, source: fx.Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        for n in stack.pop().all_input_nodes:
            if n is source:
                return True
            if n not in seen:
                seen.add(n)
                stack.append(n)
    return False


def _operator(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _module_of(node: fx.Node | None) -> str:
    stack = {} if node is None else node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values()))), "")


def _where(trace: str | None) -> str:
    """The last line of a stack trace in source that is not torch's: "net.py:9 (return self.head(y))"."""
    lines = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', trace or "")
    own = [(path, line, text) for path, line, text in lines if f"{torch.__path__[0]}" not in path] or lines
    if not own:
        return ""
    return _place(*own[-1])


def _place(path: str, line: str | int | None, text: str | None) -> str:
    return f"{path.rsplit('/', 1)[-1]}:{line} ({(text or '').strip()})"


def trace_error(module: nn.Module, error: Exception) -> TraceError:
    submodule = _failing_submodule(module, error)
    text = re.sub(r"\n\s*The error above occurred when.*", "", str(error).strip(), flags=re.DOTALL)
    text = re.sub(r" ?For more information, run with TORCH_LOGS=\S+", "", text)
    text = re.sub(r"(For extended logs|If you suspect|For more debugging|For C\+\+ stack).*", "", text)
    reason = " ".join(line.strip() for line in text.splitlines() if line.strip()) or type(error).__name__
    remedy = "change that line of the model"
    if "DataDependent" in type(error).__name__:
        remedy = "put torch.where or torch.cond where a branch depends on values"
        if "Could not extract specialized integer" in reason:
            remedy = "keep what int(...) or .item() reads there as a plain number of the model, made in __init__"
    elif "fake tensor in the exported program constant" in reason:
        reason = "what forward computes comes back as a constant, as by torch.autograd.grad inside it"
        remedy = "write that as operators on tensors, torch.func.grad among them, or compress the part before it"
    inside = f" (sub-module {submodule})" if submodule else ""
    return TraceError(
        f"torch.export could not capture {type(module).__name__}{inside}: {type(error).__name__}: {reason}; {remedy}",
        submodule=submodule,
        reason=reason,
    )


def raise_as_input_error(module: nn.Module, signature: Signature, tensors: Sequence[Tensor]) -> None:
    """If the module cannot even run on the inputs, the inputs are at fault, not the export."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    args, kwargs = signature.call([x.clone() for x in tensors])
    try:
        with torch.no_grad():  # reason: on copies, since some modules write what they own, or are given
            torch.func.functional_call(module, {name: tensor.clone() for name, tensor in own.items()}, args, kwargs)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise InputError(
            f"the model does not run on example inputs of shape {shapes}: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}; "
            "give inputs that the model accepts"
        ) from error


def _failing_submodule(module: nn.Module, error: BaseException) -> str:
    """The innermost sub-module whose forward was running when `error` was raised, by class name ('' if unknown)."""
    place, tb = "", error.__traceback__
    while tb is not None:
        owner = tb.tb_frame.f_locals.get(next(iter(tb.tb_frame.f_code.co_varnames), ""))
        own = not tb.tb_frame.f_code.co_filename.startswith(tuple(torch.__path__))
        if own and tb.tb_frame.f_code.co_name == "forward" and any(owner is inner for inner in module.modules()):
            place = f"{type(owner).__name__} at {tb.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{tb.tb_lineno}"
        tb = tb.tb_next
    return place
