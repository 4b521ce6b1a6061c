"""Constraints and the space: every method obeys them, in its plan, its static graph and its report; what is out of
reach names what binds; what matches nothing names what is near."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sbs_fx
from sbs_fx.calibration.reconstruction import Reconstruction
from sbs_fx.passes import CostModel
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.cost.polynomial import Polynomial
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.static.integer_joins import QUANTIZE
from sbs_fx.plan import Budget
from sbs_fx.plan.errors import BudgetError, ConstraintError, InfeasibleBudget, InputError
from sbs_fx.search import Ajpq, Keep, Problem, Run, Search, Space, SpaceSettings, TwoStage
from sbs_fx.search.registry import methods
from tests.networks.models import Recipe, networks
from tests.networks.small import EXAMPLE, batches, net
from tests.oracles.constraints import check_obeyed, check_plan, is_named, layers_of, names_of
from tests.oracles.problems import cost_of

BITS = (2, 3, 4, 5, 6, 8, 32)
QUICK: dict[str, Any] = {
    "search": Search(epochs=1, repair_batches=1),
    "ajpq": Ajpq(episodes=2, group=2, norm_batches=1, reward_batches=1),
    "two_stage": TwoStage(images=32, judged=16, measured=4, rounds=0),
    "reconstruction": Reconstruction(images=16, steps=2, batch=8),
}


class Pooled(nn.Module):
    """Pools, an add and a mean between layers, all of which work on codes where nothing speaks against it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.a(x).relu(), 2)
        x = torch.max_pool2d((self.b(x) + x).relu(), 2)
        return self.head(self.c(x).relu().mean((2, 3)))


# What a constraint says


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("head.*=32", Keep("head.*", weight_bits=32, activation_bits=32)),
        ("layer1=4/8", Keep("layer1", weight_bits=4, activation_bits=8)),
        ("a=b=2/3", Keep("a=b", weight_bits=2, activation_bits=3)),
    ],
)
def test_constraints_from_text(text: str, keep: Keep) -> None:
    assert Keep.parse(text) == keep


@pytest.mark.parametrize("text", ["", "head", "head=", "head=x", "head=4/", "head=4/8/8", "head=7", "head=0", "4"])
def test_text_that_is_no_constraint(text: str) -> None:
    with pytest.raises(ConstraintError, match=r"expected (one like 'head.\*=32'|some of)"):
        Keep.parse(text)


def test_constraints_that_mean_nothing() -> None:
    for wrong in (
        {},
        {"weight_bits": 7},
        {"weight_bits": ()},
        {"least": 0},
        {"least": 1.1},
        {"kind": "pool"},
        {"bits": 4},
    ):
        with pytest.raises(ConstraintError):
            Keep("head", **wrong)
    with pytest.raises(ConstraintError, match="asks for nothing"):
        Keep("head", place="last")
    assert Keep("head", weight_bits=(8, 4, 8)).weight_bits == (4, 8), "ascending, each once"
    said = "Keep('head', kind='linear', place='last', weight_bits=(4, 8), activation_bits=8, prune=False, least=0.5)"
    assert repr(eval(said)) == said
    assert SpaceSettings(constraints=(eval(said),)).model_dump()["constraints"][0]["pattern"] == "head"
    with pytest.raises(ValueError, match="expected some of"):
        SpaceSettings(candidates=(1, 2))


def space_of(cost: CostModel, *keep: Keep, **fields: Any) -> Space:
    return Space(cost.groups, cost, SpaceSettings(constraints=keep, **fields))


@pytest.fixture(scope="module")
def cost() -> CostModel:
    """Of a chain: convolutions "0" and "3", a linear "8"."""
    return cost_of(net(), EXAMPLE)


def test_a_pattern_that_matches_nothing_names_what_is_near(cost: CostModel) -> None:
    torch.manual_seed(0)
    named = cost_of(Pooled(), torch.randn(2, 3, 32, 32))
    with pytest.raises(
        ConstraintError, match=r"Keep\('haed', weight_bits=4\) matches nothing .* names are 'head'"
    ) as error:
        space_of(named, Keep("haed", weight_bits=4))
    assert "kinds of layers are conv, linear" in str(error.value)
    for nothing in (Keep("head", kind="conv", weight_bits=4), Keep("a", place="last", weight_bits=4)):
        with pytest.raises(ConstraintError, match="matches nothing of this model"):
            space_of(named, nothing)
    config = sbs_fx.Config(constraints=(Keep("9", weight_bits=4),))
    with pytest.raises(ConstraintError, match="matches nothing"):
        sbs_fx.compress(net(), EXAMPLE, config=config)
    with pytest.raises(ConstraintError, match="asks for 4 bits where quantise=False rounds nothing"):
        space_of(cost, Keep("3", weight_bits=4), quantise=False)


def test_later_constraints_win_and_the_ends_come_first(cost: CostModel) -> None:
    def bits(*keep: Keep, **fields: Any) -> list[tuple[int, ...]]:
        return [space_of(cost, *keep, **fields).values("weight", name) for name in ("0", "3", "8")]

    assert bits() == [(8,), (2, 4, 8), (8,)]
    assert bits(weight_bits=5) == [(8,), (5,), (8,)]
    assert bits(Keep("*", weight_bits=4)) == [(4,), (4,), (4,)], "any constraint replaces the default of the ends"
    assert bits(Keep(place="ends", weight_bits=(2, 32))) == [(2, 32), (2, 4, 8), (2, 32)]
    assert bits(Keep(place="first", weight_bits=32), Keep(place="last", weight_bits=2)) == [(32,), (2, 4, 8), (2,)]
    assert bits(Keep("*", weight_bits=4), Keep(kind="conv", weight_bits=6)) == [(6,), (6,), (4,)]
    assert bits(Keep(kind="conv", weight_bits=6), Keep("*", weight_bits=4)) == [(4,), (4,), (4,)]
    assert bits(Keep("3", activation_bits=4)) == bits(), "what it does not speak of stays"
    # a parameter, and a module with all that is below
    assert bits(Keep("3.weight", weight_bits=4)) == bits(Keep("3", weight_bits=4)) == [(8,), (4,), (8,)]
    activations = space_of(cost, Keep("3", weight_bits=32, activation_bits=32))
    assert [c.values for c in activations.choices if c.kind == "activation"] == [(8,), (32,), (8,)]


def test_channels_that_stay(cost: CostModel) -> None:
    first, second = (cost.groups[name] for name in ("0.weight:0", "3.weight:0"))

    def counts(*keep: Keep, **fields: Any) -> list[tuple[int, ...]]:
        space = space_of(cost, *keep, **{"round_to": 4, **fields})
        return [space.values("channels", group.name) for group in (first, second)]

    every = (tuple(range(4, 17, 4)), tuple(range(4, 33, 4)))
    assert counts() == [*every]
    assert counts(prune=False) == counts(Keep("*", prune=False)) == [(16,), (32,)]
    assert counts(Keep("0", prune=False)) == [(16,), every[1]]
    assert counts(Keep("3", prune=False)) == [(16,), (32,)], "both sides of the layer"
    assert counts(Keep("1.weight", prune=False)) == [(16,), every[1]], "the batch norm's channels are those of '0'"
    assert counts(Keep("*", prune=False), Keep("0", prune=True)) == [every[0], (32,)]
    assert counts(Keep("0", prune=True), prune=False) == [(16,), (32,)], "prune=False is for all"
    assert counts(Keep("*", least=0.5), Keep("8", least=0.75)) == [(8, 12, 16), (24, 28, 32)]
    assert counts(Keep("*", least=0.55), round_to=16) == [(16,), (32,)]
    assert counts(block=6) == [(6, 12, 16), (6, 12, 18, 24, 30, 32)]


def test_a_policy_changed_by_hand_and_what_it_may_cost() -> None:
    first = sbs_fx.compress(net(), EXAMPLE, budget=0.05)
    name = next(iter(first.policy.kept))
    fewer = first.policy.changed({name: first.policy.kept[name][:4]}, {"3": 2}, {"relu": 3})
    again = sbs_fx.apply(net(), fewer, EXAMPLE, budget=0.05)
    check_obeyed(again, cost_of(net(), EXAMPLE), SpaceSettings(candidates=(2, 3, 4, 8)))
    assert again.cost.bops < first.cost.bops
    assert again.policy == fewer
    more = first.policy.changed(weight_bits={"3": 32}, activation_bits={"relu": 32})
    assert sbs_fx.apply(net(), more, EXAMPLE).cost.bops > 0.05 * first.baseline_cost.bops
    with pytest.raises(BudgetError, match="this policy costs .* of the float model; expected at most .*0.05"):
        sbs_fx.apply(net(), more, EXAMPLE, budget=0.05)


# Drawn constraints


@st.composite
def constraints(draw: st.DrawFn, cost: CostModel, *, rounds: bool = True) -> Keep:
    """About a name in the network, a part of one, a kind or a place; at least one thing is asked for."""
    names = sorted({name for layer in cost.layers for name in names_of(cost, layer)[1:]})
    parts = sorted({".".join(n.split(".")[:k]) for n in names for k in range(1, n.count(".") + 2)})
    pattern = draw(st.sampled_from(["*", *parts, *(f"{part}*" for part in parts), *(f"{part}.*" for part in parts)]))
    kinds = [None, None, *sorted({layer.kind for layer in cost.layers})]
    bits = st.sampled_from(BITS) | st.sets(st.sampled_from(BITS), min_size=1, max_size=3).map(tuple)
    bits = bits if rounds else st.just(32)
    asked = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "weight_bits": bits,
                "activation_bits": bits,
                "prune": st.booleans(),
                "least": st.sampled_from([0.25, 0.5, 0.9, 1.0]),
            },
        ).filter(bool)
    )
    return Keep(
        pattern,
        kind=draw(st.sampled_from(kinds)),
        place=draw(st.sampled_from([None, None, None, "first", "last", "ends"])),
        **asked,
    )


@st.composite
def spaces(draw: st.DrawFn, cost: CostModel) -> SpaceSettings:
    quantise = draw(st.sampled_from([True, True, True, False]))
    return SpaceSettings(
        candidates=draw(st.sampled_from([(2, 4, 8), (3, 6), (2, 4, 8, 32), (8,)])),
        weight_bits=draw(st.sampled_from([None, None, None, 5])),
        constraints=tuple(draw(st.lists(constraints(cost, rounds=quantise), max_size=3))),
        quantise=quantise,
        prune=draw(st.sampled_from([True, True, True, False])),
        round_to=draw(st.sampled_from([None, 1, 4])),
        minor_groups=draw(st.booleans()),
    )


def matches_something(cost: CostModel, space: SpaceSettings) -> bool:
    """Whether each constraint is about something that it could act on, so that none is an error."""
    for keep in space.constraints:
        layers = layers_of(cost, keep)
        weights = any(layer.weights for layer in layers)
        reads = {layer.node for layer in layers}
        tensors = any(x.name in reads for places in cost.activations.values() for x, _ in places)
        dims = [dim for layer in layers for dims, _ in layer.weights.values() for dim in dims]
        groups = any(axis in cost.groups.of_axis for dim in dims for axis in d.axes(dim))
        if keep.kind is None and keep.place is None:
            members = [member.tensor for group in cost.groups.values() for member in group.members]
            groups = groups or any(is_named([tensor], keep.pattern) for tensor in members)
        asked = [
            keep.weight_bits is not None and weights,
            keep.activation_bits is not None and tensors,
            (keep.prune is not None or keep.least is not None) and (groups or tensors),
        ]
        if not any(asked):
            return False
    return True


def reached(method: str, cost: CostModel, x: Tensor, budget: Budget, space: SpaceSettings) -> dict[str, float] | None:
    """The least shares that a method reports; None if it meets the budget."""
    try:
        methods()[method].search(Problem.of(cost, budget, (x,), space), Run())
    except InfeasibleBudget as error:
        return error.least
    return None


def relaxed(space: SpaceSettings, binding: str) -> SpaceSettings:
    """Settings without what an error says binds: a constraint, or a field."""
    for keep in space.constraints:
        if binding.startswith(f"{keep} "):
            return space.model_copy(update={"constraints": tuple(k for k in space.constraints if k != keep)})
    if binding.startswith("Keep(place='ends', weight_bits=8, activation_bits=8)"):
        every = Keep(place="ends", weight_bits=space.candidates, activation_bits=space.candidates)
        return space.model_copy(update={"constraints": (every, *space.constraints)})
    (name,) = re.findall(r"(\w+)=", binding.partition(" (without")[0])
    looser = {"quantise": True, "prune": True, "minor_groups": True, "inner_only": False, "weight_bits": None}
    looser |= {"activation_bits": None, "round_to": 1, "block": 1, "candidates": tuple(sorted({2, *space.candidates}))}
    return space.model_copy(update={name: looser[name]})


@pytest.mark.parametrize("method", ["uniform", "opq"])
@settings(max_examples=8)
@given(networks(max_blocks=2), st.data())
def test_drawn_constraints_are_obeyed(method: str, recipe: Recipe, data: st.DataObject) -> None:
    module, x = recipe.build(), recipe.example(2)
    cost = cost_of(module, x)
    space = data.draw(spaces(cost))
    measure = data.draw(st.sampled_from(["bops", "size", "macs"]))
    budget = Budget(**{measure: data.draw(st.sampled_from([0.02, 0.1, 0.3, 0.7, 1.0]))})
    if not matches_something(cost, space):
        return
    config = sbs_fx.Config(**space.model_dump())
    try:
        result = sbs_fx.compress(module, x, budget=budget, method=method, config=config)
    except InfeasibleBudget as error:
        check_binding(method, cost, x, space, error, measure)
        return
    assert budget.is_satisfied_by(result.cost)
    check_obeyed(result, cost, space)
    assert torch.isfinite(result.model(x)).all()


@settings(max_examples=8)
@given(networks(max_blocks=2), st.data())
def test_every_corner_of_a_drawn_space_obeys(recipe: Recipe, data: st.DataObject) -> None:
    """The least, the most and what lies between; and a budget below the least says what binds."""
    x = recipe.example(2)
    cost = cost_of(recipe.build(), x)
    space = data.draw(spaces(cost))
    if not matches_something(cost, space):
        with pytest.raises(
            ConstraintError, match=r"matches nothing of this model; the nearest names are '.*'; its kinds"
        ):
            Space(cost.groups, cost, space)
        return
    corners = Space(cost.groups, cost, space)
    for plan in (corners.least, corners.most, corners.plan(4, 6), corners.plan(32, 2)):
        check_plan(cost, space, plan)
    least = cost.price(corners.least)
    assert all(value <= cost.price(corners.most)[measure] for measure, value in least.items())
    budget = Budget(bops=max(least["bops"] * 0.9 / cost.whole["bops"], 1e-9))
    for method in ("uniform", "opq"):
        with pytest.raises(InfeasibleBudget) as caught:
            methods()[method].search(Problem.of(cost, budget, (x,), space), Run())
        check_binding(method, cost, x, space, caught.value, "bops")


def check_binding(
    method: str, cost: CostModel, x: Tensor, space: SpaceSettings, error: InfeasibleBudget, measure: str
) -> None:
    """Each thing that is said to bind can be given up, and then less can be reached."""
    least = error.least[measure]
    assert least > 0
    impossible = Budget(**{measure: 1e-9})
    for binding in error.binding:
        looser = relaxed(space, binding)
        assert looser != space
        fewer = reached(method, cost, x, impossible, looser)
        assert fewer is not None
        assert fewer[measure] < least, binding


CODES = {"x", "relu_joined", "max_pool2d", "conv2d_1_joined", "relu_1_joined", "max_pool2d_1", "relu_2_joined", "mean"}


@pytest.mark.parametrize(
    ("pattern", "floats", "codes"),
    [
        ("none", set(), set()),
        ("a", {"x"}, set()),
        ("b", {"relu_joined", "max_pool2d"}, {"max_pool2d_joined"}),  # which the add alone reads
        ("c", {"conv2d_1_joined", "relu_1_joined", "max_pool2d_1"}, set()),
        ("head", {"relu_2_joined", "mean"}, set()),
        ("*", CODES, set()),
    ],
)
def test_what_a_layer_reads_in_float_is_rounded_nowhere(pattern: str, floats: set[str], codes: set[str]) -> None:
    """Not by pools, joins and means on the way to it either."""
    torch.manual_seed(0)
    module, x = Pooled().eval(), torch.randn(2, 3, 32, 32)
    keep = () if pattern == "none" else (Keep(pattern, activation_bits=32),)
    config = sbs_fx.Config(constraints=keep, weight_bits=8, activation_bits=8)
    result = sbs_fx.compress(module, x, budget=1.0, method="uniform", config=config)
    check_obeyed(result, cost_of(module, x), config)
    assert static_of(result.model).activations.keys() == CODES - floats | codes
    assert len(list(result.model.graph.find_nodes(op="call_function", target=QUANTIZE))) == len(CODES - floats | codes)


# Every method


SPACES: dict[str, tuple[Budget, dict[str, Any]]] = {
    "float and narrow": (
        Budget(size=0.2),
        {
            "constraints": (
                Keep(place="ends", weight_bits=4, activation_bits=(4, 8)),
                Keep("0", weight_bits=32, activation_bits=32, least=0.6),
                Keep("3", weight_bits=(3, 6)),
            )
        },
    ),
    "all channels": (Budget(bops=0.03), {"prune": False, "constraints": (Keep(kind="linear", weight_bits=(2, 3)),)}),
    "channels alone": (Budget(macs=0.6), {"quantise": False, "constraints": (Keep("8", prune=False),)}),
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("method", ["two_stage", "ajpq", "sbs", "prune_then_quantise", "multi_path", "bayesian_bits"])
def test_every_method_obeys(method: str, name: str) -> None:
    budget, fields = SPACES[name]
    config = sbs_fx.Config(**QUICK, **fields)

    def compressed() -> sbs_fx.Result:
        return sbs_fx.compress(net(), EXAMPLE, budget=budget, data=batches(2), method=method, config=config)

    if not config.quantise and method in ("multi_path", "ajpq"):
        with pytest.raises(InputError, match="quantise=False"):
            compressed()
        return
    result = compressed()
    assert budget.is_satisfied_by(result.cost)
    check_obeyed(result, cost_of(net(), EXAMPLE), config)


@pytest.mark.parametrize("candidates", [(3, 6), (2, 4, 8, 32), (8,)])
@pytest.mark.parametrize("method", methods())
def test_other_candidates(method: str, candidates: tuple[int, ...]) -> None:
    config = sbs_fx.Config(candidates=candidates, round_to=4, **QUICK)
    share = 0.07 if candidates == (8,) and method == "multi_path" else 0.05
    result = sbs_fx.compress(net(), EXAMPLE, budget=share, data=batches(2), method=method, config=config)
    assert result.cost.bops <= share * result.baseline_cost.bops
    check_obeyed(result, cost_of(net(), EXAMPLE), config)


# A budget of time


class FakeTiming:
    """Seconds of a machine that needs one for each channel product, and none for what is no layer."""

    float_seconds, rest, multiple = 0.0, (1.0, 0.0, 0.0), 4

    def seconds(self, layer: Any, of_axis: Any) -> Any:
        total: Any = 0.0
        for outputs, inputs, positions in layer.sizes(of_axis):
            total = total + outputs * inputs * (1e-3 * positions)
        return total


def timed(cost: CostModel) -> CostModel:
    timing = FakeTiming()
    result = CostModel(cost.groups, timing)
    result.whole["latency"] = 2 * result.price(Space(cost.groups, result).most)["latency"]
    return result


@pytest.mark.parametrize("method", ["prune_then_quantise", "sbs", "uniform", "opq", "two_stage"])
def test_a_budget_of_time(method: str) -> None:
    """Of a fake machine, as real times of so small a network are mostly noise; bits under a limit of their own."""
    cost = timed(cost_of(net(), EXAMPLE))
    assert isinstance(cost.polynomials["latency"], Polynomial)
    settings_ = QUICK.get(methods()[method].section or method)
    for budget in (Budget(latency=0.4), Budget(latency=0.4, bops=0.03)):
        problem = Problem.of(cost, budget, (EXAMPLE,))
        plan = methods()[method].search(problem, Run(batches(2), settings_)).plan
        assert problem.fits(plan)
        price = cost.price(plan)
        assert price["latency"] <= 0.4 * cost.whole["latency"]
        assert all(price[measure] <= share * cost.whole[measure] for measure, share in budget.limits.items())
        assert any(len(kept) < cost.groups[name].size for name, kept in plan.kept.items())
        problem.policy(plan, method).check(
            cost.groups.fingerprint, {g.name: g.size for g in cost.groups.values()}, cost.weights, cost.activations
        )
