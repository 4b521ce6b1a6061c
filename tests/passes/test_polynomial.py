"""The cost as one value: a plan's price is the walk over the layers and the count on the slim graph; gradients, slopes,
tables and sympy are readings of the same polynomial; whole numbers stay exact however large."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbs_fx.passes import CostModel, channel_groups, cost_model, slim
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.slim import slim_bits
from sbs_fx.passes.cost.polynomial import Polynomial, Together, Variable
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import PolicyError
from tests.networks.models import Recipe, networks
from tests.networks.small import Residual
from tests.oracles.problems import cost_of

BITS = (2, 3, 4, 5, 6, 8)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MEASURES = ("bops", "macs", "size", "params")


def drawn(cost: CostModel, seed: int, *, by_channel: bool = True) -> Plan:
    """Any channels of any group; bits of any weight or tensor, a third of the weights by channel, zeros among them."""
    rng = random.Random(seed)
    kept = {g.name: tuple(sorted(rng.sample(range(g.size), rng.randint(1, g.size)))) for g in cost.groups.values()}
    weight_bits: dict[str, Any] = {name: rng.choice((*BITS, 32)) for name in cost.weights}
    for name in cost.weights:
        if by_channel and rng.random() < 1 / 3:
            weight_bits[name] = tuple(rng.choice((0, *BITS)) for _ in range(d.resolve(cost.groups.outputs[name]).size))
    return Plan(kept, weight_bits, {name: rng.choice((*BITS, 32)) for name in cost.activations})


def measured(cost: CostModel, plan: Plan) -> dict[str, float]:
    return {m: v for m, v in cost.evaluate(plan).by_measure.items() if m in MEASURES}


def counted(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def residual() -> CostModel:
    torch.manual_seed(0)
    return cost_of(Residual(), IMAGES)


# One cost, in three ways


@settings(max_examples=16)
@given(networks(max_blocks=3), st.integers(0, 2**32 - 1))
def test_price_walk_and_slim_graph_agree(recipe: Recipe, seed: int) -> None:
    """Exactly: of the plan by the polynomials, layer by layer, and with nothing pruned in the graph that it leaves."""
    cost = cost_of(recipe.build(), recipe.example(2))
    assert cost.price(Plan()) | {"size": 0} == measured(cost, Plan()) | {"size": 0}
    for turn in range(3):
        plan = drawn(cost, seed + turn)
        price = cost.price(plan)
        assert price == measured(cost, plan)
        assert all(isinstance(value, int) for value in price.values())
    if cost.groups.inference.adapters:
        return  # reason: behind an operator that runs at full width, layers read other tensors
    slimmed = slim(cost.groups.inference.graph_module, cost.groups, plan.kept)
    if counted(cost.groups.inference.graph_module) == cost.whole["params"]:  # no weight is computed from several
        assert counted(slimmed) == price["params"]
    after = cost_model(slimmed, channel_groups(slimmed))
    rest = Plan({}, slim_bits(cost.groups, plan), plan.activation_bits)
    assert after.price(rest)["macs"] == price["macs"]
    assert after.price(rest)["bops"] == price["bops"]


def test_price_of_a_plan_by_hand() -> None:
    """A convolution whose channels have bits of their own, and a linear layer, with nothing else in the file."""
    cost = cost_of(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Conv2d(4, 2, 1, bias=False)), IMAGES
    )
    plan = Plan({"0.weight:0": (0, 2, 3)}, {"0": (2, 8, 0, 3), "1": 32}, {"input_1": 4, "conv2d": 8})
    assert list(cost.activations) == ["input_1", "conv2d"]
    first, second = 30 * 30 * 9 * 3, 30 * 30 * 3 * 2
    assert cost.price(plan) == {
        "macs": 3 * first + second,
        "bops": first * (2 + 0 + 3) * 4 + second * 32 * 8,
        "params": 27 * 3 + 3 * 2,
        "size": 27 * (2 + 0 + 3) + 3 * (32 + 16) + 6 * 32,  # codes, a scale and a place for each channel; floats
    }
    assert cost.price(plan) == measured(cost, plan)
    means = [(layer.weight_bits, layer.activation_bits) for layer in cost.evaluate(plan).layers]
    assert means == [(5 / 3, 4), (32, 8)]
    # a mean of 11/4 bits over four channels of 27 weights each comes to whole bits
    assert cost.price(Plan({}, {"0": (2, 3, 3, 3)}))["size"] == 27 * 11 + 4 * (32 + 16) + 8 * 32


@pytest.mark.parametrize("given_bits", [(8, 8), (8,) * 11, (8,) * 17, ()])
def test_bits_by_channel_are_those_of_the_float_model(residual: CostModel, given_bits: tuple[int, ...]) -> None:
    plan = Plan({name: tuple(range(8)) for name in residual.groups}, {"stem": given_bits})
    for read in (residual.price, residual.evaluate):
        with pytest.raises(
            PolicyError, match=rf"{len(given_bits)} bitwidths for the weight 'stem'; expected .* 16 out"
        ):
            read(plan)


def test_names_that_the_model_has_not_are_refused_with_the_nearest(residual: CostModel) -> None:
    (group, *_), (weight, *_) = residual.groups, residual.weights
    for plan, said in (
        (Plan({f"{group}_": [0]}), f"no channel group '{group}_'; it has '{group}'"),
        (Plan(weight_bits={f"{weight}s": 4}), f"no weight '{weight}s'; it has '{weight}'"),
        (Plan(activation_bits={"y": 4}), "no activation tensor 'y'; it has '"),
    ):
        with pytest.raises(PolicyError, match=said):
            residual.price(plan)


def test_single_weights_are_counted(residual: CostModel) -> None:
    bits = {"left": 4, "inner": 3}
    dense, sparse = Plan({}, bits), Plan({}, bits, {}, {"left": 100, "inner": 7})
    saved = sum(2304 * b - 2304 - n * b for b, n in ((4, 100), (3, 7)))
    assert residual.price(dense)["size"] - residual.price(sparse)["size"] == saved
    assert residual.price(sparse) == measured(residual, sparse)
    for wrong in (32, (4,) * 16):
        with pytest.raises(PolicyError, match="expected one bitwidth below 32"):
            residual.price(Plan({}, {"left": wrong}, {}, {"left": 100}))


# Other readings


@settings(max_examples=8)
@given(networks(max_blocks=2), st.integers(0, 2**32 - 1))
def test_gradients_are_slopes_and_finite_differences(recipe: Recipe, seed: int) -> None:
    cost = cost_of(recipe.build(), recipe.example(2))
    plan = drawn(cost, seed, by_channel=False)
    x, _ = cost.values(plan)

    def leaves(values: Any) -> dict[str, torch.Tensor]:
        return {n: torch.tensor(float(v), dtype=torch.float64, requires_grad=True) for n, v in values.items()}

    kept = leaves({n: len(k) for n, k in plan.kept.items()})
    weights, activations = leaves(plan.weight_bits), leaves(plan.activation_bits)
    soft = cost.expected(kept, weights, activations)
    named: list[tuple[Any, str, torch.Tensor]] = [("channels", n, t) for n, t in kept.items()]
    named += [("weight", n, t) for n, t in weights.items()] + [("activation", n, t) for n, t in activations.items()]
    for measure in MEASURES:
        # reason: which channels an operator at full width gathers is stored only where some of them go
        adapters = cost._adapters(plan) if measure == "size" else 0
        assert float(soft[measure].detach()) == cost.price(plan)[measure] - adapters
        slopes = cost.polynomials[measure].slopes(x)
        if not soft[measure].requires_grad:  # reason: a single layer has MACs, but none that could go
            assert not slopes[[cost.number[Variable(kind, name)] for kind, name, _ in named]].any()
            continue
        grads = torch.autograd.grad(soft[measure], [t for *_, t in named], allow_unused=True, retain_graph=True)
        for (kind, name, _), grad in zip(named, grads, strict=True):
            number = cost.number[Variable(kind, name)]
            assert (0.0 if grad is None else float(grad)) == pytest.approx(slopes[number], rel=1e-9)
    # of whole numbers the central difference of a square is exact; no cost has a third power of one variable
    draw = random.Random(seed)
    for measure in MEASURES:
        polynomial = cost.polynomials[measure]
        for number in draw.sample(range(len(x) - 1), min(8, len(x) - 1)):
            more, less = x.copy(), x.copy()
            more[number], less[number] = x[number] + 1, x[number] - 1
            if max((key.count(number) for key in polynomial.terms), default=0) <= 2:
                difference = (polynomial(more) - polynomial(less)) / 2
                assert polynomial.slopes(x)[number] == pytest.approx(difference, rel=1e-9)


@settings(max_examples=8)
@given(networks(max_blocks=2), st.integers(0, 2**32 - 1))
def test_sympy_reads_the_same(recipe: Recipe, seed: int) -> None:
    cost = cost_of(recipe.build(), recipe.example(2))
    # reason: the places of mixed channels, and what adapters store, are no polynomials
    whole = not any(cost.groups.inference.adapters)
    for by_channel, measures in ((True, ("macs", "bops")), (False, MEASURES if whole else ("macs", "bops"))):
        plan = drawn(cost, seed, by_channel=by_channel)
        x, over = cost.values(plan)
        divisors = np.ones_like(x) if over is None else over
        symbols = [sympy.Symbol(f"x{i}") for i in range(len(x))]
        values = {s: sympy.Rational(int(n), int(m)) for s, n, m in zip(symbols, x, divisors, strict=True)}
        for measure in measures:
            expression = cost.polynomials[measure].substituted(symbols.__getitem__)
            exact = sympy.sympify(expression).subs(values)
            assert sympy.ceiling(exact) == cost.price(plan)[measure]


@settings(max_examples=8)
@given(networks(max_blocks=2), st.integers(0, 2**32 - 1))
def test_tables_are_evaluations(recipe: Recipe, seed: int) -> None:
    """Bits as decisions, one or two in each product; the rest of the plan stays."""
    cost = cost_of(recipe.build(), recipe.example(2))
    plan, rng = drawn(cost, seed, by_channel=False), random.Random(seed)
    choices = {
        (kind, name): tuple(sorted(rng.sample((*BITS, 32), rng.randint(1, 4))))
        for kind, table in (("weight", cost.weights), ("activation", cost.activations))
        for name in table
        if rng.random() < 0.7
    }
    moved = [cost.moved(kind, name, values) for (kind, name), values in choices.items()]
    x, _ = cost.values(plan)
    for measure in MEASURES:
        tables = cost.polynomials[measure].tables(x, moved)
        for _ in range(4):
            at = [rng.randrange(len(values)) for values in choices.values()]
            other = plan
            for ((kind, name), values), k in zip(choices.items(), at, strict=True):
                other = other.with_value(kind, name, values[k])
            total = tables.constant + sum(single[at[i]] for i, single in tables.single.items())
            total += sum(pair[at[i], at[j]] for (i, j), pair in tables.pairs.items())
            assert total == cost.evaluate(other).by_measure[measure]


def test_tables_of_more_than_two_decisions_are_refused() -> None:
    cube = Polynomial.variable(0) * Polynomial.variable(1) * Polynomial.variable(2)
    with pytest.raises(ValueError, match="3 decisions in one product"):
        cube.tables(np.ones(4), [{i: np.array([1.0, 2.0])} for i in range(3)])


def test_a_decision_that_moves_two_factors_of_a_product() -> None:
    """3 x y with x and y of one decision, its square with one of them twice, and twice the first alone."""
    x, y = Polynomial.variable(0), Polynomial.variable(1)
    decision = {0: np.array([1.0, 2.0, 4.0]), 1: np.array([5.0, 3.0, 1.0])}
    tables = (3 * x * y + x * x + 2 * x).tables(np.ones(3), [decision])
    assert tables.constant == 0
    assert tables.single[0].tolist() == [3 * 5 + 1 + 2, 3 * 2 * 3 + 4 + 4, 3 * 4 + 16 + 8]
    assert not tables.pairs


# Numbers


def vector(values: list[int]) -> Any:
    """As polynomials take them: a 1 behind the variables."""
    return np.array([*values, 1], float)


@given(
    st.dictionaries(
        st.lists(st.integers(0, 3), max_size=4).map(lambda key: tuple(sorted(key))), st.integers(0, 2**40), max_size=6
    ),
    st.lists(st.integers(0, 2**16), min_size=4, max_size=4),
    st.lists(st.integers(1, 2**10), min_size=4, max_size=4),
)
def test_whole_numbers_stay_exact(terms: dict[tuple[int, ...], int], x: list[int], over: list[int]) -> None:
    """Whatever their size, above 2^53 too; of means, the sum is rounded up once."""
    polynomial = Polynomial(terms)
    by_hand = sum(c * math.prod(x[i] for i in key) for key, c in terms.items())
    assert polynomial(vector(x)) == by_hand
    exact = sum(
        (Fraction(c) * math.prod(Fraction(x[i], over[i]) for i in key) for key, c in terms.items()), Fraction(0)
    )
    assert polynomial(vector(x), vector(over)) == math.ceil(exact)


def test_a_network_of_more_than_2_to_the_53_stays_exact() -> None:
    """8.4 million times 8.4 million channels of a linear layer, as counts alone: nothing of that size is allocated."""
    cost = cost_of(
        torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), torch.randn(2, 3)
    )
    x, _ = cost.values(Plan({}, {"1": 3}, {"linear": 5}))
    first, second = (cost.number[Variable("channels", name)] for name in ("0.weight:0", "1.weight:0"))
    x[first], x[second] = 2**23 + 1, 2**23 - 1
    exact = (2**23 + 1) * (2**23 - 1)
    assert cost.polynomials["macs"](x) == exact + 3 * (2**23 + 1) + 2 * (2**23 - 1)
    assert cost.polynomials["bops"](x) == 15 * exact + 1024 * (3 * (2**23 + 1) + 2 * (2**23 - 1))


def test_together_they_stay_exact_where_only_one_is_large() -> None:
    a, b = Polynomial.variable(0), Polynomial.variable(1)
    assert Together([a, a * b])(vector([2**27 + 1, 2**27 - 1])) == [2**27 + 1, 2**54 - 1]


def test_arithmetic_of_polynomials() -> None:
    a, b = Polynomial.variable(0), Polynomial.variable(1)
    product = (a + 2) * (b * a + 3) * 2
    assert product.terms == {(0, 0, 1): 2, (0,): 6, (0, 1): 4, (): 12}
    assert product.is_exact
    assert product(vector([5, 7])) == (5 + 2) * (5 * 7 + 3) * 2
    assert product.slopes(vector([5, 7])).tolist()[:2] == [2 * (2 * 5 * 7 + 3 + 2 * 7), 2 * (25 + 2 * 5)]
    assert ((a + b) * (a + b)).terms == {(0, 0): 1, (0, 1): 2, (1, 1): 1}
    seconds = product * 0.5
    assert not seconds.is_exact
    assert not (a * 0.5 + b).is_exact, "one coefficient is enough"
    assert seconds(vector([5, 7]), vector([2, 1])) == (2.5 + 2) * (2.5 * 7 + 3)
    assert Polynomial({})(vector([])) == 0
