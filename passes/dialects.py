"""The four dialects of graphs: what a graph says of itself, and what must hold of it.

In: a graph of ours. Out: its dialect, a frozen value under one key of its metadata, or an error of `verify` that names
the node where the graph is not what its dialect promises.

    traced        operators on floats, those of other libraries too: `trace`, `slim`
    searchable    gates on weights, activations and channel groups, masked statistics: `insert_gates`
    gated         gates on weights and activations alone: `insert_gates` with channels=False
    static        codes and scales in place of gates: `finalize`, `integer_joins`, `integer_grid`, `load_pt2`
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.ao.quantization.fx._decomposed  # reason: registers torch.ops.quantized_decomposed
from torch import Tensor, fx, nn

from sbs_fx.passes.graph import channel_rows
from sbs_fx.plan.errors import GraphError
from sbs_fx.quantizer.channel_gate import ChannelGate
from sbs_fx.quantizer.grid import level
from sbs_fx.quantizer.superbit import SuperBitQuantizer

aten = torch.ops.aten
QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_CLAMPS = (aten.clamp_max.default, aten.clamp_min.default)

# -- what a graph says of itself ---------------------------------------------------------------------------------------


class StoredWeight(NamedTuple):
    """Bits of an int8 buffer of codes: one number, or one per coordinate of dimension `axis` (0 where it is zero).

    `nonzeros`: how many single weights stay, of which some may have been rounded to zero; None where none was pruned.
    """

    bits: int | tuple[int, ...]
    axis: int
    nonzeros: int | None = None


class StaticActivation(NamedTuple):
    """A quantised activation: its bits, the code that stands for zero, the nodes that hold its codes and its values."""

    bits: int
    zero_point: int
    codes: str
    values: str


@dataclass(frozen=True)
class Traced:
    """A float graph.

    >>> verify(graph, Traced)
    """


@dataclass(frozen=True)
class Gated:
    """Paths of the quantisers by the name of the weight, or of the tensor (graph node), that each stands behind.

    >>> list(insert_gates(graph, groups, channels=False).meta["sbs_fx"].weights)
    ['0', '3', '8']
    """

    weights: Mapping[str, str]
    activations: Mapping[str, str]


@dataclass(frozen=True)
class Searchable(Gated):
    """And of the channel gates by the name of their group.

    >>> list(insert_gates(graph, groups).meta["sbs_fx"].channels)
    ['0.weight:0', '3.weight:0']
    """

    channels: Mapping[str, str]


@dataclass(frozen=True)
class Static:
    """Weights by the name of the buffer of codes, whose scales are in a buffer "NAME_scale"; activations by the name of
    the tensor. `exact`: every scale is a power of two (`integer_grid`). `metadata`: what a file holds beside the graph.
    `floats`: nodes that layers are to read in float, which `integer_joins` leaves so; a file does not say.

    >>> list(result.model.meta["sbs_fx"].activations)
    [...'input_1'...]
    """

    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    activations: Mapping[str, StaticActivation] = field(default_factory=dict)
    exact: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    floats: tuple[str, ...] = ()


Dialect = Traced | Gated | Static
_KEY = "sbs_fx"
_MAKERS = {
    Traced: "trace",
    Gated: "insert_gates(..., channels=False)",
    Searchable: "insert_gates",
    Static: "finalize",
}
_D = TypeVar("_D", bound=Dialect)


def dialect_of(graph_module: fx.GraphModule) -> Dialect:
    """A graph that says nothing of itself is a traced one."""
    return graph_module.meta.get(_KEY, Traced())


def set_dialect(graph_module: fx.GraphModule, dialect: Dialect) -> None:
    graph_module.meta[_KEY] = dialect


def gates_of(graph_module: fx.GraphModule) -> Gated:
    """Raises GraphError where the graph has no gates."""
    return _expect(graph_module, Gated)


def static_of(graph_module: fx.GraphModule) -> Static:
    """A traced graph is a static one without codes. Raises GraphError for one with gates."""
    return Static() if isinstance(dialect_of(graph_module), Traced) else _expect(graph_module, Static)


def _expect(graph_module: fx.GraphModule, dialect: type[_D]) -> _D:
    value = dialect_of(graph_module)
    if not isinstance(value, dialect):
        raise GraphError(
            f"expected a {_name(dialect)} graph, from `{_MAKERS[dialect]}`; this is a {_name(type(value))} one"
        )
    return value


def _name(dialect: type[Dialect]) -> str:
    return dialect.__name__.lower()


def quantizers(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(quantise, dequantise) node of every quantised activation of a static graph, in graph order."""
    for last in graph.find_nodes(op="call_function", target=DEQUANTIZE):
        first = last.args[0]
        while first.target in _CLAMPS:
            first = first.args[0]
        yield first, last


# -- what must hold of it ----------------------------------------------------------------------------------------------

_SIZES = {torch.sym_float, torch.sym_int, torch.sym_ite, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_sum}
_MASKED: set[Callable[..., Any]] = {torch.ones}
_SWITCHABLE: set[type[nn.Module]] = {nn.Dropout}
_F = TypeVar("_F", bound=Callable[..., Any])
_M = TypeVar("_M", bound=type[nn.Module])

Problem = tuple[str, str]  # name of a node or a tensor, what is wrong with it


def masked_operator(function: _F) -> _F:
    """Enter a function that searchable graphs call beside ATen operators."""
    _MASKED.add(function)
    return function


def switchable(module: _M) -> _M:
    """Enter a class of modules that gated graphs call because they differ in training and eval mode."""
    _SWITCHABLE.add(module)
    return module


def verify(graph_module: fx.GraphModule, dialect: type[Dialect]) -> None:
    """Check a graph against the specification of a dialect, in time linear in its nodes and codes.

    Raises:
        GraphError: says what is wrong, and names the node or the tensor.

    >>> verify(result.model, Static)
    """
    form = dialect_of(graph_module)
    if type(form) is not dialect:
        raise GraphError(f"this is a {_name(type(form))} graph", pass_name=f"verify ({_name(dialect)})")
    for check in _SPECIFICATIONS[dialect]:
        for name, problem in check(graph_module, form):
            raise GraphError(problem, pass_name=f"verify ({_name(dialect)})", node=name)


def _calls_functional_operators(graph_module: fx.GraphModule, form: Any) -> Iterator[Problem]:
    kinds = {"placeholder", "get_attr", "call_function", "output"}
    kinds |= {"call_module"} if isinstance(form, Gated) else set()
    masked = _MASKED if isinstance(form, Searchable) else set()
    # reason: operators of other libraries have no rule, and stay as they are
    foreign = () if isinstance(form, Static) else ("quantized_decomposed", "quantized", "prim")
    for node in graph_module.graph.nodes:
        target = node.target
        if node.op not in kinds:
            yield node.name, f"is a {node.op}, which this dialect has not"
        elif node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
            if target.namespace in foreign or target._schema.is_mutable:
                yield node.name, f"calls {target}, which is of {target.namespace} or writes to its arguments"
        elif node.op == "call_function" and not _is_item_or_size(node) and target not in masked:
            yield node.name, f"calls {target}, which is no operator of this dialect"


def _is_item_or_size(node: fx.Node) -> bool:
    """One of several results, or arithmetic on sizes, in which no tensor takes part."""
    is_arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math") or node.target in _SIZES
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    return node.target is operator.getitem or (is_arithmetic and not any(isinstance(v, Tensor) for v in values))


def _has_values(graph_module: fx.GraphModule, form: Any) -> Iterator[Problem]:
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            yield node.name, 'has no shape and dtype in meta["val"]'


def _reads_what_it_holds(graph_module: fx.GraphModule, form: Any) -> Iterator[Problem]:
    """Every parameter and buffer is read by a node, or belongs to a module that one calls."""
    tensors = [
        *graph_module.named_parameters(remove_duplicate=False),
        *graph_module.named_buffers(remove_duplicate=False),
    ]
    held = {name for name, _ in tensors}
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    for name in sorted(read - held):
        yield name, "is read, and the graph holds no such tensor"
    for name in sorted(held - read):
        if name.rpartition(".")[0] not in called:
            yield name, "is a tensor that no node reads"


def _calls_its_gates(graph_module: fx.GraphModule, form: Gated) -> Iterator[Problem]:
    """Each gate is called as the dialect says, behind the tensor that it is named after; other modules switch modes."""
    channels = form.channels if isinstance(form, Searchable) else {}
    gates = {path: name for names in (form.weights, form.activations, channels) for name, path in names.items()}
    weights = set(form.weights.values())
    calls: dict[str, list[fx.Node]] = {path: [] for path in gates}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
            module = graph_module.get_submodule(path)
            if path in gates:
                calls[path].append(node)
            elif type(module) not in _SWITCHABLE:
                yield node.name, f"calls a {type(module).__name__}, which is no gate and has no modes"
        elif node.target is aten.dropout.default or (node.target is aten.batch_norm.default and _has_modes(node)):
            yield node.name, "does not switch between training and eval mode"
    for path, name in gates.items():
        kind = ChannelGate if path in channels.values() else SuperBitQuantizer
        if not calls[path]:
            yield name, f"has a gate {path} that no node calls"
        if not isinstance(graph_module.get_submodule(path), kind):
            yield name, f"has a gate {path} that is no {kind.__name__}"
        if len(calls[path]) > 1 and (kind is ChannelGate or not isinstance(form, Searchable)):
            yield name, f"has a gate {path} that {len(calls[path])} nodes call"
        for call in calls[path] if kind is SuperBitQuantizer else ():
            if name not in _tensor_names(call.args[0], path in weights):
                yield call.name, f"is the gate of {name!r}, and reads {call.args[0]}"


def _has_modes(norm: fx.Node) -> bool:
    return not norm.args[5] and norm.args[3] is not None


def _tensor_names(node: Any, is_weight: bool) -> Iterator[str]:
    """What a policy may call a tensor: by its own name, or by that which it had before channels of it were masked,
    selected, or scattered by an adapter."""
    while isinstance(node, fx.Node):
        yield str(node.target).removesuffix(".weight") if is_weight and node.op == "get_attr" else node.name
        if node.target is aten.index_copy.default:
            node = node.args[3]
        else:
            node = node.args[0] if node.target in {*_MASKED, aten.index_select.default} else None


def _has_stated_codes(graph_module: fx.GraphModule, form: Static) -> Iterator[Problem]:
    buffers = dict(graph_module.named_buffers())
    for name, (bits, axis, _) in form.weights.items():
        codes = buffers.get(name)
        if codes is None or codes.dtype != torch.int8 or f"{name}_scale" not in buffers:
            yield name, "is a weight without a buffer of int8 codes or without scales"
            continue
        if not codes.numel():
            continue
        rows = channel_rows(codes, axis)
        low, high = rows.amin(1), rows.amax(1)
        channels = (bits,) * len(low) if isinstance(bits, int) else bits
        if len(channels) != len(low):
            yield name, f"has {len(channels)} bitwidths for {len(low)} channels"
            continue
        levels = torch.tensor([level(b, signed=True).high for b in channels], device=codes.device)
        outside = (high > levels) | (low < -levels)
        if bool(outside.any()):
            channel = int(outside.nonzero()[0])
            yield name, f"has codes from {int(low[channel])} to {int(high[channel])} at {channels[channel]} bits"


def _has_stated_activations(graph_module: fx.GraphModule, form: Static) -> Iterator[Problem]:
    """Each activation is quantised and dequantised alike, and its codes are no more than its bits allow."""
    stated = {activation.values: (name, activation) for name, activation in form.activations.items()}
    ends = set()
    for first, last in quantizers(graph_module.graph):
        name, activation = stated.pop(last.name, ("", None))
        ends.add(first)
        if first.target is not QUANTIZE or first.args[1:] != last.args[1:]:
            yield last.name, f"dequantises otherwise than {first} quantises"
        elif activation is None:
            yield last.name, "is an activation that the graph does not state"
        elif activation.codes != last.args[0].name or activation.zero_point != last.args[2]:
            yield last.name, f"is not the activation {name!r} as stated: {activation}"
        elif _codes(last) > 2**activation.bits:
            yield last.name, f"has {_codes(last)} codes at {activation.bits} bits"
    for name, activation in stated.values():
        yield name, f"is said to have its values at {activation.values!r}, which dequantises nothing"
    for first in graph_module.graph.find_nodes(op="call_function", target=QUANTIZE):
        if first not in ends:
            yield first.name, "is quantised and not dequantised"


def _codes(last: fx.Node) -> int:
    """How many codes a quantiser lets through."""
    node: Any = last.args[0]
    low, high = list[Any](last.args[3:5])
    while node.target in _CLAMPS:
        low = max(low, node.args[1]) if node.target is aten.clamp_min.default else low
        high = min(high, node.args[1]) if node.target is aten.clamp_max.default else high
        node = node.args[0]
    return high - low + 1


_SPECIFICATIONS: dict[type, tuple[Callable[[fx.GraphModule, Any], Iterator[Problem]], ...]] = {
    Traced: (_calls_functional_operators, _has_values, _reads_what_it_holds),
    Searchable: (_calls_functional_operators, _reads_what_it_holds, _calls_its_gates),
    Gated: (_calls_functional_operators, _reads_what_it_holds, _calls_its_gates),
    Static: (_calls_functional_operators, _reads_what_it_holds, _has_stated_codes, _has_stated_activations),
}
