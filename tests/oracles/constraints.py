"""What constraints mean, said once more and plainly, and whether a result obeys them: in its plan, in its static graph
and in its report. Layers are matched by the dotted names of their modules and parameters; nothing of `search` is used.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
from torch import fx

import sbs_fx
from sbs_fx.passes import CostModel
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.inference import operand
from sbs_fx.passes.channels.slim import slim_bits
from sbs_fx.passes.cost.layers import LayerExpression
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.static.integer_joins import DEQUANTIZE, QUANTIZE
from sbs_fx.plan import Plan
from sbs_fx.search import Keep, SpaceSettings

FLOAT = 32


class Allowed(NamedTuple):
    """Bits that weights and activations may have, and the least share of each output or input dimension that stays, by
    the weight's name and the dimension."""

    weights: dict[str, set[int]]
    activations: dict[str, set[int]]
    shares: dict[tuple[str, int], float]


def names_of(cost: CostModel, layer: LayerExpression) -> list[str]:
    """Of a layer: its node, its innermost module, its weights, their parameters."""
    nodes = {node.name: node for node in cost.groups.inference.graph_module.graph.nodes}
    modules = [path for path, _ in (nodes[layer.node].meta.get("nn_module_stack") or {}).values()]
    return [
        layer.node,
        *(m.split("@")[0] for m in modules[-1:] if m),
        *layer.weights,
        *(f"{w}.weight" for w in layer.weights),
    ]


def is_named(names: list[str], pattern: str) -> bool:
    """A pattern of names and stars; what it names, and all below."""
    expression = re.escape(pattern).replace(r"\*", ".*")
    return any(re.fullmatch(rf"{expression}(\..*)?", name, re.DOTALL) for name in names)


def layers_of(cost: CostModel, constraint: Keep) -> list[LayerExpression]:
    first, last = cost.ends()
    places = {None: None, "first": first, "last": last, "ends": first | last}[constraint.place]
    return [
        layer
        for layer in cost.layers
        if constraint.kind in (None, layer.kind)
        and (places is None or layer.node in places)
        and is_named(names_of(cost, layer), constraint.pattern)
    ]


def allowed(cost: CostModel, settings: SpaceSettings) -> Allowed:
    """Of later constraints over earlier ones, over the fields of the settings, over the ends at 8/8."""
    groups = cost.groups
    fields = {"weights": settings.weight_bits, "activations": settings.activation_bits}
    start = {k: set(settings.candidates) if bits is None else {bits} for k, bits in fields.items()}
    weights = {name: set(start["weights"]) for name in cost.weights}
    activations = {name: set(start["activations"]) for name in cost.activations}
    ends = Keep(place="ends", weight_bits=8, activation_bits=8)
    may_go = dict.fromkeys(groups, settings.prune)
    least = dict.fromkeys(groups, 0.0)
    for constraint in (ends, *settings.constraints):
        layers = layers_of(cost, constraint)
        nodes = {layer.node for layer in layers}
        for name, places in cost.weights.items():
            if constraint.weight_bits and any(layer.name in nodes for layer, _ in places):
                weights[name] = set(constraint.weight_bits)
        for name, places in cost.activations.items():
            if constraint.activation_bits and any(layer.name in nodes for layer, _ in places):
                activations[name] = set(constraint.activation_bits)
        axes = {axis for layer in layers for dims, _ in layer.weights.values() for dim in dims for axis in d.axes(dim)}
        for group in groups.values():
            by_name = constraint.kind is None and constraint.place is None
            named = by_name and any(is_named([member.tensor], constraint.pattern) for member in group.members)
            if group.axis in axes or named:
                may_go[group.name] = may_go[group.name] if constraint.prune is None else constraint.prune
                least[group.name] = least[group.name] if constraint.least is None else constraint.least
    if not settings.quantise:
        weights, activations = (dict.fromkeys(table, {FLOAT}) for table in (weights, activations))
    shares = {}
    for name, (dims, _) in cost.dims_of_weights.items():
        for i, dim in enumerate(dims):
            found = [groups.of_axis[axis].name for axis in d.axes(dim) if axis in groups.of_axis]
            shares[name, i] = min((least[n] if may_go[n] and settings.prune else 1.0 for n in found), default=1.0)
    return Allowed(weights, activations, shares)


def check_plan(cost: CostModel, settings: SpaceSettings, plan: Plan) -> None:
    """The plan has no bits and no channels but those that are allowed."""
    permitted = allowed(cost, settings)
    for name, bits in plan.weight_bits.items():
        each = {bits} if isinstance(bits, int) else set(bits)
        assert each - {0} <= permitted.weights[name], (name, bits, permitted.weights[name])
    for name, bits in plan.activation_bits.items():
        assert bits in permitted.activations[name], (name, bits, permitted.activations[name])
    sizes = {cost.groups[name].axis: len(kept) for name, kept in plan.kept.items()}
    for name, (dims, _) in cost.dims_of_weights.items():
        for i, dim in enumerate(dims):
            size = d.resolve(dim).size
            kept = d.evaluate(dim, lambda axis: sizes.get(axis, axis.size))
            assert kept >= permitted.shares[name, i] * size, (name, i, kept, size, permitted.shares[name, i])


def check_obeyed(result: sbs_fx.Result, cost: CostModel, settings: SpaceSettings) -> None:
    """The plan obeys the constraints; the static graph and the report hold what the plan says."""
    plan = result.policy.plan
    check_plan(cost, settings, plan)
    check_static(result.model, cost, plan)
    _check_report(result, cost)
    if not settings.quantise:
        targets = {node.target for node in result.model.graph.nodes}
        assert not targets & {QUANTIZE, DEQUANTIZE}
        assert all(t.is_floating_point() for t in result.model.parameters())
        assert not static_of(result.model).weights


def check_static(static: fx.GraphModule, cost: CostModel, plan: Plan) -> None:
    """Weights are stored in the plan's bits and sizes, layers read activations of its bits; 32 bits are floats."""
    nodes = {node.name: node for node in static.graph.nodes}
    values = {activation.values: activation.bits for activation in static_of(static).activations.values()}
    sizes = {cost.groups[name].axis: len(kept) for name, kept in plan.kept.items()}
    present = slim_bits(cost.groups, plan)
    for name, places in cost.weights.items():
        layer, path = places[0]
        bits, shape = _stored(static, operand(nodes[layer.name], path))
        dims, outputs = cost.dims_of_weights[name]
        kept = [d.evaluate(dim, lambda axis: sizes.get(axis, axis.size)) for dim in dims]
        assert shape is None or shape == kept, name
        assert _each(bits, kept[outputs]) == _each(present[name], kept[outputs]), name
    for name, places in cost.activations.items():
        for layer, path in places:
            read = operand(nodes[layer.name], path)
            assert values.get(read.name, FLOAT) == plan.activation_bits[name], (name, layer.name)


def _each(bits: Any, channels: int) -> list[int]:
    return [bits] * channels if isinstance(bits, int) else list(bits)


def _stored(static: fx.GraphModule, node: fx.Node) -> tuple[Any, list[int] | None]:
    """Bits of the codes that a weight is made of, 32 of a float; and its shape, None where it is computed."""
    tensors = dict(static.named_buffers()) | dict(static.named_parameters())
    stack, seen = [node], set[fx.Node]()
    while stack:
        source = stack.pop()
        if source.op == "get_attr" and str(source.target) in static_of(static).weights:
            return static_of(static).weights[str(source.target)].bits, list(tensors[str(source.target)].shape)
        stack += [n for n in source.all_input_nodes if n not in seen]
        seen |= {*stack}
    if node.op != "get_attr":
        return FLOAT, None
    value = tensors[str(node.target)]
    assert value.is_floating_point()
    return FLOAT, list(value.shape)


def _check_report(result: sbs_fx.Result, cost: CostModel) -> None:
    plan, rows = result.policy.plan, {row.name: row for row in result.report.layers}
    assert {row.name: row.kept for row in result.report.groups} == {n: len(kept) for n, kept in plan.kept.items()}
    present = slim_bits(cost.groups, plan)
    for layer in cost.layers:
        weights = [product.right for product in layer.products if product.right and product.right[0] == "weight"]
        if weights:
            bits = _each(present[weights[-1][1]], 1)
            assert rows[layer.name].weight_bits == pytest.approx(sum(bits) / len(bits))
        inputs = [product.left for product in layer.products if product.left and product.left[0] == "activation"]
        if inputs and len(layer.products) == len(inputs):
            assert rows[layer.name].activation_bits == plan.activation_bits[inputs[-1][1]]
    assert result.report.cost == result.cost == cost.evaluate(plan)
