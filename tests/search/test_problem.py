"""Problems, spaces and constraints of a network small enough to say by hand what each may decide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbs_fx.passes import CostModel
from sbs_fx.plan import Budget, Plan
from sbs_fx.plan.errors import ConstraintError, DataError, InfeasibleBudget
from sbs_fx.search import Keep, Problem, Space, SpaceSettings, registry, uniform
from sbs_fx.search.constraints import ENDS
from sbs_fx.search.registry import Run
from sbs_fx.search.uniform import bit_pairs
from tests.oracles.problems import cost_of, problem_of

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STREAM, INNER, MIDDLE = "stem.weight:0", "first.weight:0", "middle.weight:0"


class Branches(nn.Module):
    """A stream of 8 channels that two layers make, a branch of 16, and a linear layer of 12 before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.middle, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.middle(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def cost() -> CostModel:
    torch.manual_seed(0)
    return cost_of(Branches(), IMAGES)


def problem(cost: CostModel, budget: Budget | None = None, **space: Any) -> Problem:
    return problem_of(cost, IMAGES, budget or Budget(bops=0.5, size=0.1), **{"round_to": 4, **space})


def space_of(cost: CostModel, *constraints: Keep, **settings: Any) -> Space:
    return Space(cost.groups, cost, SpaceSettings(**{"round_to": 4, "constraints": constraints, **settings}))


# Limits


def test_what_a_plan_leaves_unused_is_told(cost: CostModel) -> None:
    most, least = (problem(cost).space.plan(bits, bits) for bits in (32, 2))
    full, part = (cost.price(plan)["bops"] / cost.whole["bops"] for plan in (most, least))

    def told(share: float, plan: Plan) -> str:
        return " ".join(problem(cost, Budget(bops=share)).slack(plan))

    assert told(full, most) == told(full / 0.95, most) == told(part / 0.95, least) == ""
    assert told(2 * full, most) == (
        f"the budget limits nothing: all channels at their most bits cost {full:.2%} of the float bops; ask for less"
    )
    assert told(4 * part, least).startswith(
        f"25% of the budget is used ({part:.2%} of the float bops): bits, multiples"
    )


def test_used_is_the_largest_share_of_a_limit(cost: CostModel) -> None:
    plan = Plan({INNER: (0, 1, 2)}, {"first": 4, "second": 2}, {"relu": 4})
    both = problem(cost)
    price = both.price(plan)
    shares = {measure: price[measure] / both.limits[measure] for measure in ("bops", "size")}
    assert shares["bops"] != shares["size"]
    assert both.used(plan) == max(shares.values())
    assert replace(both, limits={"bops": 0, "size": both.limits["size"]}).used(plan) == float("inf")


@pytest.mark.parametrize("over", ["bops", "size"])
def test_a_plan_fits_to_the_limits_and_no_further(cost: CostModel, over: str) -> None:
    plan = Plan({INNER: (0, 1, 2)}, {"first": 4, "second": 2}, {"relu": 4})
    price = problem(cost).price(plan)
    exact = replace(problem(cost), limits=price)
    assert exact.fits(plan)
    assert exact.used(plan) == 1
    less = replace(exact, limits={**price, over: price[over] - 1})
    assert not less.fits(plan)
    assert less.used(plan) > 1


def test_what_is_out_of_reach_names_what_binds(cost: CostModel) -> None:
    wide, same = Keep("first", weight_bits=8), Keep("second", weight_bits=2, activation_bits=2)
    tight = problem(cost, Budget(bops=1e-4, size=1.0), constraints=(wide, same))
    with pytest.raises(InfeasibleBudget) as caught:
        tight.check_feasible("any")
    binding = [text for text in caught.value.binding if text.startswith("Keep")]
    assert [text.partition(" (")[0] for text in binding] == [str(ENDS), str(wide)]
    assert not any("size" in text for text in binding)
    assert caught.value.least["bops"] == tight.price(tight.space.least)["bops"] / cost.whole["bops"]
    reachable = replace(tight, limits=tight.price(tight.space.least))
    reachable.check_feasible("any")


def test_the_same_problem_in_another_space(cost: CostModel) -> None:
    assert problem(cost).space.free("channels") == [STREAM, INNER, MIDDLE]
    assert problem(cost).within(prune=False).space.free("channels") == []


# What may be decided


def test_choices_without_constraints(cost: CostModel) -> None:
    space = space_of(cost)
    assert {n: space.values("weight", n) for n in cost.weights} == {
        "stem": (8,), "first": (2, 4, 8), "second": (2, 4, 8), "middle": (2, 4, 8), "head": (8,)
    }  # fmt: skip
    assert space.values("channels", STREAM) == (4, 8)
    assert space.values("channels", INNER) == (4, 8, 12, 16)
    assert space.values("channels", MIDDLE) == (4, 8, 12)
    assert space.free("weight") == ["first", "second", "middle"]
    assert space.free("channels") == [STREAM, INNER, MIDDLE]
    assert space.fixed("weight") == {"stem": 8, "head": 8}
    assert {len(kept) for kept in space.least.kept.values()} == {4}
    assert space.least.weight_bits == {"stem": 8, "first": 2, "second": 2, "middle": 2, "head": 8}
    assert {n: len(kept) for n, kept in space.most.kept.items()} == {STREAM: 8, INNER: 16, MIDDLE: 12}


def test_the_same_bits_or_the_most_below_or_the_least(cost: CostModel) -> None:
    space = space_of(cost, Keep("second", weight_bits=(4, 8)))
    for asked, first, second in ((8, 8, 8), (6, 4, 4), (4, 4, 4), (3, 2, 4), (2, 2, 4), (1, 2, 4)):
        bits = space.plan(asked, 8).weight_bits
        assert (bits["first"], bits["second"], bits["stem"]) == (first, second, 8)


def test_bits_of_all_that_no_constraint_speaks_of(cost: CostModel) -> None:
    space = space_of(cost, Keep("first", weight_bits=(4, 8)), weight_bits=3, activation_bits=6)
    assert space.values("weight", "first") == (4, 8)
    assert space.values("weight", "second") == (3,)
    inside = [name for name in cost.activations if space.values("activation", name) != (8,)]
    assert {space.values("activation", name) for name in inside} == {(6,)}


def test_constraints_on_channels(cost: CostModel) -> None:
    half = space_of(cost, Keep("first", least=0.5))
    assert half.values("channels", INNER) == (8, 12, 16)
    assert half.values("channels", MIDDLE) == (4, 8, 12)
    assert half.least_share("first") == 0.5
    assert half.least_share("middle") == 0.0
    whole = space_of(cost, Keep("first", prune=False))
    assert whole.free("channels") == [MIDDLE], "its input, the stream, stays as well"
    assert whole.least_share("first") == 1.0
    allowed = space_of(cost, Keep("first", prune=True), Keep("middle", least=0.5), prune=False)
    assert allowed.free("channels") == []
    assert allowed.least_share("middle") == 1.0
    assert space_of(cost, inner_only=True).free("channels") == [INNER, MIDDLE]


def test_both_factors_of_a_product_only_on_request() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1))
    model = cost_of(grouped, IMAGES)
    minor = [group.name for group in model.groups.values() if not group.primary]
    assert minor
    assert not set(space_of(model, round_to=1).free("channels")) & set(minor)
    assert set(minor) <= set(space_of(model, round_to=1, minor_groups=True).free("channels"))


# What a constraint is about


def bits_of(space: Space) -> dict[str, tuple[int, ...]]:
    return {name: space.values("weight", name) for name in space.cost.weights}


@pytest.mark.parametrize(
    ("constraint", "weights"),
    [
        (Keep("*", weight_bits=3), {"stem", "first", "second", "middle", "head"}),
        (Keep("first", weight_bits=3), {"first"}),
        (Keep("first.weight", weight_bits=3), {"first"}),
        (Keep("s*", weight_bits=3), {"stem", "second"}),
        (Keep(kind="linear", weight_bits=3), {"middle", "head"}),
        (Keep("s*", kind="conv", weight_bits=3), {"stem", "second"}),
        (Keep(place="first", weight_bits=3), {"stem"}),
        (Keep(place="last", weight_bits=3), {"head"}),
        (Keep(place="ends", weight_bits=3), {"stem", "head"}),
        (Keep.parse("first=3/5"), {"first"}),
    ],
    ids=lambda value: str(value) if isinstance(value, Keep) else " ".join(sorted(value)),
)
def test_layers_by_name_kind_and_place(cost: CostModel, constraint: Keep, weights: set[str]) -> None:
    assert {name for name, bits in bits_of(space_of(cost, constraint)).items() if bits == (3,)} == weights


@pytest.mark.parametrize("constraint", [Keep("sec", weight_bits=3), Keep("head", prune=False, kind="conv")], ids=str)
def test_what_matches_nothing_is_refused(cost: CostModel, constraint: Keep) -> None:
    with pytest.raises(ConstraintError, match="matches nothing"):
        space_of(cost, constraint)


def test_groups_of_a_constraint(cost: CostModel) -> None:
    """By a pattern alone in any tensor that it names, a bias too; else those of matched layers."""
    assert space_of(cost, Keep("first.bias", prune=False)).free("channels") == [STREAM, MIDDLE]
    assert space_of(cost, Keep(kind="linear", prune=False)).free("channels") == [INNER]
    # one thing that it asks for has something to act on
    assert space_of(cost, Keep("first.bias", weight_bits=3, prune=False)).values("weight", "first") == (2, 4, 8)


def test_constraints_as_text() -> None:
    assert Keep.parse("a.*=4/8") == Keep("a.*", weight_bits=4, activation_bits=8)
    assert Keep.parse("a=4") == Keep("a", weight_bits=4, activation_bits=4)
    for wrong in ("a", "a=7", "a=x"):
        with pytest.raises(ConstraintError):
            Keep.parse(wrong)
    with pytest.raises(ConstraintError):
        Keep("a", least=0.0)


def test_a_plan_with_one_decision_changed() -> None:
    plan = Plan({"a": (0,)}, {"b": 4, "c": 8}, {"d": 2})
    assert plan.with_value("weight", "b", 2) == Plan({"a": (0,)}, {"b": 2, "c": 8}, {"d": 2})
    assert plan.with_value("channels", "e", (1,)).kept == {"a": (0,), "e": (1,)}
    assert [plan.value(kind, name) for kind, name in (("channels", "a"), ("weight", "c"), ("activation", "d"))] == [
        (0,), 8, 2
    ]  # fmt: skip


# Methods


def test_methods_that_need_least_come_first() -> None:
    needs = [(("nothing", "images", "labels").index(m.needs), m.trains) for m in registry.methods().values()]
    assert needs == sorted(needs)
    assert len(set(needs)) > 2
    assert registry.sections()["search"] is registry.METHODS["sbs"].settings


def test_a_method_that_needs_data_is_refused_without() -> None:
    assert registry.chosen("uniform", has_data=False, fine_tunes=False).name == "uniform"
    for name in ("two_stage", "sbs"):
        with pytest.raises(DataError, match="needs data"):
            registry.chosen(name, has_data=False, fine_tunes=False)
    chosen = {o: registry.chosen("auto", *o).automatic for o in ((False, False), (True, False), (True, True))}
    assert list(chosen.values()) == ["without data", "with data", "with training"]


# The baseline


def test_pairs_of_bits_fall_weights_first(cost: CostModel) -> None:
    assert bit_pairs(space_of(cost)) == [(8, 8), (4, 8), (4, 4), (2, 4), (2, 2)]
    assert bit_pairs(space_of(cost, weight_bits=4)) == [(8, 8), (4, 4), (2, 2)]


def test_the_first_pair_that_keeps_all_channels_is_taken(cost: CostModel) -> None:
    space = problem(cost).space
    limits = problem(cost).cost.price(space.plan(4, 8))
    found = uniform(replace(problem(cost), limits=limits), Run()).plan
    assert found == space.plan(4, 8)
    # one multiply-accumulate less: a group loses four channels, the others keep all
    less = replace(problem(cost, prune=True, candidates=(4, 8)), limits={"size": limits["size"] - 1})
    kept = uniform(less, Run(fine_tunes=True)).plan.kept
    assert less.fits(uniform(less, Run(fine_tunes=True)).plan)
    assert kept.keys() == cost.groups.keys()
