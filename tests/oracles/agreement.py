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
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.facts import non_negative
from sbs_fx.passes.graph import attribute, copy_graph
from sbs_fx.passes.oracles.slimming import activations, compare_slim, relative_error

# Relative to the largest entry of each tensor. float64 networks of six blocks reach 1e-14.
NODE_TOLERANCE = 1e-10
# float32 rounds at 6e-8; a few hundred operations and the conditioning of normalisations cost a factor of ten each.
OUTPUT_TOLERANCE = 1e-5

SEEN = 1e-6  # a difference above all rounding
PLANS = 5  # reason: a plan may drop only channels that a ReLU has silenced anyway; not five times running

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

    for node in result.graph.nodes:  # reason: the types in `meta` stay, nothing reads them and changing them is slow
        node.args = tuple(replaced(a) for a in node.args)
        node.kwargs = {name: replaced(a) for name, a in node.kwargs.items()}
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
    described = {(m.tensor, m.dim) for group in case.groups.values() for m in group.members}
    described |= {(pin.tensor, pin.dim) for pin in case.groups.pins}
    for name, types in inference.tensors.items():
        shape = attribute(case.exact, name).shape
        assert tuple(t.size for t in types) == tuple(shape)
        for i, size in enumerate(shape):
            assert size == 1 or (name, i) in described, f"{name} dimension {i} is neither in a group nor pinned"


def check_signs(case: Traced) -> None:
    """A tensor that is said never to be negative is not."""
    claimed = {node.name for node in non_negative(case.exact.graph.nodes)}
    for name, value in activations(case.exact, case.inputs()):
        assert name not in claimed or bool((value >= 0).all()), f"{name} is {float(value.min())}"


def check_slim(case: Traced, plan: Plan) -> tuple[fx.GraphModule, bool]:
    """Masked and slim agree at every node in float64. Gives back the slim graph, and whether its output is another
    one than that of the whole graph: if not, the plan drops nothing that is alive and proves little."""
    slimmed = slim(case.exact, case.groups, plan)
    report = compare_slim(case.exact, case.groups, plan, case.inputs(), slimmed=slimmed)
    assert report.worst_error <= NODE_TOLERANCE, f"{report}; first {report.first_above(NODE_TOLERANCE)}; plan {plan}"
    return slimmed, report.differs_from_dense > SEEN


def check_float32(case: Traced, slimmed: fx.GraphModule) -> None:
    """A slim float64 graph, run in float32, gives the same output."""
    with torch.no_grad():
        exact, (images,) = slimmed(*case.inputs()), case.inputs()
        rounded = cast(slimmed, torch.float32)(images.float())
    error = relative_error(rounded.double(), exact)
    assert error <= OUTPUT_TOLERANCE, f"float32 output error {error:.1e}"


def check_slim_again(case: Traced, slimmed: fx.GraphModule, plan: Plan, random: Random) -> None:
    """A slim graph is a graph like any other: its groups have the kept sizes, masked is slim, and slimming it is
    slimming the whole graph once. `plan` leaves two or more coordinates where there are two: a group of one is none,
    and with it the numbers in the names of products change."""
    groups = channel_groups(slimmed)
    assert not groups.inference.unknown
    assert {n: g.size for n, g in groups.items()} == {n: len(kept) for n, kept in plan.items()}
    second = random_plan(groups, random)
    twice = slim(slimmed, groups, second)
    report = compare_slim(slimmed, groups, second, case.inputs(), slimmed=twice)
    assert report.worst_error <= NODE_TOLERANCE, f"slim again: {report}; first {report.first_above(NODE_TOLERANCE)}"
    once = slim(case.exact, case.groups, {n: [kept[i] for i in second[n]] for n, kept in plan.items()})
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
    """All equalities on one network, with two random plans or more."""
    case = traced(network, images)
    check_trace(case)
    check_open_gates(case)
    check_analysis(case)
    check_signs(case)
    random = Random(seed)
    for _ in range(PLANS):
        slimmed, seen = check_slim(case, random_plan(case.groups, random))
        if seen:
            break
    assert seen or not case.groups, f"{PLANS} plans, and the output is that of the whole graph each time"
    check_float32(case, slimmed)
    plan = random_plan(case.groups, random, least=2)
    check_slim_again(case, check_slim(case, plan)[0], plan, random)
    return case
