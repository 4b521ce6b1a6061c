"""A module through `torch.export`, with the dimensions that may change, and what torch assumed of their sizes.

In: a module, the structure of a call, its tensors. Out: a graph that takes these tensors, and an `InputSpec`. Holds: a
dimension that was asked to change can; where torch fixes one, a `TraceError` names the operator and the line of source.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from sbs_fx.passes.capture.attributes import RealAttributes, symbolic_len
from sbs_fx.passes.capture.caches import BATCH, Dims, of_any_batch, resized
from sbs_fx.passes.capture.functional import decompositions, make_functional
from sbs_fx.passes.capture.inputs import InputSpec, TensorSpec, is_guard
from sbs_fx.passes.capture.refusals import SIZE, fixed_size, raise_as_input_error, trace_error
from sbs_fx.passes.capture.signature import Signature
from sbs_fx.passes.capture.unlift import unlifted
from sbs_fx.passes.graph import attribute, copy_with
from sbs_fx.plan.errors import GraphError, InputError, TraceError

Dynamic = Iterable[str] | Mapping[str, Mapping[int, str]]
Captured = tuple[fx.GraphModule, InputSpec]
_SIDES = {"height": -2, "width": -1}


def dynamic_dims(signature: Signature, tensors: Sequence[Tensor], dynamic: Dynamic | None) -> list[dict[int, str]]:
    """Tensor by tensor, the names of the dimensions that may change.

    By default the first dimension of each tensor is the batch, where it has the size that the first tensor's has.
    Raises InputError for names that are none.
    """
    if not (dynamic is None or isinstance(dynamic, (Mapping, Iterable)) and not isinstance(dynamic, str)):
        raise InputError(f"dynamic={dynamic!r}; expected names such as {(BATCH, *_SIDES)}, or a dict by tensor")
    sides = (BATCH,) if dynamic is None or isinstance(dynamic, Mapping) else tuple(dynamic)
    if unknown := [name for name in sides if name not in (BATCH, *_SIDES)]:
        raise InputError(
            f"dynamic={sides!r} has {unknown[0]!r}; expected any of {[BATCH, *_SIDES]}, or a dict such as "
            f'{{"{signature.names[0]}": {{0: "batch", 2: "height"}}}}'
        )
    if not any(x.ndim for x in tensors):
        raise InputError(f"each example input is a scalar ({', '.join(signature.names)}); expected shape (batch, ...)")
    first = next(x.shape[0] for x in tensors if x.ndim)
    dims: list[dict[int, str]] = []
    for x in tensors:
        own = {0: BATCH} if BATCH in sides and x.ndim and x.shape[0] == first else {}
        images = x.ndim >= 3 and bool(own or BATCH not in sides)
        dims.append(own | {x.ndim + place: name for name, place in _SIDES.items() if name in sides and images})
    if isinstance(dynamic, Mapping):
        for name, of_tensor in dynamic.items():
            if name not in signature.names:
                raise InputError(f"dynamic= names {name!r}; the tensors are {', '.join(signature.names)}")
            x = tensors[signature.names.index(name)]
            if not isinstance(of_tensor, Mapping) or not all(
                isinstance(place, int) and isinstance(of_place, str) and of_place.isidentifier()
                for place, of_place in of_tensor.items()
            ):
                raise InputError(
                    f"dynamic= has {of_tensor!r} for {name!r}; expected a name, a word each, by the number of the "
                    'dimension, such as {0: "batch", 2: "height"}'
                )
            if bad := [place for place in of_tensor if not 0 <= place < x.ndim]:
                raise InputError(f"dynamic= names dimension {bad[0]} of {name!r}, whose shape is {tuple(x.shape)}")
            dims[signature.names.index(name)] = dict(of_tensor)
    return dims


def exported(module: nn.Module, signature: Signature, tensors: tuple[Tensor, ...], dims: Dims) -> Captured:
    """A functional graph with parameters by the module's names. Raises TraceError, or InputError for inputs on which
    the module does not run at all."""
    called = module if signature.plain else _Call(module, signature)
    batch_alone = all(name == BATCH for of_tensor in dims for name in of_tensor.values())

    def plain() -> Captured:
        batch = Dim(BATCH, min=1)
        program = _program(called, signature, tensors, [dict.fromkeys(d, batch) for d in dims])
        return _graph(program, signature), InputSpec(_tensor_specs(signature, tensors, dims), signature=signature)

    error: Exception | None = None
    if batch_alone:
        try:
            return plain()
        except Exception as first:  # whatever torch raises; the second form may be able to
            error = first

    def automatic(called: nn.Module, form: Signature) -> Captured:
        program = _program(called, form, tensors, [dict.fromkeys(d, Dim.AUTO) for d in dims])
        spec = _spec_of(program, module, signature, tensors, dims)
        return _graph(program, form), spec

    result, reason = None, error
    try:
        result = automatic(called, signature)
    except TraceError as fixed:
        reason = fixed
    except Exception as second:
        reason = error or second
    if result is not None and result[1].relates_sizes():
        with suppress(Exception):  # reason: a model in which they differ cannot be captured as if they did not
            tied = _Call(module, signature, dims)
            one = automatic(tied, replace(signature, plain=False))
            if len(one[1].guards) < len(result[1].guards):
                return one[0], _with_single(one[0], tied, tensors, dims, one[1])
    if batch_alone and (result is None or result[1].guards):
        with suppress(Exception):  # reason: what was said before says more
            return _beside_caches(called, tensors, dims, plain)
    if result is not None:
        return result[0], _with_single(result[0], called, tensors, dims, result[1])
    if not isinstance(reason, TraceError):
        raise_as_input_error(module, signature, tensors)
    assert reason is not None
    raise reason if isinstance(reason, TraceError) else trace_error(module, reason) from reason


def _program(
    called: nn.Module, signature: Signature, tensors: tuple[Tensor, ...], shapes: Sequence[Mapping[int, Any]]
) -> ExportedProgram:
    dynamic: Any = tuple(dict(s) for s in shapes)
    with quiet_torch():
        with RealAttributes(), symbolic_len(called):
            program = torch.export.export(
                called, tensors, dynamic_shapes=dynamic if signature.plain else (dynamic,), strict=False
            )
        table = decompositions(program.graph)
        if table or not make_functional(program.graph):
            # This traces again, which removes in-place operators and sub-graphs too, even with an empty table.
            guards = program._guards_code
            program = program.run_decompositions(table)
            program._guards_code = guards
    return program


def _beside_caches(
    called: nn.Module, tensors: Sequence[Tensor], dims: Dims, capture: Callable[[], Captured]
) -> Captured:
    """What `capture` gives of a model that keeps things by the shape of its last input. Raises whatever torch does."""
    with quiet_torch():
        called(*resized(tensors, dims, 1))
    with suppress(Exception):  # reason: torch takes the batch to be above one, so that all is computed in the graph
        return capture()
    batch = next(len(x) for x, of_tensor in zip(tensors, dims, strict=True) if of_tensor.get(0) == BATCH)
    with quiet_torch():
        called(*resized(tensors, dims, batch))
    with of_any_batch(called, batch):
        captured = capture()
    for other in (1, batch + 1):
        if not _agree(captured[0], called, resized(tensors, dims, other)):
            raise GraphError("what the model keeps depends on the batch", pass_name="trace")
    return captured


def _agree(graph: fx.GraphModule, called: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether both give the same, bit for bit."""
    with quiet_torch():
        outputs = [pytree.tree_leaves(each(*(x.clone() for x in tensors))) for each in (graph, called)]
    return all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@contextmanager
def own_context() -> Iterator[None]:
    """None of a caller's contexts that change what operators compute: autocast, inference mode, no gradients."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def quiet_torch() -> Iterator[None]:
    """`own_context`, without gradients and without what torch writes beside its errors."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), own_context(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)


class _Call(nn.Module):
    """A module as a function of tensors alone, whose dimensions of one name in `dims` have one size."""

    def __init__(self, module: nn.Module, signature: Signature, dims: Dims = ()) -> None:
        super().__init__()
        self.module, self.signature, self.dims = module, signature, dims
        self.training = module.training

    def forward(self, *tensors: Tensor) -> Any:
        sizes: dict[str, Any] = {}
        for x, of_tensor in zip(tensors, self.dims, strict=False):
            for place, name in of_tensor.items():
                torch._check(x.shape[place] == sizes.setdefault(name, x.shape[place]))
        args, kwargs = self.signature.call(tensors)
        return self.module(*args, **kwargs)


def _graph(program: ExportedProgram, signature: Signature) -> fx.GraphModule:
    graph_module = unlifted(program)
    if signature.plain:
        return graph_module
    tensors = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value, node.target = attribute(graph_module, str(node.target)), str(node.target).removeprefix("module.")
            tensors[node.target], node.name = value, node.name.removeprefix("module_")
        stack = node.meta.get("nn_module_stack")
        if stack:
            inner = [(key, value) for key, value in stack.items() if key != "L__self__"]
            node.meta["nn_module_stack"] = {
                key: (path.partition("module")[2].removeprefix("."), cls) for key, (path, cls) in inner
            }
    for node, name in zip(graph_module.graph.find_nodes(op="placeholder"), signature.names, strict=True):
        node.target = node.name = name
    info = graph_module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    names = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
    result = copy_with(graph_module, tensors)
    result.graph._codegen = _PyTreeCodeGen(_PyTreeInfo(names, info.in_spec, info.out_spec))
    result.recompile()
    return result


# -- what torch assumed ------------------------------------------------------------------------------------------------


def _tensor_specs(signature: Signature, tensors: Sequence[Tensor], dims: Dims) -> tuple[TensorSpec, ...]:
    return tuple(_tensor_spec(*each) for each in zip(signature.names, tensors, dims, strict=True))


def _tensor_spec(name: str, x: Tensor, dims: Mapping[int, str]) -> TensorSpec:
    return TensorSpec(name, str(x.dtype).removeprefix("torch."), tuple(dims.get(i, n) for i, n in enumerate(x.shape)))


def _spec_of(
    program: ExportedProgram,
    module: nn.Module,
    signature: Signature,
    tensors: Sequence[Tensor],
    dims: Dims,
) -> InputSpec:
    """Dimensions of one symbol have one name; those of several symbols are told apart. Raises TraceError for one that
    torch has fixed."""
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    nodes = [
        placeholders[spec.arg.name] for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"
    ]
    names: dict[str, str] = {}  # symbol -> name
    ranges: dict[str, tuple[int, int | None]] = {}
    shapes: list[dict[int, str]] = []
    for node, of_tensor in zip(nodes, dims, strict=True):
        shape: dict[int, str] = {}
        for place, asked in of_tensor.items():
            size = node.meta["val"].shape[place]
            symbol = sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)
            if not symbol.is_Symbol:
                raise fixed_size(program, module, (nodes.index(node), node, place), asked)
            if str(symbol) not in names:
                taken = sum(name.partition("_")[0] == asked for name in names.values())
                names[str(symbol)] = f"{asked}_{taken + 1}" if taken else asked
                low, high = _bounds(program, symbol)
                ranges[names[str(symbol)]] = low, high
            shape[place] = names[str(symbol)]
        shapes.append(shape)

    def name_of(match: re.Match[str]) -> str:
        place = int(match[2]) if match[2] else [node.name for node in nodes].index(match[1])
        return str(shapes[place].get(int(match[3]), tensors[place].shape[int(match[3])]))

    guards = dict.fromkeys(SIZE.sub(name_of, guard).replace("torch.sym_", "") for guard in program._guards_code)
    return InputSpec(
        _tensor_specs(signature, tensors, shapes), ranges, tuple(g for g in guards if is_guard(g)), signature
    )


def _bounds(program: ExportedProgram, symbol: Any) -> tuple[int, int | None]:
    bounds = program.range_constraints.get(symbol)
    if bounds is None:
        return 1, None
    return int(bounds.lower), int(bounds.upper) if isinstance(bounds.upper, sympy.Integer) else None


def _with_single(
    graph: fx.GraphModule, called: nn.Module, tensors: Sequence[Tensor], dims: Dims, spec: InputSpec
) -> InputSpec:
    """With a batch of one allowed, if the graph gives what the module does there: torch begins at 2, unsaid."""
    batches = [name for t in spec.tensors for name in t.shape if isinstance(name, str) and name.startswith(BATCH)]
    if not batches or any(spec.ranges[name][0] != 2 for name in batches):
        return spec
    single = replace(spec, ranges={**spec.ranges, **{name: (1, spec.ranges[name][1]) for name in batches}})
    ones = resized(tensors, dims, 1)
    try:
        single.check(ones)
        return single if _agree(graph, called, ones) else spec
    except Exception:  # reason: a graph or a module that does not take a batch of one
        return spec
