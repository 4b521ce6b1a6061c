"""Parts of methods by hand, on networks of a few layers: what goes with channels and bits, orders, moves, votes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbs_fx.passes import CostModel, channel_gates, insert_gates, weight_gates
from sbs_fx.passes.channels import dims as d
from sbs_fx.plan import Budget, Plan
from sbs_fx.plan.plan import KINDS_OF_BITS
from sbs_fx.quantizer.grid import Grid, max_level
from sbs_fx.search import Problem, Search, channel_bits, sparse
from sbs_fx.search.allocation import Allocator, Candidate, Decision
from sbs_fx.search.channel_bits import ChannelBits
from sbs_fx.search.gate_search import GateSearch, bits_of
from sbs_fx.search.opq import _bit_damages, _channel_damage
from sbs_fx.search.ranges import gates_by_bits, use_ranges
from sbs_fx.search.repair import BudgetRepair, Harm, Move, judged_on
from sbs_fx.search.sbs import _even
from sbs_fx.search.solvers.laplace import laplace_fit, least_rounding_error
from sbs_fx.search.two_stage import _around, _channel_decision, _levels, _measured, _read
from tests.oracles.problems import cost_of, problem_of

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STREAM, INNER = "stem.weight:0", "first.weight:0"


class Branches(nn.Module):
    """A stream of 4 channels that two layers make, one of them twice, and three read, one of them twice; and a branch
    of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.first, self.second, self.head = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1), nn.Linear(4, 5)
        self.gate = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        x = x + self.second(torch.relu(self.first(x)))
        return self.head(x.mean((2, 3))) * self.gate(x.mean((2, 3)))


@pytest.fixture(scope="module")
def cost() -> CostModel:
    torch.manual_seed(0)
    module = Branches()
    module.norm.weight.data.copy_(torch.tensor([1.0, -100.0, 0.01, 1.0]))
    return cost_of(module, IMAGES)


def problem(cost: CostModel, budget: Budget | None = None, **space: Any) -> Problem:
    return problem_of(cost, IMAGES, budget or Budget(bops=0.5, size=0.5), **{"round_to": 1, **space})


# opq


def test_what_goes_with_channels(cost: CostModel) -> None:
    """Of squared scores 16, 9, 4 and 1, three stay: 1 of 30 goes, once for each weight that reads the stream."""
    given = problem(cost)
    assert given.space.values("channels", STREAM) == (1, 2, 3, 4)
    damage = _channel_damage(given, STREAM, torch.tensor([4.0, 1.0, 3.0, 2.0]))
    readers = 4  # `first` at two places, and the last two
    np.testing.assert_allclose(damage, readers * np.array([14, 5, 1, 0]) / 30)
    inner = _channel_damage(given, INNER, torch.arange(8.0))
    assert inner[-1] == 0
    assert inner[-2] == 0, "its least channel is worth nothing"
    assert inner[0] == pytest.approx(2 * (1 - 49 / 140)), "`second` at two places"


def test_what_goes_with_bits(cost: CostModel) -> None:
    given = problem(cost)
    damages = _bit_damages(given)
    weight = given.graph.get_parameter("first.weight")
    expected = [2 * laplace_fit(weight) * least_rounding_error(max_level(bits, signed=True)) for bits in (2, 4, 8)]
    np.testing.assert_allclose(damages["weight", "first"], expected)
    (first, _), *_ = cost.weights["first"]
    tensor = next(name for name, places in cost.activations.items() if any(x is first for x, _ in places))
    assert given.space.values("activation", tensor) == (2, 4, 8)
    levels = [max_level(bits, signed=False) for bits in (2, 4, 8)]  # behind a relu
    np.testing.assert_allclose(damages["activation", tensor], [least_rounding_error(n) for n in levels])


def test_the_largest_single_weights_stay() -> None:
    weight = torch.tensor([[-3.0, 1.0, 0.5], [2.0, -0.1, 1.0]])
    assert sparse.largest(weight, 2).tolist() == [[-3.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    assert sparse.largest(weight, 3).tolist() == [[-3.0, 0.0, 0.0], [2.0, 0.0, 1.0]], "of equal ones the later"
    assert sparse.largest(weight, 6).equal(weight)


def test_no_more_single_weights_stay_than_there_are() -> None:
    weight = torch.zeros(4000)
    weight[:1000] = torch.linspace(0.1, 1, 1000)
    each = sparse.single_weights(weight, (2, 4, 8))
    assert max(each.nonzeros) == 1000


def test_size_with_weights_stored_singly(cost: CostModel) -> None:
    given = problem(cost)
    polynomial, numbers = sparse.stored_singly(given, ["first", "second"])
    plan = given.space.plan(4, 8)
    x = np.concatenate([cost.values(plan)[0][:-1], [32 * 4, 32 * 4], [1.0]])
    assert sorted(numbers.values()) == [len(cost.variables), len(cost.variables) + 1]
    assert polynomial(x) == cost.price(plan)["size"]


# Decisions


def test_decisions() -> None:
    channels = Decision("channels", "a", (4, 2, 1), (0.0, 1.0, 3.0), order=(2, 0, 3, 1))
    assert channels.applied(Plan(), 1).kept == {"a": (1, 3)}, "the least important are first in the order"
    assert channels.applied(Plan(), 0).kept == {"a": (0, 1, 2, 3)}
    assert channels.chosen(Plan({"a": (1, 3)})) == 1
    assert [channels.is_harmless(k) for k in range(3)] == [True, False, False]
    bits = Decision("weight", "b", (2, 4, 8), (0.0, 0.0, 0.0))
    assert bits.with_losses((1.0, 3.0, 0.5)).losses == (3.0, 3.0, 0.5), "no less is lost with fewer bits"
    assert bits.is_harmless(2)


def bits_decisions(given: Problem, sign: float = 1.0) -> list[Decision]:
    free = [(kind, name) for kind in KINDS_OF_BITS for name in given.space.free(kind)]
    return [Decision(kind, name, (2, 4, 8), (4.0 * sign, 1.0 * sign, 0.0)) for kind, name in free]


def test_the_same_bits_wherever_they_fit_and_nothing_more_does(cost: CostModel) -> None:
    given = problem(cost)
    prices = [given.price(given.space.plan(*pair)) for pair in ((8, 4), (4, 8))]
    given = replace(given, limits={measure: max(price[measure] for price in prices) for measure in given.limits})
    found = {c.name: c.plan for c in Allocator(given, 20.0).candidates(bits_decisions(given))}
    assert [name for name in found if name.startswith("uniform")] == ["uniform 8/4", "uniform 4/8"]
    for weights, activations in ((8, 4), (4, 8)):
        assert found[f"uniform {weights}/{activations}"] == given.space.plan(weights, activations)


def test_prices_of_channels_are_differences_to_first_order(cost: CostModel) -> None:
    given = problem(cost)
    plan = given.space.plan(4, 4)
    channels = Decision("channels", INNER, (8, 3), (0.0, 1.0), order=tuple(range(8)))
    knapsack = Allocator(given, 20.0)._knapsack(plan, [], [channels])
    fewer, here = given.price(channels.applied(plan, 1)), given.price(plan)
    np.testing.assert_allclose(knapsack.costs[0], [[0.0, fewer[m] - here[m]] for m in given.limits])
    np.testing.assert_allclose(knapsack.limits, [given.limits[m] - here[m] for m in given.limits])


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_decisions_change_than_asked_for(cost: CostModel, most: int) -> None:
    given = problem(cost, Budget(bops=1.0, size=1.0))
    around = Candidate("", given.space.most, 0.0, 0.0, True)
    moved = Allocator(given, 20.0).moved(bits_decisions(given, -1.0), around, most)
    assert moved is not None
    before = {**around.plan.weight_bits, **around.plan.activation_bits}
    after = {**moved.plan.weight_bits, **moved.plan.activation_bits}
    assert sum(before[name] != after[name] for name in before) == most


# two_stage


def test_no_more_counts_than_levels() -> None:
    assert _levels((16, 32, 48, 64, 80), 4) == (80, 64, 48, 16)
    assert _levels((16, 32, 48, 64), 4) == (64, 48, 32, 16)


def test_channels_that_matter_least_go_first() -> None:
    evidence = SimpleNamespace(
        channels={"a": torch.tensor([[3.0, -1.0, 0.5], [-3.0, 1.0, 0.5]])},  # large ones that cancel
        of_removing=lambda name, gone: float(sum(10**i for i in gone)),
    )
    decision = _channel_decision(evidence, "a", (3, 2, 1), ())  # type: ignore[arg-type]
    assert decision.order == [2, 1, 0]
    assert decision.losses == (0.0, 100.0, 110.0)


class Predicted:
    """Losses of plans by the bits of one weight."""

    def __init__(self, **losses: float) -> None:
        self.losses, self.asked = losses, list[Plan]()

    def __call__(self, plan: Plan) -> float:
        return self.of([plan])[0]

    def of(self, plans: Sequence[Plan]) -> list[float]:
        self.asked += plans
        return [self._loss(plan) for plan in plans]

    def _loss(self, plan: Plan) -> float:
        return self.losses[f"b{plan.weight_bits['b']}"] + self.losses[f"c{plan.weight_bits['c']}"]


def test_estimates_are_brought_to_the_scale_of_measured_losses() -> None:
    decisions = [
        Decision("weight", "b", (2, 4, 8), (4.0, 1.0, 0.5)),
        Decision("weight", "c", (2, 4, 8), (2.0, 0.5, 9.0)),
    ]
    start = Plan({}, {"b": 8, "c": 8})
    predictor = Predicted(b2=0.4, b4=0.1, b8=0.0, c2=0.6, c4=0.2, c8=1.0)
    measured = _measured(decisions, start, 1.0, predictor, 3)  # type: ignore[arg-type]
    # of the three largest estimates one is of the most bits, which is not measured: 4 and 2 were 0.4 and -0.4
    assert [plan.weight_bits for plan in predictor.asked] == [{"b": 2, "c": 8}, {"b": 8, "c": 2}]
    assert measured[0].losses == pytest.approx((0.4, 0.0, 0.0))
    assert measured[1].losses == pytest.approx((0.0, 0.0, 0.0))


def test_losses_around_a_plan_are_differences_from_its_own() -> None:
    decisions = [
        Decision("weight", "b", (2, 4, 8), (4.0, 1.0, 0.5)),
        Decision("weight", "c", (2, 4, 8), (2.0, 0.5, 0.0)),
    ]
    centre = Candidate("", Plan({}, {"b": 4, "c": 8}), 0.0, 0.0, True)
    predictor = Predicted(b2=0.9, b4=0.25, b8=0.125, c4=0.5, c8=0.0)
    near = _around(decisions, centre, 0.25, predictor)  # type: ignore[arg-type]
    assert [x.choices for x in near] == [(2, 4, 8), (4, 8)]
    assert near[0].losses == pytest.approx((0.65, 0.0, -0.125))
    assert near[1].losses == pytest.approx((0.5, 0.0))


def test_as_many_images_are_read_as_asked_for() -> None:
    data = [(torch.full((6, 3, 4, 4), float(i)), torch.full((6,), i)) for i in range(3)]
    batches = _read(data, 8, 1)
    assert torch.cat([x for (x,), _ in batches])[:, 0, 0, 0].tolist() == [0.0] * 6 + [1.0] * 2
    assert torch.cat([y for _, y in batches if y is not None]).tolist() == [0] * 6 + [1] * 2


# Budget repair


def test_moves_go_to_the_next_choice(cost: CostModel) -> None:
    given = problem(cost)
    scores = {STREAM: torch.tensor([3.0, 9.0, 1.0, 5.0]), INNER: torch.arange(8.0)}
    plan = given.space.plan(4, 4, {STREAM: 2})  # of the stream 0 and 1
    repair = BudgetRepair(given, lambda plan, move: 1.0, scores)  # type: ignore[arg-type]
    down, up = ({(m.kind, m.name): m.value for m in repair._moves(plan, down=way)} for way in (True, False))
    assert (down["weight", "first"], up["weight", "first"]) == (2, 8)
    assert (down["channels", STREAM], up["channels", STREAM]) == ((1,), (0, 1, 3))
    assert down["channels", INNER] == tuple(range(1, 8))
    assert ("channels", INNER) not in up
    assert ("weight", "stem") not in down | up, "there is no choice"
    fewest = given.space.least
    assert not list(repair._moves(fewest, down=True))


@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_repair_ends_within_the_limits(cost: CostModel, share: float) -> None:
    """From above and from below, where each move does the same harm."""
    given = problem(cost)
    limits = {measure: int(share * price) for measure, price in given.price(given.space.most).items()}
    given = replace(given, limits=limits)
    scores = {name: torch.arange(float(group.size)) for name, group in cost.groups.items()}
    for plan in (given.space.most, given.space.least):
        repaired = BudgetRepair(given, lambda plan, move: 1.0, scores)(plan)  # type: ignore[arg-type]
        assert given.fits(repaired)
        assert given.used(repaired) > 0.8
    for used in np.linspace(0.4, 1, 40):  # several moves are made at once: each must fit behind the others
        tight = replace(given, limits={measure: int(used * limit / share) for measure, limit in limits.items()})
        assert tight.fits(BudgetRepair(tight, lambda plan, move: 1.0, scores)(given.space.least))  # type: ignore[arg-type]
    free = problem(cost, Budget(bops=1.0, size=1.0))
    assert BudgetRepair(free, lambda plan, move: -1.0, scores)(free.space.least) == free.space.most  # type: ignore[arg-type]


def test_the_way_back_is_the_opposite_of_the_way(cost: CostModel) -> None:
    given = problem(cost)
    gated = insert_gates(given.graph, given.groups, candidates=given.space.values)
    harm = Harm(gated, judged_on(given.graph, [IMAGES]), {})
    plan, move = given.space.plan(8, 8), Move("weight", "first", 2)
    worse = harm(plan, move)
    assert worse != 0
    assert harm(move.applied(plan), Move("weight", "first", 8)) == -worse


def test_ranges_are_of_their_bits(cost: CostModel) -> None:
    given = problem(cost)
    gated = insert_gates(given.graph, given.groups, candidates=given.space.values)
    gates = gates_by_bits(gated, given.space, [IMAGES], (IMAGES,))
    assert {bits for kind, name, bits in gates if (kind, name) == ("weight", "first")} == {2, 4, 8}
    assert all(gate.bits == bits for (_, _, bits), gate in gates.items())
    assert not torch.equal(gates["weight", "first", 2].range, gates["weight", "first", 8].range)
    ranges = {("weight", "first", bits): Grid(torch.full((8,), float(bits)), None) for bits in (2, 4)}
    for bits, value in ((2, 2.0), (4, 4.0), (8, 4.0)):  # of 8 bits there is none: it stays
        use_ranges(gated, Plan({}, {"first": bits}), ranges)
        assert weight_gates(gated)["first"].range.tolist() == [value] * 8


# Bits by channel


def test_coordinates_of_an_axis_in_a_type() -> None:
    axis, other = d.Axis(3), d.Axis(2)
    assert channel_bits.coordinates(axis, axis).tolist() == [0, 1, 2]
    assert channel_bits.coordinates(d.product([axis, d.Const(2)]), axis).tolist() == [0, 0, 1, 1, 2, 2]
    assert channel_bits.coordinates(d.product([other, axis]), axis).tolist() == [0, 1, 2, 0, 1, 2]
    assert channel_bits.coordinates(d.concatenate([other, axis, d.Const(1)]), axis).tolist() == [-1, -1, 0, 1, 2, -1]


def test_the_fewest_bits_are_of_the_most_important_channels(cost: CostModel) -> None:
    channels = ChannelBits(problem(cost), {}, 0.25)
    order = channels.importance["first"].argsort(descending=True).tolist()
    assert {i for i, bits in enumerate(channels.least["first"]) if bits} == set(order[:2])
    assert set(channels.least["first"]) == {0, 2}


def test_a_layer_without_channels_has_bits_by_channel(cost: CostModel) -> None:
    """0 is no bitwidth of a whole layer."""
    channels = ChannelBits(problem(cost), {}, 0.25)
    bits = {name: [4] * len(channels.importance[name]) for name in channels.names}
    assert channels.plan(bits).weight_bits["first"] == 4
    assert channels.plan({**bits, "first": [0] * 8}).weight_bits["first"] == (0,) * 8


def test_importance_has_the_scale_of_a_folded_norm(cost: CostModel) -> None:
    scores = channel_bits._importance(problem(cost))["stem"]
    weight = cost.groups.inference.graph_module.get_parameter("stem.weight").detach()
    norms = weight.flatten(1).norm(dim=1) * torch.tensor([1.0, 100.0, 0.01, 1.0])  # of a variance of 1
    assert torch.allclose(scores.float(), norms, rtol=1e-4)


# Gates


@pytest.fixture
def stage(cost: CostModel) -> GateSearch:
    given = problem(cost)
    return GateSearch(insert_gates(given.graph, given.groups, candidates=given.space.values), given, Search(reach=0.5))


def test_the_path_of_the_cost(stage: GateSearch) -> None:
    stage.first = {"bops": 2.0, "size": -1.0}
    for done, expected in ((0.0, 2.0), (0.25, 1.0), (0.5, 0.0), (1.0, 0.0)):
        stage.done = done
        assert stage.path("bops") == pytest.approx(expected)
        assert stage.path("size") == 0.0


def test_gates_begin_at_the_plan_that_they_are_given(stage: GateSearch) -> None:
    """The threshold of a group lies half way between the norms of the last channel that stays and the next."""
    plan = stage.problem.space.plan(4, 2, {STREAM: 3, INNER: 5})
    stage.start_at(plan, (IMAGES,))
    for kind, gates in stage.searched.items():
        assert gates
        assert {name: bits_of(gate) for name, gate in gates.items()} == {n: plan.value(kind, n) for n in gates}
    for name, count in ((STREAM, 3), (INNER, 5)):
        norms = stage.channels[name].block_norms.sort(descending=True).values
        threshold = float(stage.channels[name].threshold.detach())
        assert threshold == pytest.approx(float(norms[count - 1] + norms[count]) / 2)


def test_what_was_chosen_most_often_is_the_plan(stage: GateSearch) -> None:
    gate, channels = stage.searched["weight"]["first"], stage.channels[INNER]
    for norms, mask in (((1, -1), (1, 1)), ((1, 1), (1, 0)), ((1, 1), (1, 0)), ((-1, 1), (0, 1))):
        gate.norms.copy_(torch.tensor(norms))
        channels.mask.copy_(torch.tensor(mask).repeat(4))
        stage._vote()
    assert stage.votes["weight"]["first"] == {4: 1, 8: 2, 2: 1}
    plan = stage.plan()
    assert plan.weight_bits["first"] == 8
    assert plan.kept[INNER] == (0, 2, 4, 6), "a half is not most often"
    assert plan.kept[STREAM] == (0, 1, 2, 3)


def test_the_excess_is_the_log_of_cost_over_limit(stage: GateSearch) -> None:
    plan = stage.problem.space.plan(8, 8)
    for gate in (*stage.weights.values(), *stage.activations.values()):
        gate.fix(8)
    for name, channels in channel_gates(stage.network).items():
        channels.fix(plan.kept[name])
    price = stage.problem.price(plan)
    for measure, excess in stage._excess().items():
        assert float(excess) == pytest.approx(float(np.log(price[measure] / stage.problem.limits[measure])), rel=1e-5)


def test_multipliers_grow_above_the_path_and_shrink_below(stage: GateSearch) -> None:
    stage.search = Search(warm_start=False)
    stage.first, stage.last, stage.done = {"bops": 0.0, "size": 0.0}, {"bops": 0.5, "size": -0.5}, 0.0
    before = dict(stage.multipliers)
    stage.after_step(0)
    assert stage.multipliers["bops"] > before["bops"]
    assert stage.multipliers["size"] < before["size"]


# sbs


def test_an_even_start_must_come_down_by_little(cost: CostModel) -> None:
    even = problem(cost).space.plan(4, 4)
    price = problem(cost).price(even)

    def started(share: float, **space: Any) -> Plan | None:
        given = problem(cost, **space)
        return _even(replace(given, limits={measure: share * value for measure, value in price.items()}))

    assert started(0.9) == even
    assert started(1.1) is None, "it is within the limits"
    assert started(0.45) is None, "more than twice the limits"
    assert started(0.9, candidates=(2, 8)) is None
    assert started(0.9, quantise=False) is None
    least = problem(cost, prune=False).space.plan(2, 4)
    too_little = min(problem(cost).price(least)[measure] / price[measure] for measure in price) * 0.99
    assert too_little < 0.5 or started(too_little, prune=False) is None
