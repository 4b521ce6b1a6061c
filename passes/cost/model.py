"""`cost_model`: what a graph costs under a plan, as polynomials and, for reports, layer by layer.

In: channel groups (with the layers that inference recorded). Out: a `CostModel`: one polynomial a measure, with exact
integers for a plan, tensors for a search and sympy expressions to read; and a walk over the layers, which adds up to
the same. Conventions: one example (batch 1); BOPs = MACs x weight bits x activation bits, float counts 32 x 32 (arXiv
2101.04935).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis
from sbs_fx.passes.channels.groups import ChannelGroups, quantized_tensors
from sbs_fx.passes.channels.slim import slim_bits
from sbs_fx.passes.cost.float_work import all_layers
from sbs_fx.passes.cost.layers import (
    Timing,
    end_layers,
    stored_tensors,
    traced_sizes,
)
from sbs_fx.passes.cost.polynomial import Array, Polynomial, Together, Variable
from sbs_fx.plan import Cost, LayerCost, Plan
from sbs_fx.plan.bits import FLOAT_BITS, place_bits
from sbs_fx.plan.errors import GraphError, PolicyError
from sbs_fx.plan.plan import FIELDS, Kind

SCALE_BITS = 32  # whatever the dtype of the model
_KINDS = ("channel group", "weight", "activation tensor")
Bits = Callable[[tuple[str, str] | None], Any]  # of an operand


class CostModel:
    """Costs of one graph under any plan. Build with `cost_model`; with `timing`, latency is one of them.

    Attributes:
        layers: what multiplies, in graph order; of kind "float" what no rule knows. uncounted: node -> operator whose
            cost nobody knows, which is in no measure. weights, activations: name -> the places where layers read it.
        variables: what costs depend on; `polynomials` number them so.
        polynomials: measure ("bops", "macs", "size" in bits, "params", "latency" in seconds with a timing) -> cost.
        whole: measure -> cost of the float graph, nothing pruned; what a budget's shares are of.

    >>> cost.price(result.policy)["bops"] == result.cost.bops
    True
    """

    def __init__(self, groups: ChannelGroups, timing: Timing | None = None) -> None:
        self.groups, self.timing = groups, timing
        inference = groups.inference
        nodes = {n.name: n for n in inference.graph_module.graph.nodes}
        self._traced_sizes = traced_sizes(inference)
        self.layers, self.uncounted = all_layers(inference, self._traced_sizes)
        self.weights, self.activations = quantized_tensors(groups)
        self._stored, self._others = stored_tensors(inference, nodes, self.weights)
        self._adapted = [tensor for tensor in self._others if tensor.adapted]
        self.variables = (
            *(Variable("channels", name) for name in groups),
            *(Variable(kind, name) for name in self.weights for kind in ("weight", "quantised")),
            *(Variable("activation", name) for name in self.activations),
        )
        self.number = {variable: i for i, variable in enumerate(self.variables)}

    # -- polynomials -----------------------------------------------------------------------------------------------

    @cached_property
    def polynomials(self) -> dict[str, Polynomial]:
        terms = {variable: Polynomial.variable(i) for variable, i in self.number.items()}

        def of_axis(axis: Axis) -> Any:
            group = self.groups.of_axis.get(axis)
            return axis.size if group is None else terms["channels", group.name]  # type: ignore[index]

        def bits(operand: tuple[str, str] | None) -> Any:
            return FLOAT_BITS if operand is None else terms[operand]  # type: ignore[index]

        bops = macs = size = params = Polynomial({})
        for layer in self.layers:
            for product in layer.products:
                count = self._at_traced_size(product.macs(of_axis))
                macs = macs + count
                bops = bops + count * bits(product.left) * bits(product.right)
        for name, (dims, _) in self.dims_of_weights.items():
            stored, quantised = self._stored[name], terms["quantised", name]  # type: ignore[index]
            params = params + (count := _count(dims, of_axis))
            size = size + count * bits(("weight", name))
            if stored.float_bits != FLOAT_BITS:
                narrower = (stored.float_bits - FLOAT_BITS) * count
                size = size + narrower + -1 * narrower * quantised
            size = size + SCALE_BITS * d.evaluate(stored.scales, of_axis) * quantised
        for tensor in self._others:
            params = params + _count(tensor.dims, of_axis) * tensor.is_parameter
            if tensor.in_static and not tensor.adapted:
                beside = 1 if tensor.past is None else terms["quantised", tensor.past]  # type: ignore[index]
                size = size + _count(tensor.dims, of_axis) * tensor.bits * beside
        result = {"bops": bops, "macs": macs, "size": size, "params": params}
        if self.timing is not None:
            result["latency"] = Polynomial({}) + self.timing.rest[0]
            for layer in self.layers:
                result["latency"] = result["latency"] + self.timing.seconds(layer, of_axis)
        return result

    def values(self, plan: Plan) -> tuple[Array, Array | None]:
        """A plan as numbers of the variables and a 1, (variables + 1,) float64, and their divisors where bits differ by
        channel."""
        return self._values(plan, slim_bits(self.groups, plan))

    def _values(self, plan: Plan, weight_bits: Mapping[str, Any]) -> tuple[Array, Array | None]:
        x, divided = list(self._open), {}
        channels, weights, activations = self._places
        for name, kept in plan.kept.items():
            x[channels[name]] = len(kept)
        for name, bits in weight_bits.items():
            place = weights[name]
            if isinstance(bits, int):
                x[place] = bits
            else:
                x[place], divided[place] = sum(bits), len(bits)
            x[place + 1] = bits != FLOAT_BITS
        for name, width in plan.activation_bits.items():
            x[activations[name]] = width
        over = None
        if divided:
            over = np.ones(len(x))
            over[list(divided)] = list(divided.values())
        return np.array(x, float), over

    @cached_property
    def _open(self) -> list[int]:
        """All channels, everything in float, and 1."""
        of_kind = {"channels": lambda name: self.groups[name].size, "quantised": lambda name: 0}
        return [*(of_kind.get(v.kind, lambda _: FLOAT_BITS)(v.name) for v in self.variables), 1]

    @cached_property
    def _places(self) -> tuple[dict[str, int], ...]:
        """Numbers of variables by name: of channels, weights and activations."""
        kinds = ("channels", "weight", "activation")
        return tuple({v.name: i for v, i in self.number.items() if v.kind == kind} for kind in kinds)

    def moved(self, kind: Kind, name: str, values: Sequence[int]) -> dict[int, Array]:
        """What a decision does to the variables: number -> its values, (choices,) float64."""
        choices = np.array(values, float)
        if kind != "weight":
            return {self.number[Variable(kind, name)]: choices}
        place = self.number[Variable("weight", name)]
        return {place: choices, place + 1: (choices < FLOAT_BITS).astype(float)}

    def price(self, plan: Plan) -> dict[str, Any]:
        """Cost of a plan by measure, whole numbers but for latency: what `evaluate` adds up to, many times faster.
        Raises PolicyError for names that the model has not."""
        try:
            bits = slim_bits(self.groups, plan)
            values = self._values(plan, bits)
        except KeyError:
            for kind, known, table in zip(_KINDS, self._places, FIELDS.values(), strict=True):
                for name in getattr(plan, table).keys() - known.keys():
                    raise PolicyError.unknown_name(kind, name, known) from None
            raise
        price = dict(zip(self.polynomials, self._together(*values), strict=True))
        price["size"] += sum(self._coding(plan, bits).values()) + self._adapters(plan)
        return price

    @cached_property
    def _together(self) -> Together:
        return Together(list(self.polynomials.values()))

    def _coding(self, plan: Plan, weight_bits: Mapping[str, Any]) -> dict[str, int]:
        """Weight -> bits that it takes more, or fewer, than its codes, which are no polynomial.

        Where single weights go, one bit says of each whether it stays. Channels of several bitwidths are stored by
        bitwidth, and where each belongs.

        Args:
            weight_bits: those of the plan, without channels that go.
        """
        difference, sizes = {}, self._sizes(plan) if plan.nonzeros else {}
        for name, count in plan.nonzeros.items():
            total = _count(self.dims_of_weights[name][0], lambda axis: sizes.get(axis, axis.size))
            bits = plan.weight_bits[name]
            if not isinstance(bits, int) or bits == FLOAT_BITS:
                raise PolicyError(f"single weights of {name!r} go at {bits} bits; expected one bitwidth below 32")
            difference[name] = total + (count - total) * bits
        for name, bits in weight_bits.items():
            if not isinstance(bits, int) and len(set(bits)) > 1:
                difference[name] = place_bits(len(bits)) * len(bits)
        return difference

    def _adapters(self, plan: Plan) -> int:
        """Bits of the kept coordinates of operators that run at full width."""
        if not self._adapted:
            return 0
        lost = {axis: size for axis, size in self._sizes(plan).items() if size != axis.size}
        return sum(
            tensor.bits * _count(tensor.dims, lambda axis: lost.get(axis, axis.size))
            for tensor in self._adapted
            if any(axis in lost for dim in tensor.dims for axis in d.axes(dim))
        )

    def _sizes(self, plan: Plan) -> dict[Axis, int]:
        """Coordinates that stay of the axes that a plan speaks of."""
        return {self.groups[name].axis: len(kept) for name, kept in plan.kept.items()}

    @cached_property
    def whole(self) -> dict[str, Any]:
        return self.reference.by_measure

    def expected(
        self,
        sizes: Mapping[str, Any],
        weight_bits: Mapping[str, Any],
        activation_bits: Mapping[str, Any],
        measures: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Costs by measure (all, or those) with tensors, or numbers, in place of sizes by group name and bits by name,
        float64; differentiable in each. With whole numbers it is what `price` gives."""
        x: list[Any] = list(self._open)
        channels, weights, activations = self._places
        for places, table in ((channels, sizes), (weights, weight_bits), (activations, activation_bits)):
            for name, value in table.items():
                x[places[name]] = value
        for name, value in weight_bits.items():
            x[weights[name] + 1] = float(value < FLOAT_BITS)
        places = [i for i, value in enumerate(x) if isinstance(value, Tensor)]
        if not places:
            values = torch.tensor(x, dtype=torch.float64)
        else:
            given = torch.stack([x[i] for i in places]).double()
            plain = torch.tensor([0 if isinstance(v, Tensor) else v for v in x], dtype=torch.float64)
            values = plain.to(given.device).index_put((torch.tensor(places, device=given.device),), given)
        return {measure: self.polynomials[measure].tensor(values) for measure in measures or self.polynomials}

    @cached_property
    def expressions(self) -> dict[str, sympy.Expr]:
        """Layer name -> BOPs as a sympy polynomial: `n[group]` kept channels, `bits[tensor or weight]`, and height and
        width symbols where they are dynamic."""
        names = {
            axis: sympy.Symbol(f"n[{g.name}]", positive=True, integer=True) for axis, g in self.groups.of_axis.items()
        }

        def bits(operand: tuple[str, str] | None) -> Any:
            return FLOAT_BITS if operand is None else sympy.Symbol(f"bits[{operand[1]}]", positive=True)

        result = {}
        for layer in self.layers:
            terms = [
                p.macs(lambda axis: names.get(axis, axis.size)) * bits(p.left) * bits(p.right) for p in layer.products
            ]
            result[layer.name] = sympy.Add(*terms)
        return result

    # -- layer by layer --------------------------------------------------------------------------------------------

    def evaluate(self, plan: Plan) -> Cost:
        """Exact cost of a plan by a walk over the layers; its stored bits are those of the tensors of the static graph.

        The empty plan is the float model as it is, batch norms not folded: what the shares of budgets are of.

        Raises:
            PolicyError: bits by channel that are not one for each output channel of the float model.
        """
        if plan == Plan():  # reason: of a model without layers, the only plan there is
            return self.reference.model_copy(update={"reference": self.reference})
        bits = slim_bits(self.groups, plan)
        cost = self._walk(self._sizes(plan), bits, plan.activation_bits, self.reference)
        coding, adapters = self._coding(plan, bits), self._adapters(plan)
        if not coding and not adapters:
            return cost
        layers = []
        for row, layer in zip(cost.layers, self.layers, strict=True):
            more = sum(coding.pop(name, 0) for name in layer.weights)
            layers.append(row.model_copy(update={"stored_bits": row.stored_bits + more}))
        other = cost.other_stored_bits + adapters
        return cost.model_copy(update={"layers": tuple(layers), "other_stored_bits": other})

    @cached_property
    def reference(self) -> Cost:
        """Cost of the float graph, nothing pruned."""
        return self._walk({}, {}, {}, None)

    def _walk(
        self,
        sizes: Mapping[Axis, int],
        weight_bits: Mapping[str, Any],
        activation_bits: Mapping[str, int],
        reference: Cost | None,
    ) -> Cost:
        def of_axis(axis: Axis) -> int:
            return sizes.get(axis, axis.size)

        def bits_of(operand: tuple[str, str] | None) -> Fraction:
            table: Mapping[str, Any] = (
                {} if operand is None else {"weight": weight_bits}.get(operand[0], activation_bits)
            )
            return _mean(FLOAT_BITS if operand is None else table.get(operand[1], FLOAT_BITS))

        rows, seen, scales = [], set(), 0
        quantised = {name for name, bits in weight_bits.items() if bits != FLOAT_BITS}
        for layer in self.layers:
            macs = bops = params = stored = 0
            weight_mean, activation_mean = Fraction(FLOAT_BITS), Fraction(FLOAT_BITS)
            for product in layer.products:
                count = int(self._at_traced_size(product.macs(of_axis)))
                right, left = bits_of(product.right), bits_of(product.left)
                macs += count
                bops += count * left * right
                weight_mean, activation_mean = right, left
            for name, (dims, _) in layer.weights.items():
                if name in seen:
                    continue
                seen.add(name)
                count = _count(dims, of_axis)
                bits = weight_bits[name] if name in quantised else self._stored[name].float_bits
                params += count
                stored += int(count * _mean(bits))
                if name in quantised:
                    scales += d.evaluate(self._stored[name].scales, of_axis)
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
        other, other_bits = 0, SCALE_BITS * scales
        for tensor in self._others:
            count = _count(tensor.dims, of_axis)
            other += count if tensor.is_parameter else 0
            in_static = tensor.in_static and not tensor.adapted and (tensor.past is None or tensor.past in quantised)
            other_bits += count * tensor.bits * (tensor.in_float if reference is None else in_static)
        seconds = 0.0 if self.timing is None else self.timing.rest[0] if reference else self.timing.float_seconds
        return Cost(
            layers=tuple(rows),
            other_params=other,
            other_stored_bits=other_bits,
            other_seconds=seconds,
            reference=reference,
        )

    def _at_traced_size(self, macs: Any) -> Any:
        """MACs at the height and width of the trace, where these are symbols."""
        if not self._traced_sizes or isinstance(macs, int):
            return macs
        if isinstance(macs, Polynomial):
            return Polynomial({key: self._at_traced_size(value) for key, value in macs.terms.items()})
        value = macs.subs(self._traced_sizes)
        return int(value) if value.is_Integer else value

    @cached_property
    def dims_of_weights(self) -> dict[str, tuple[tuple[d.Dim, ...], int]]:
        """Weight -> types of its dimensions, and which of them is the outputs'."""
        return {name: found for layer in self.layers for name, found in layer.weights.items()}

    # -- what reports and spaces ask -----------------------------------------------------------------------------------

    def prunable_share(self) -> float:
        """Share of conv and linear MACs in layers that a group can make cheaper."""
        total = prunable = 0
        for layer in self.layers:
            if layer.kind in ("conv", "linear"):
                macs = sum(int(self._at_traced_size(p.macs(lambda axis: axis.size))) for p in layer.products)
                total += macs
                prunable += macs if any(d.axes(x) for p in layer.products for x in p.dims) else 0
        return prunable / total if total else 1.0

    def ends(self) -> tuple[set[str], set[str]]:
        """Names of the (first, last) layers: no other layer lies between them and an input, or an output."""
        return end_layers(self.groups.inference)


def cost_model(graph_module: fx.GraphModule, groups: ChannelGroups, timing: Timing | None = None) -> CostModel:
    """The cost of `graph_module`, on which `groups` was found; `timing` (from `latency_model`) adds seconds.

    Raises:
        GraphError: the groups belong to another graph.

    >>> cost_model(graph, groups).whole["macs"]
    700480
    """
    if groups.inference.graph_module is not graph_module:
        raise GraphError(
            "the groups were found on another graph; call channel_groups on this one", pass_name="cost_model"
        )
    return CostModel(groups, timing)


def _mean(bits: Any) -> Fraction:
    return Fraction(bits) if isinstance(bits, int) else Fraction(sum(bits), len(bits))


def _count(dims: tuple[d.Dim, ...], of_axis: Callable[[Axis], Any]) -> Any:
    """Elements of a tensor of these types."""
    result: Any = 1
    for dim in dims:
        result = result * d.evaluate(dim, of_axis)
    return result
