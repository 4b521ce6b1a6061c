"""`cost_model`: what a graph costs, as a polynomial in kept channel counts and bitwidths.

In: channel groups (with the layers that inference recorded). Out: a `CostModel` that gives exact integers for a plan,
a differentiable tensor for a search, and sympy expressions to read. MACs come from output types, not from weights, so
token mixing, attention and adapters are priced right. Conventions: one example (batch 1); BOPs = MACs x weight bits x
activation bits, float counts 32 x 32 (arXiv 2101.04935).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.channels.groups import ChannelGroups, quantized_tensors, weight_name
from sbs_fx.passes.channels.inference import Inference, Layer, Path, Term, operand
from sbs_fx.plan import Cost, LayerCost
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.errors import GraphError

aten = torch.ops.aten
Bits = int | Sequence[int]


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
    """A tensor that no layer multiplies with: stored at the width of its dtype, unless it vanishes in a batch norm that
    is folded."""

    dims: tuple[Dim, ...]
    bits: int
    is_parameter: bool
    vanishes: bool


class CostModel:
    """Costs of one graph under any plan. Build with `cost_model`; with `timing`, latency is one of them."""

    def __init__(self, groups: ChannelGroups, timing: Timing | None = None) -> None:
        self.groups, self.timing = groups, timing
        inference = groups.inference
        nodes = {n.name: n for n in inference.graph_module.graph.nodes}
        self.symbols = _symbol_values(inference)
        self.layers = tuple(_expression(inference, nodes, layer, self.symbols) for layer in inference.layers.values())
        self.weights, self.activations = quantized_tensors(groups)
        self._others = _other_tensors(inference, nodes, self.weights)

    # -- exact ---------------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        kept: Mapping[str, int | Sequence[int]] | None = None,
        weight_bits: Mapping[str, Bits] | None = None,
        activation_bits: Mapping[str, int] | None = None,
    ) -> Cost:
        """Exact cost of a plan.

        Args:
            kept: group name -> number (or list) of kept channels; groups not named keep all.
            weight_bits: weight name -> bits, or one per output channel that is left. Not named: 32.
            activation_bits: tensor name -> bits. Not named: 32.
        """
        if not kept and not weight_bits and not activation_bits:
            return self.reference
        sizes = {self.groups[n].axis: k if isinstance(k, int) else len(k) for n, k in (kept or {}).items()}
        return self._cost(sizes, weight_bits or {}, activation_bits or {}, self.reference)

    @cached_property
    def reference(self) -> Cost:
        """Cost of the float graph, nothing pruned."""
        return self._cost({}, {}, {}, None)

    def _cost(
        self,
        sizes: Mapping[Axis, int],
        weight_bits: Mapping[str, Bits],
        activation_bits: Mapping[str, int],
        reference: Cost | None,
    ) -> Cost:
        def of_axis(axis: Axis) -> int:
            return sizes.get(axis, axis.size)

        rows, seen, scales = [], set(), 0
        for layer in self.layers:
            macs = bops = params = stored = 0
            weight_mean, activation_mean = Fraction(FLOAT_BITS), Fraction(FLOAT_BITS)
            for product in layer.products:
                count = int(product.macs(of_axis))
                right = self._mean_bits(product.right, weight_bits, activation_bits)
                left = self._mean_bits(product.left, weight_bits, activation_bits)
                macs += count
                bops += count * left * right
                weight_mean, activation_mean = right, left
            for name, (dims, outputs) in layer.weights.items():
                if name in seen:
                    continue
                seen.add(name)
                count = math.prod(d.evaluate(x, of_axis) for x in dims)
                bits = weight_bits.get(name, FLOAT_BITS)
                params += count
                stored += int(count * _mean(bits))
                if bits != FLOAT_BITS:
                    scales += d.evaluate(dims[outputs], of_axis)
            rows.append(
                LayerCost(
                    name=layer.name,
                    kind=layer.kind,
                    macs=macs,
                    bops=math.ceil(bops),
                    params=params,
                    weight_bits=float(weight_mean),
                    activation_bits=float(activation_mean),
                    stored_bits=stored,
                    seconds=float(self.timing.seconds(layer, of_axis)) if self.timing and reference else 0.0,
                )
            )
        folded = reference is not None
        other, other_bits = 0, FLOAT_BITS * scales
        for tensor in self._others:
            count = math.prod(d.evaluate(x, of_axis) for x in tensor.dims)
            other += count if tensor.is_parameter else 0
            other_bits += 0 if folded and tensor.vanishes else count * tensor.bits
        seconds = 0.0 if self.timing is None else self.timing.rest[0] if reference else self.timing.float_seconds
        return Cost(
            layers=tuple(rows),
            other_params=other,
            other_stored_bits=other_bits,
            other_seconds=seconds,
            reference=reference,
        )

    def _mean_bits(
        self, operand_: tuple[str, str] | None, weight_bits: Mapping[str, Bits], activation_bits: Mapping[str, int]
    ) -> Fraction:
        if operand_ is None:
            return Fraction(FLOAT_BITS)
        kind, name = operand_
        return _mean((weight_bits if kind == "weight" else activation_bits).get(name, FLOAT_BITS))

    # -- differentiable --------------------------------------------------------------------------------------------

    def expected(
        self, sizes: Mapping[str, Any], weight_bits: Mapping[str, Any], activation_bits: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Costs by measure ("bops", "macs", "size" in stored bits, "latency" in seconds if there is a timing) with
        tensors, or numbers, in place of sizes by group name and bits by name; differentiable in each. With whole
        numbers it is what `evaluate` gives.
        """
        by_axis = {self.groups[n].axis: s for n, s in sizes.items()}

        def of_axis(axis: Axis) -> Any:
            return by_axis.get(axis, axis.size)

        def bits(operand_: tuple[str, str] | None) -> Any:
            if operand_ is None:
                return FLOAT_BITS
            return (weight_bits if operand_[0] == "weight" else activation_bits).get(operand_[1], FLOAT_BITS)

        bops: Any = 0
        macs: Any = 0
        size: Any = 0
        weights: dict[str, tuple[tuple[Dim, ...], int]] = {}
        for layer in self.layers:
            weights.update(layer.weights)
            for product in layer.products:
                count = product.macs(of_axis)
                macs = macs + count
                bops = bops + count * bits(product.left) * bits(product.right)
        for name, (dims, outputs) in weights.items():
            width = weight_bits.get(name, FLOAT_BITS)
            size = size + math.prod(d.evaluate(x, of_axis) for x in dims) * width
            if width is not FLOAT_BITS:
                size = size + FLOAT_BITS * d.evaluate(dims[outputs], of_axis)
        for tensor in self._others:
            if not tensor.vanishes:
                size = size + math.prod(d.evaluate(x, of_axis) for x in tensor.dims) * tensor.bits
        found = {"bops": bops, "macs": macs, "size": size}
        if self.timing is not None:
            found["latency"] = sum((self.timing.seconds(x, of_axis) for x in self.layers), start=self.timing.rest[0])
        return found

    # -- symbolic --------------------------------------------------------------------------------------------------

    @cached_property
    def expressions(self) -> dict[str, sympy.Expr]:
        """Layer name -> BOPs as a sympy polynomial: `n[group]` kept channels, `bits[tensor or weight]`, and height and
        width symbols where they are dynamic."""
        names = {
            axis: sympy.Symbol(f"n[{g.name}]", positive=True, integer=True) for axis, g in self.groups.of_axis.items()
        }

        def bits(operand_: tuple[str, str] | None) -> Any:
            return FLOAT_BITS if operand_ is None else sympy.Symbol(f"bits[{operand_[1]}]", positive=True)

        result = {}
        for layer in self.layers:
            terms = [
                p.macs(lambda axis: names.get(axis, axis.size)) * bits(p.left) * bits(p.right) for p in layer.products
            ]
            result[layer.name] = sympy.Add(*terms)
        return result

    def prunable_share(self) -> float:
        """Share of conv and linear MACs in layers that a group can make cheaper."""
        total = prunable = 0
        for layer in self.layers:
            if layer.kind in ("conv", "linear"):
                macs = sum(int(p.macs(lambda axis: axis.size)) for p in layer.products)
                total += macs
                prunable += macs if any(d.axes(x) for p in layer.products for x in p.dims) else 0
        return prunable / total if total else 1.0

    def ends(self) -> tuple[set[str], set[str]]:
        """Names of the (first, last) layers: no other layer lies between them and an input, or an output."""
        return _ends(self.groups.inference)


def cost_model(graph_module: fx.GraphModule, groups: ChannelGroups, timing: Timing | None = None) -> CostModel:
    """The cost of `graph_module`, on which `groups` was found; `timing` (from `latency_model`) adds seconds.

    Raises:
        GraphError: the groups belong to another graph.
    """
    if groups.inference.graph_module is not graph_module:
        raise GraphError(
            "the groups were found on another graph; call channel_groups on this one", pass_name="cost_model"
        )
    return CostModel(groups, timing)


def _mean(bits: Bits) -> Fraction:
    return Fraction(bits) if isinstance(bits, int) else Fraction(sum(bits), len(bits))


def _symbol_values(inference: Inference) -> dict[sympy.Symbol, int | None]:
    """Symbolic sizes: the batch counts 1; height and width stay symbols, with their traced value as default."""
    values: dict[sympy.Symbol, int | None] = {}
    for node in inference.graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for i, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    for symbol in size.node.expr.free_symbols:
                        values.setdefault(symbol, 1 if i == 0 else None)
    return values


def _expression(
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


def _other_tensors(inference: Inference, nodes: Mapping[str, fx.Node], weights: Mapping[str, Any]) -> list[OtherTensor]:
    absorbed: set[fx.Node] = set()
    stack = [operand(nodes[layer.name], path) for places in weights.values() for layer, path in places]
    while stack:
        node = stack.pop()
        if node not in absorbed:
            absorbed.add(node)
            stack.extend(node.all_input_nodes)
    parameters = dict(inference.graph_module.named_parameters(remove_duplicate=False))
    result = []
    for node in nodes.values():
        if node.op == "get_attr" and node not in absorbed:
            vanishes = all(
                u.target is aten.batch_norm.default and u.args[2] is not node and _folds(inference, u)
                for u in node.users
            )
            bits = 8 * node.meta["val"].dtype.itemsize
            result.append(OtherTensor(inference.tensors[str(node.target)], bits, node.target in parameters, vanishes))
    return result


def _folds(inference: Inference, node: fx.Node) -> bool:
    """Whether a batch norm follows a convolution or linear that nothing else reads."""
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and source.name in inference.layers
        and len(source.users) == 1
        and inference.layers[source.name].kind in ("conv", "linear")
    )


def _ends(inference: Inference) -> tuple[set[str], set[str]]:
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
