"""The equalities that hold for every network, each an assertion; tests call them on drawn and on named networks.

In: a network and images for it. Holds: every check has two independent ways to the same answer. The checks of slimming
run in float64, where rounding stays near 1e-15 of a tensor and an index error does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor, fx, nn

from sbs_fx.passes import ChannelGroups, channel_groups, insert_gates, slim, trace
from sbs_fx.passes import dims as d
from sbs_fx.passes.slim import copy_graph
from sbs_fx.passes.verify import SlimReport, compare_slim

# Relative to the largest entry of each tensor. float64 networks of six blocks reach 1e-14.
NODE_TOLERANCE = 1e-10
# float32 rounds at 6e-8; a few hundred operations and the conditioning of normalisations cost a factor of ten each.
OUTPUT_TOLERANCE = 1e-5

EXPORTED_BATCH, OTHER_BATCH = 2, 3
Images = Callable[[int], Tensor]  # batch size -> images (batch, 3, height, width)
Plan = dict[str, list[int]]


@dataclass(frozen=True)
class Traced:
    """A network beside its graphs: as traced, in float32, and the same in float64 with its groups."""

    network: nn.Module
    graph: fx.GraphModule
    exact: fx.GraphModule
    groups: ChannelGroups
    images: Images = field(repr=False)

    def inputs(self, batch: int = OTHER_BATCH) -> tuple[Tensor]:
        return (self.images(batch).double(),)


def traced(network: nn.Module, images: Images) -> Traced:
    graph = trace(network, images(EXPORTED_BATCH))
    exact = cast(graph, torch.float64)
    return Traced(network, graph, exact, channel_groups(exact), images)


def cast(graph_module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy that computes in another floating-point type throughout."""
    result = copy_graph(graph_module).to(dtype)

    def replaced(argument: object) -> object:
        return dtype if isinstance(argument, torch.dtype) and argument.is_floating_point else argument

    for node in result.graph.nodes:
        node.args = tuple(replaced(a) for a in node.args)
        node.kwargs = {name: replaced(a) for name, a in node.kwargs.items()}
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point():
            node.meta["val"] = value.to(dtype)
    result.recompile()
    return result


def random_plan(groups: ChannelGroups, random: Random, least: int = 1) -> Plan:
    """A random non-empty subset of every group: of any size, at times all of it or `least` coordinates."""
    plan: Plan = {}
    for name, group in groups.items():
        least_here = min(least, group.size)
        count = random.choice((least_here, group.size, *[random.randint(least_here, group.size)] * 4))
        plan[name] = sorted(random.sample(range(group.size), count))
    return plan


# The equalities


def check_trace(case: Traced) -> None:
    """One graph, any batch: bitwise the module in eval mode."""
    with torch.no_grad():
        for batch in (1, 2, 5):
            images = case.images(batch)
            assert torch.equal(case.graph(images), case.network(images)), f"batch {batch}"


def check_open_gates(case: Traced) -> None:
    """With every gate open the searchable graph is bitwise the traced one, with or without channel gates."""
    groups = channel_groups(case.graph)
    images = case.images(OTHER_BATCH)
    with torch.no_grad():
        expected = case.graph(images)
        for channels in (True, False):
            assert torch.equal(insert_gates(case.graph, groups, channels=channels)(images), expected)


def check_analysis(case: Traced) -> None:
    """Everything is typed by a rule, every type is as large as what it describes, every pin has a cause."""
    inference = case.groups.inference
    assert not inference.unknown, f"operators without a rule: {inference.unknown}"
    assert all(pin.causes and all(pin.causes) for pin in case.groups.pins)
    members = {(m.tensor, m.dim) for group in case.groups.values() for m in group.members}
    pinned = {(pin.tensor, pin.dim) for pin in case.groups.pins}
    for name, types in inference.tensors.items():
        shape = case.exact.get_parameter(name).shape if name in dict(case.exact.named_parameters()) else (
            case.exact.get_buffer(name).shape)
        assert tuple(t.size for t in types) == tuple(shape)
        for i, size in enumerate(shape):
            assert size == 1 or (name, i) in members | pinned, f"{name} dimension {i} is neither free nor pinned"


def check_slim(case: Traced, plan: Plan) -> tuple[fx.GraphModule, SlimReport]:
    """Masked and slim agree at every node in float64 and at the output in float32, and the plan changes something."""
    slimmed = slim(case.exact, case.groups, plan)
    report = compare_slim(case.exact, case.groups, plan, case.inputs(), slimmed=slimmed)
    assert report.worst_error <= NODE_TOLERANCE, f"{report}; first {report.first_above(NODE_TOLERANCE)}; plan {plan}"
    changed = any(len(kept) < case.groups[name].size for name, kept in plan.items())
    assert not changed or report.differs_from_dense > 1e-6, f"the plan changes nothing that is seen: {report}"
    with torch.no_grad():
        exact, (images,) = slimmed(*case.inputs()), case.inputs()
        rounded = cast(slimmed, torch.float32)(images.float())
    error = (rounded.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3)
    assert error <= OUTPUT_TOLERANCE * max(1, condition(case, plan)), f"float32 output error {error:.1e}; plan {plan}"
    return slimmed, report


def condition(case: Traced, plan: Plan) -> float:
    return 1.0


def check_slim_again(case: Traced, slimmed: fx.GraphModule, plan: Plan, second: Random) -> None:
    """The slim graph is a graph like any other: its groups have the kept sizes, and slimming twice is slimming once.

    Groups of which one coordinate is left are gone, and with them the numbers in the names of products; so names are
    compared, and plans put one after the other, where two or more are left of each.
    """
    groups = channel_groups(slimmed)
    assert not groups.inference.unknown
    several = all(len(kept) > 1 for kept in plan.values())
    if several:
        assert {n: g.size for n, g in groups.items()} == {n: len(kept) for n, kept in plan.items()}
    again = random_plan(groups, second)
    report = compare_slim(slimmed, groups, again, case.inputs())
    assert report.worst_error <= NODE_TOLERANCE, f"slim again: {report}; first {report.first_above(NODE_TOLERANCE)}"
    if several:
        twice = slim(slimmed, groups, again)
        once = slim(case.exact, case.groups, {n: [kept[i] for i in again[n]] for n, kept in plan.items()})
        assert_same_tensors(twice, once)
        with torch.no_grad():
            assert torch.equal(twice(*case.inputs()), once(*case.inputs()))


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def free_share(groups: ChannelGroups, kinds: Iterable[str] = ("conv", "linear")) -> float:
    """Share of the multiply-accumulates of one image in layers of those kinds that have a side which can shrink."""
    total = free = 0
    for layer in groups.inference.layers.values():
        if layer.kind in kinds:
            macs = sum(d.product([size for size, _ in term.sizes]).size for term in layer.terms)
            total += macs
            free += macs * any(d.axes(size) for term in layer.terms for size, _ in term.sizes)
    return free / total if total else 1.0


def check_network(network: nn.Module, images: Images, seed: int) -> Traced:
    """All equalities on one network, with two random plans."""
    case = traced(network, images)
    check_trace(case)
    check_open_gates(case)
    check_analysis(case)
    random = Random(seed)
    for least in (1, 2):
        plan = random_plan(case.groups, random, least)
        slimmed, _ = check_slim(case, plan)
        check_slim_again(case, slimmed, plan, random)
    return case
