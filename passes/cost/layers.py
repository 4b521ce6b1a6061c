"""What multiplies and what is stored, read off the typed graph: the material of costs.

In: channel groups with the layers that inference recorded. Out: per layer the products it adds up, per weight its
dimensions, and every tensor that is stored. MACs come from output types, not from weights, so that token
mixing, attention and adapters are counted right; one example (batch 1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.channels.groups import weight_name
from sbs_fx.passes.channels.inference import Inference, Layer, Path, Term, operand
from sbs_fx.passes.folding import BIAS, WEIGHT, folded_norms, has_statistics, shared_biases


@dataclass(frozen=True)
class Product:
    """MACs of one term: `scale` (spatial sizes, kernel, tokens) times the sizes of `dims`, which can shrink.

    `left` and `right` name the operands: ("weight" | "activation", name), or None for one that stays in float.
    """

    scale: Any  # int, or a sympy expression where height or width is dynamic
    dims: tuple[Dim, ...]
    left: tuple[str, str] | None
    right: tuple[str, str] | None

    def macs(self, of_axis: Callable[[Axis], Any]) -> Any:
        result = self.scale
        for dim in self.dims:
            result = result * d.evaluate(dim, of_axis)
        return result


@dataclass(frozen=True)
class LayerExpression:
    """One layer: its products, and its weights as name -> types of the weight's dimensions and its output dimension.
    `node` is the name of its graph node."""

    name: str
    node: str
    kind: str
    products: tuple[Product, ...]
    weights: Mapping[str, tuple[tuple[Dim, ...], int]]

    @property
    def symbols(self) -> set[sympy.Symbol]:
        """Symbolic sizes in it."""
        return {s for p in self.products if not isinstance(p.scale, int) for s in p.scale.free_symbols}

    def without(self, symbols: Set[sympy.Symbol]) -> LayerExpression:
        """The layer where these sizes are 0."""
        scales = (sympy.sympify(p.scale).subs(dict.fromkeys(symbols, 0)) for p in self.products)
        products = (
            replace(p, scale=int(scale) if scale.is_Integer else scale)
            for p, scale in zip(self.products, scales, strict=True)
        )
        return replace(self, products=tuple(products))

    def sizes(self, of_axis: Callable[[Axis], Any]) -> list[tuple[Any, Any, int]]:
        """Per weight: output channels, input channels of one group, and positions that it is applied at."""
        macs = sum(int(product.macs(lambda axis: axis.size)) for product in self.products)
        found = []
        for dims, outputs in self.weights.values():
            whole = math.prod(d.evaluate(dim, lambda axis: axis.size) for dim in dims)
            place = outputs % len(dims)
            inputs = next((dim for i, dim in enumerate(dims[:2]) if i != place), None)
            size = d.evaluate(inputs, of_axis) if inputs is not None else 1
            found.append((d.evaluate(dims[place], of_axis), size, macs // max(1, whole)))
        return found


class Timing(Protocol):
    """What gives a layer's seconds as an expression of its sizes, such as `sbs_fx.export.latency.LatencyModel`."""

    @property
    def float_seconds(self) -> float: ...

    @property
    def rest(self) -> tuple[float, float, float]: ...

    @property
    def multiple(self) -> int: ...

    def seconds(self, layer: LayerExpression, of_axis: Callable[[Axis], Any]) -> Any: ...


@dataclass(frozen=True)
class OtherTensor:
    """A tensor beside the weights of layers, as wide as its dtype.

    Attributes:
        in_float, in_static: whether the float graph holds it, and a static one.
        past: the weight that a static graph holds it beside, once that is quantised: something reads the parameter
            itself too.
        adapted: what an adapter keeps of this type, there only where some of it goes.
    """

    dims: tuple[Dim, ...]
    bits: int
    is_parameter: bool = False
    in_float: bool = False
    in_static: bool = True
    past: str | None = None
    adapted: bool = False


@dataclass(frozen=True)
class StoredWeight:
    """How a layer's weight is stored: bits of a value in float, and as many scales as `scales` has coordinates."""

    float_bits: int
    scales: Dim


def symbol_values(inference: Inference) -> dict[sympy.Symbol, int | None]:
    """Symbolic sizes of the inputs: the batch counts 1; height and width stay symbols (None)."""
    return {symbol: 1 if i == 0 else None for i, symbol, _ in _symbols(inference)}


def traced_sizes(inference: Inference) -> dict[sympy.Symbol, int]:
    """Symbolic height and width at what they were when the graph was traced."""
    return {symbol: int(size.node.hint) for i, symbol, size in _symbols(inference) if i and size.node.has_hint()}


def _symbols(inference: Inference) -> Iterator[tuple[int, sympy.Symbol, Any]]:
    """(dimension, symbol, symbolic size) of the inputs, each symbol once."""
    seen: set[sympy.Symbol] = set()
    for node in inference.graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for i, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols - seen:
                    seen.add(symbol)
                    yield i, symbol, size


def layer_expression(
    inference: Inference, nodes: Mapping[str, fx.Node], layer: Layer, symbols: Mapping[sympy.Symbol, int | None]
) -> LayerExpression:
    node = nodes[layer.name]
    names = {p: ("weight", weight_name(operand(node, p))) for p in layer.weights}
    names |= {p: ("activation", operand(node, p).name) for p in layer.inputs}
    weights = {weight_name(operand(node, p)): (inference[operand(node, p)], layer.outputs) for p in layer.weights}
    label = next((name for kind, name in names.values() if kind == "weight"), node.name)
    products = tuple(_product(inference, term, names, symbols) for term in layer.terms)
    label = label if label == node.name else f"{label} ({node.name})"
    return LayerExpression(label, node.name, layer.kind, products, weights)


def _product(
    inference: Inference, term: Term, names: Mapping[Path, tuple[str, str]], symbols: Mapping[sympy.Symbol, int | None]
) -> Product:
    scale: Any = 1
    dims: list[Dim] = []
    for dim, size in term.sizes:
        expr = size.node.expr if isinstance(size, torch.SymInt) else size
        if not isinstance(expr, int):
            expr = sympy.sympify(expr).subs({s: v for s, v in symbols.items() if v is not None})
            expr = int(expr) if expr.is_Integer else expr
        if not d.axes(dim):
            scale = scale * expr
        elif isinstance(size, int):
            dims.append(dim)
        else:  # a symbolic size times channels: scale by new / old
            dims.append(dim)
            ratio = sympy.Rational(1, d.resolve(dim).size) * expr
            scale = scale * ratio
    if not isinstance(scale, int) and not scale.free_symbols and scale.is_Integer:
        scale = int(scale)
    left, right = (names[p] if p is not None else None for p in term.operands)
    return Product(scale, tuple(dims), left, right)


def stored_tensors(
    inference: Inference, nodes: Mapping[str, fx.Node], weights: Mapping[str, list[tuple[Layer, Path]]]
) -> tuple[dict[str, StoredWeight], list[OtherTensor]]:
    """What the float graph and a static one hold: how weights are stored, and everything else.

    A static graph has a bias of its own for each layer that a batch norm folds into or whose bias others read. Of
    parameters and buffers it holds those that something reads which is no folded norm, and no weight that is stored.
    """
    graph, folds = inference.graph_module.graph, batch_norms_to_fold(inference)
    sources = weight_sources(nodes, weights)
    stored, others = {}, []
    for name, places in weights.items():
        norm = folds.get(nodes[places[0][0].name])
        # reason: of a grouped transposed convolution, a folded norm has one factor for each output
        scales = inference[norm.args[3]][0] if norm is not None else inference[sources[name]][places[0][0].outputs]
        stored[name] = StoredWeight(_bits(sources[name]), scales)
    for layer, norm in folds.items():
        others.append(OtherTensor(inference[norm.args[3]][:1], _bits(layer)))
    for layer in shared_biases(graph) - folds.keys():
        others.append(OtherTensor(inference[layer.args[BIAS]], _bits(layer.args[BIAS])))
    live = _read_in_static(graph, inference, folds)
    for name, adapter in inference.adapters.items():
        if nodes[name] in live:
            others.append(OtherTensor((adapter.type,), 64, adapted=True))
    absorbed = _leading_to(sources.values())
    named = {source: name for name, source in sources.items()}
    folded = {layer.args[WEIGHT] for layer in folds}
    parameters = dict(inference.graph_module.named_parameters(remove_duplicate=False))
    for node in graph.find_nodes(op="get_attr"):
        dims, past = inference.tensors[str(node.target)], None if node in folded else named.get(node)
        is_parameter, in_float = node.target in parameters and node not in absorbed, node not in absorbed
        others.append(OtherTensor(dims, _bits(node), is_parameter, in_float, node in live, past))
    return stored, others


def weight_sources(nodes: Mapping[str, fx.Node], weights: Mapping[str, list[tuple[Layer, Path]]]) -> dict[str, fx.Node]:
    """Weight -> the node that layers read it from."""
    return {name: operand(nodes[places[0][0].name], places[0][1]) for name, places in weights.items()}


def batch_norms_to_fold(inference: Inference) -> dict[fx.Node, fx.Node]:
    """Layer of a traced graph -> the batch norm that `finalize` folds into it."""
    graph = inference.graph_module.graph
    readers: Counter[fx.Node] = Counter()
    for node in graph.nodes:
        if node.name in inference.layers:
            readers.update({operand(node, path) for path in inference.layers[node.name].weights})
    return folded_norms(graph, filter(has_statistics, graph.nodes), lambda weight: readers[weight])


def _bits(node: Any) -> int:
    return 8 * node.meta["val"].dtype.itemsize


def _leading_to(nodes: Iterable[fx.Node], unread: Mapping[fx.Node, Set[Any]] | None = None) -> set[fx.Node]:
    """Nodes, and what their values are computed from. `unread`: node -> those of its inputs that do not count."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(source for source in node.all_input_nodes if source not in (unread or {}).get(node, ()))
    return found


def _read_in_static(graph: fx.Graph, inference: Inference, folds: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """The nodes whose values a static graph computes or reads: without those that end in a weight, in a folded norm, or
    in a bias that is a tensor of its own."""
    replaced: dict[fx.Node, set[Any]] = {}
    for layer in graph.nodes:
        if layer.name in inference.layers:
            replaced[layer] = {operand(layer, path) for path in inference.layers[layer.name].weights}
    for layer in shared_biases(graph) | folds.keys():
        replaced.setdefault(layer, set()).add(layer.args[BIAS])
    for norm in folds.values():
        replaced[norm] = set(norm.args[1:5])
    return _leading_to(graph.find_nodes(op="output"), replaced)


def end_layers(inference: Inference) -> tuple[set[str], set[str]]:
    nodes = list(inference.graph_module.graph.nodes)
    layers = inference.layers

    def reached(order: Sequence[fx.Node], neighbours: Callable[[fx.Node], Any], start: str) -> set[str]:
        clear: set[fx.Node] = set()
        found: set[str] = set()
        for node in order:
            if isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat)):
                continue  # a size carries no values from one layer to another
            if node.op == start or any(n in clear for n in neighbours(node)):
                if node.name in layers:
                    found.add(node.name)
                else:
                    clear.add(node)
        return found

    return reached(nodes, lambda n: n.all_input_nodes, "placeholder"), reached(nodes[::-1], lambda n: n.users, "output")
