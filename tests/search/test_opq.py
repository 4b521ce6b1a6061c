"""One-shot allocation: closed forms against integrals, allocations against numerical optimisers, sizes against a coder;
budgets are met and landed under; bad weights."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor, nn

from benchmarks._cifar_models import CifarResNet
from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.passes import CostModel, apply_bits, finalize, insert_gates, slim
from sbs_fx.passes.channels.slim import slim_bits
from sbs_fx.passes.graph import with_tensors
from sbs_fx.plan import Budget, Policy
from sbs_fx.plan.errors import InfeasibleBudget, WeightsError
from sbs_fx.quantizer.grid import max_level
from sbs_fx.search import Opq, Run, SearchResult, opq, uniform
from sbs_fx.search.solvers.lagrangian import Decision, Load, Polynomial, minimise
from sbs_fx.search.solvers.laplace import (
    laplace_fit,
    least_rounding_error,
    pruned_share,
    pruning_error,
    rounding_error,
)
from sbs_fx.search.sparse import SingleWeights, largest, single_weights, weight_tensors
from sbs_fx.training import Training, train
from sbs_fx.training.frozen import FrozenMasks
from tests.oracles.problems import cost_of, even_plan, problem_of

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ALLOCATION = Opq(shifts_norms=False)


@pytest.fixture(scope="module")
def resnet() -> CostModel:
    torch.manual_seed(0)
    return cost_of(CifarResNet(20, padded_shortcuts=True), IMAGES)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def allocated(cost: CostModel, budget: Budget, settings: Opq | None = None, **space: Any) -> SearchResult:
    return opq(problem_of(cost, IMAGES, budget, **space), Run(settings=settings))


def realised(cost: CostModel, found: SearchResult, x: Tensor = IMAGES) -> Any:
    groups, plan = cost.groups, found.plan
    graph = with_tensors(groups.inference.graph_module, found.tensors)
    gated = insert_gates(slim(graph, groups, plan.kept), groups, channels=False)
    apply_bits(gated, slim_bits(groups, plan), plan.activation_bits)
    calibrate(gated, None, inputs=(x,))
    return gated


def weights_of(found: SearchResult) -> dict[str, Tensor]:
    return {n: t for n, t in found.tensors.items() if t.ndim > 1}


# The density


@pytest.mark.parametrize("t", [0.0, 0.3, 1.7, 6.0])
def test_pruning_is_the_integral_of_the_density(t: float) -> None:
    assert pruned_share(t) == pytest.approx(quad(lambda w: math.exp(-w), 0, t)[0])
    assert pruning_error(t) == pytest.approx(quad(lambda w: w * w * math.exp(-w) / 2, 0, t)[0])


@pytest.mark.parametrize(("t", "d", "levels"), [(0.0, 1.4, 1), (0.8, 0.5, 7), (2.3, 0.4, 7), (5.0, 0.3, 3)])
def test_rounding_is_the_integral_of_the_density(t: float, d: float, levels: int) -> None:
    def squared(w: float) -> float:
        return (w - min(math.floor(w / d + 0.5), levels) * d) ** 2 * math.exp(-w) / 2

    edges = sorted({t, *((k + 0.5) * d for k in range(levels) if (k + 0.5) * d > t), 60.0})
    expected = sum(quad(squared, a, b)[0] for a, b in itertools.pairwise(edges))
    assert float(rounding_error(t, d, levels)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_best_step_is_that_of_a_numerical_optimiser(bits: int) -> None:
    levels = max_level(bits, signed=True)
    tried = rounding_error(0.0, np.geomspace(0.01, 3, 2000), levels)
    assert least_rounding_error(levels) <= tried.min() * (1 + 1e-9)
    weight = torch.distributions.Laplace(0.0, 0.3).sample((200_000,))
    assert laplace_fit(weight) == pytest.approx(1, abs=0.03)


# Allocation of single weights


def optimised(counts: Any, worth: Any, size: float, bits: Any, *starts: Any) -> tuple[float, Any]:
    """Least damage at a total size over continuous thresholds, bits fixed, by sequential quadratic programming; from
    several starts."""
    n = np.array(counts)

    def errors(t: Any) -> Any:
        return pruning_error(t) + [_rounding(x, b) for x, b in zip(t, bits, strict=True)]

    def sizes(t: Any) -> Any:
        return np.array([1 + math.exp(-x) * b for x, b in zip(t, bits, strict=True)])

    constraint = {"type": "ineq", "fun": lambda t: (size - n @ sizes(t)) / n.sum()}
    best = None
    for start in (np.full(len(n), 0.4), np.full(len(n), 1.0), np.full(len(n), 2.0), *starts):
        done = minimize(
            lambda t: float(np.array(worth) @ errors(t)),
            start, bounds=[(0.2, 8)] * len(n), constraints=[constraint], tol=1e-10,
        )  # fmt: skip
        if done.success and (best is None or done.fun < best.fun):
            best = done
    return (math.inf, None) if best is None else (best.fun, best.x)


@functools.cache
def _table(bits: int) -> Any:
    """Least rounding error over steps at some thresholds, by another optimiser, as a smooth curve."""
    at = np.linspace(0, 8.5, 120)
    levels = max_level(bits, signed=True)
    found = []
    for t in at:
        bounds = (1e-3 / levels, (t + 12) / levels)
        steps = np.linspace(*bounds, 60)[1:]
        near = steps[int(rounding_error(t, steps, levels).argmin())]
        around = (near - bounds[1] / 60, near + bounds[1] / 60)
        found.append(minimize_scalar(lambda d, t=t: float(rounding_error(t, d, levels)), bounds=around).fun)
    return CubicSpline(at, found)


def _rounding(t: float, bits: int) -> float:
    return float(_table(bits)(t))


def laplace(count: int, scale: float, seed: int) -> Tensor:
    """A weight of that density, without chance: its quantiles, in disorder."""
    places = (torch.arange(count) + 0.5) / count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.distributions.Laplace(0.0, scale).icdf(places)[order]


def allocated_singly(weights: list[Tensor], worth: list[float], bits: tuple[int, ...], limit: float) -> Any:
    """(choices of each weight, what was chosen) of least damage within a size."""
    each = [single_weights(w, bits) for w in weights]
    decisions = [
        Decision({i: np.array(e.stored, float)}, c * e.damage) for i, (e, c) in enumerate(zip(each, worth, strict=True))
    ]
    size = sum((Polynomial.variable(i) for i in range(len(each))), start=Polynomial({}))
    chosen = minimise(decisions, Load([size], [limit], np.array([0.0] * len(each) + [1.0]), decisions))
    assert chosen is not None
    return each, chosen


@pytest.mark.parametrize("seed", range(3))
def test_allocation_is_a_numerical_optimisers(seed: int) -> None:
    """Laplace tensors of other sizes and worths: no bits and thresholds are better, to the distance of the tabulated
    ones."""
    draw = np.random.default_rng(seed)
    weights = [laplace(int(n), 0.1, i) for i, n in enumerate(draw.integers(1000, 50_000, 3))]
    worth = [float(len(w) * draw.uniform(0.7, 1.5)) for w in weights]
    limit = 3.0 * sum(map(len, weights))
    each, chosen = allocated_singly(weights, worth, (2, 4, 8), limit)
    size = sum(e.stored[k] for e, k in zip(each, chosen, strict=True))
    damage = sum(c * e.damage[k] for e, c, k in zip(each, worth, chosen, strict=True))
    assert 0.999 * limit <= size <= limit
    args = ([len(w) for w in weights], worth, size)
    least = min(optimised(*args, bits)[0] for bits in itertools.product((2, 4, 8), repeat=3))
    assert least * (1 - 1e-3) <= damage <= least * 1.01


def test_one_global_threshold_where_worth_is_the_squared_norm() -> None:
    """c_i = 1, that is worth 2 b^2 N: without rounding, the optimum prunes below one value in all layers; with codes of
    8 bits it does so to the error of rounding and to the distance of the tabulated thresholds."""
    scales = (0.01, 0.015, 0.02)
    weights = [laplace(10_000, b, i) for i, b in enumerate(scales)]
    each, chosen = allocated_singly(weights, [2 * b * b * 10_000 for b in scales], (8,), 30_000 * 5.0)
    values = [-math.log(e.nonzeros[k] / 10_000) * b for e, k, b in zip(each, chosen, scales, strict=True)]
    assert max(values) < 1.1 * min(values)


def test_choices_of_single_weights_are_worth_their_size() -> None:
    weight = laplace(4000, 0.1, 0)
    weight[:100] = 0
    each: SingleWeights = single_weights(weight, (2, 4, 8, 32))
    assert list(each.stored) == sorted(set(each.stored))
    assert (np.diff(each.damage) < 0).all()
    assert (each.bits[-1], each.nonzeros[-1], each.stored[-1], each.damage[-1]) == (32, 0, 4000 * 32, 0.0)
    for bits, count, stored in zip(each.bits, each.nonzeros, each.stored, strict=True):
        assert 0 <= count <= 3900
        assert stored == (4000 + count * bits if count else 4000 * bits)
        if count:
            assert int(torch.count_nonzero(largest(weight, count))) == count


# Stored size


def encoded(mask: Tensor, codes: Tensor, bits: int) -> str:
    """An independent coder: which weights stay, and the codes of those that do."""
    text = "".join("1" if m else "0" for m in mask.tolist())
    return text + "".join(f"{c:0{bits}b}" for c in codes[mask].tolist())


def decoded(text: str, bits: int, total: int) -> list[int]:
    codes = iter(range(total, len(text), bits))
    return [int(text[(k := next(codes)) : k + bits], 2) if kept == "1" else 0 for kept in text[:total]]


@pytest.mark.parametrize("count", [1, 20, 1500, 3400, 3456])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_stored_size_is_what_a_coder_writes(count: int, bits: int) -> None:
    cost = cost_of(plain(), IMAGES)
    mask = (largest(weight_tensors(cost)["3"], count) != 0).flatten()
    codes = torch.randint(1, 2**bits, mask.shape) * mask
    text = encoded(mask, codes, bits)
    assert decoded(text, bits, len(mask)) == codes.tolist()
    dense = replace(even_plan(cost, bits, 8), nonzeros={})
    sparse = replace(dense, nonzeros={"3": count})
    (row,) = (layer for layer in cost.evaluate(sparse).layers if layer.name.startswith("3 "))
    assert row.stored_bits == len(text)
    assert cost.evaluate(dense).stored_bits - cost.evaluate(sparse).stored_bits == len(mask) * bits - len(text)
    assert cost.price(sparse)["size"] == cost.evaluate(sparse).stored_bits
    assert problem_of(cost, IMAGES, Budget(size=1.0)).price(sparse) == {"size": cost.evaluate(sparse).stored_bits}


# One multiplier over decisions that multiply


def test_the_polynomials_are_the_cost_model(resnet: CostModel) -> None:
    problem = problem_of(resnet, IMAGES, Budget(bops=0.1, size=0.5, macs=0.7), round_to=1)
    choices_ = problem.space.choices
    decisions = [Decision(resnet.moved(c.kind, c.name, c.values), np.zeros(len(c.values))) for c in choices_]
    polynomials = [resnet.polynomials[measure] for measure in problem.limits]
    start = resnet.values(problem.space.most)[0]
    load = Load(polynomials, list(problem.limits.values()), start, decisions)
    draw = np.random.default_rng(0)

    def at(places: list[int]) -> tuple[Any, list[float]]:
        """Values of all variables, and what the walk over the layers gives."""
        plan, x = problem.space.most, start.astype(float)
        for choice, decision, k in zip(choices_, decisions, places, strict=True):
            value: Any = choice.values[k]
            plan = plan.with_value(choice.kind, choice.name, range(value) if choice.kind == "channels" else value)
            for number, values in decision.values.items():
                x[number] = values[k]
        price = resnet.evaluate(plan).by_measure
        return x, [price[measure] for measure in problem.limits]

    for _ in range(5):
        places = [int(draw.integers(len(choice.values))) for choice in choices_]
        x, expected = at(places)
        np.testing.assert_allclose(load(x), expected, rtol=1e-9)
        i = int(draw.integers(len(choices_)))
        along = load.along(x, i, decisions[i], places[i], load(x))
        for k in range(len(choices_[i].values)):
            np.testing.assert_allclose(along[:, k], at([*places[:i], k, *places[i + 1 :]])[1], rtol=1e-9)


# Budgets


@settings(max_examples=15)
@given(st.floats(0.012, 1.0), st.sampled_from(["bops", "size", "macs", "both"]))
def test_a_budget_is_never_exceeded(resnet: CostModel, share: float, measure: str) -> None:
    share = share if measure == "bops" else max(share, 0.16)
    budget = Budget(bops=share, size=share) if measure == "both" else Budget(**{measure: share})
    policy = problem_of(resnet, IMAGES, budget).policy(allocated(resnet, budget, ALLOCATION).plan, "opq")
    shares = budget.shares(resnet.evaluate(policy.plan))
    assert all(shares[m] <= limit for m, limit in budget.limits.items())
    assert Policy.from_json(policy.to_json()) == policy
    assert all(len(k) % 8 == 0 for n, k in policy.kept.items() if 8 < policy.sizes[n] != len(k))


@pytest.mark.parametrize(("prunes", "prune"), [("channels", True), ("weights", True), ("channels", False)])
def test_out_of_reach_says_what_is_reachable(resnet: CostModel, prunes: Any, prune: bool) -> None:
    options = Opq(prunes=prunes, shifts_norms=False)
    for measure in ("bops", "size"):
        with pytest.raises(InfeasibleBudget) as caught:
            allocated(resnet, Budget(**{measure: 1e-4}), options, prune=prune)
        least = caught.value.least[measure]
        assert least > 1e-4
        budget = Budget(**{measure: least * 1.01})
        assert budget.is_satisfied_by(resnet.evaluate(allocated(resnet, budget, options, prune=prune).plan))


@pytest.mark.parametrize("share", [0.2, 0.1, 1 / 12, 0.05])
def test_single_weights_meet_a_size_to_a_thousandth(resnet: CostModel, share: float) -> None:
    graph = resnet.groups.inference.graph_module
    found = allocated(resnet, Budget(size=share, bops=0.05), Opq(prunes="weights", shifts_norms=False))
    shares = Budget(size=share).shares(resnet.evaluate(found.plan))
    assert 0.999 * share <= shares["size"] <= share
    assert shares["bops"] <= 0.05
    for name, masked in weights_of(found).items():
        weight = graph.get_parameter(name)
        kept = masked != 0
        assert kept.any()
        assert torch.equal(masked[kept], weight[kept])
        if not kept.all():
            assert weight[kept].abs().min() >= weight[~kept].abs().max()
    assert {f"{n}.weight": k for n, k in found.plan.nonzeros.items()} == {
        n: int(torch.count_nonzero(t)) for n, t in weights_of(found).items()
    }
    static = finalize(realised(resnet, found))
    for name, masked in weights_of(found).items():
        codes = dict(static.named_buffers()).get(name)
        if codes is not None:
            assert not codes[masked == 0].any()


def test_no_damage_model_is_worse_than_uniform(resnet: CostModel) -> None:
    """At one budget, the output is closer to the float network's than under the uniform policy."""
    graph = resnet.groups.inference.graph_module
    x = torch.randn(16, 3, 16, 16)
    for share in (1 / 20, 1 / 40, 1 / 70):
        problem = problem_of(resnet, IMAGES, Budget(bops=share))
        errors = []
        for plan in (opq(problem, Run()).plan, uniform(problem, Run(fine_tunes=True)).plan):
            gated = realised(resnet, SearchResult(plan))
            with torch.no_grad():
                errors.append(float((gated(x) - graph(x)).square().mean()))
        assert errors[0] < 0.7 * errors[1]


def test_several_calls_agree_and_ends_stay_at_eight(resnet: CostModel) -> None:
    for prunes in ("channels", "weights"):
        one, two = (allocated(resnet, Budget(size=0.12), Opq(prunes=prunes)) for _ in range(2))
        assert one.plan == two.plan
        assert all(torch.equal(v, two.tensors[n]) for n, v in one.tensors.items())
        assert {one.plan.weight_bits[n] for n in ("conv1", "fc")} == {8}
    fixed = allocated(resnet, Budget(bops=0.04), ALLOCATION, weight_bits=4, activation_bits=8).plan
    assert set(fixed.weight_bits.values()) == {4, 8}
    assert set(fixed.activation_bits.values()) == {8}


# Fine-tuning


def test_masks_and_steps_are_frozen() -> None:
    cost = cost_of(plain(), IMAGES)
    found = allocated(cost, Budget(size=0.08), Opq(prunes="weights"))
    assert found.plan.nonzeros
    gated = realised(cost, found)
    before = {n: p.detach().clone() for n, p in gated.named_parameters()}
    batches = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 5) for _ in range(4)]
    train(FrozenMasks(gated), batches, epochs=2, lr=0.05, settings=Training(range_lr=0.01, norm_batches=0))
    after = dict(gated.named_parameters())
    for name, masked in weights_of(found).items():
        assert torch.equal(after[name] == 0, masked == 0)
        assert not torch.equal(after[name], before[name])
    assert all(torch.equal(p, before[n]) for n, p in after.items() if n.startswith("weight_gates."))
    assert any(not torch.equal(p, before[n]) for n, p in after.items() if n.startswith("activation_gates."))


# Weights that tell nothing


@pytest.mark.parametrize("prunes", ["channels", "weights"])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_zero_and_constant_weights(prunes: Any, value: float) -> None:
    module = plain()
    with torch.no_grad():
        module[3].weight.fill_(value)
    cost = cost_of(module, IMAGES)
    budget = Budget(size=0.15)
    found = allocated(cost, budget, Opq(prunes=prunes))
    assert budget.is_satisfied_by(cost.evaluate(found.plan))
    assert torch.isfinite(finalize(realised(cost, found))(IMAGES)).all()


def test_non_finite_weights_are_named() -> None:
    cost = cost_of(plain(), IMAGES)
    with torch.no_grad():
        cost.groups.inference.graph_module.get_parameter("3.weight")[0, 0] = torch.nan
    with pytest.raises(WeightsError, match="'3'") as caught:
        allocated(cost, Budget(bops=0.05))
    assert caught.value.names == ("3",)


def test_a_single_layer_has_a_single_choice() -> None:
    cost = cost_of(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), IMAGES)
    assert allocated(cost, Budget(bops=1 / 16)).plan.weight_bits == {"1": 8}
    with pytest.raises(InfeasibleBudget):
        allocated(cost, Budget(bops=1 / 17))


def test_nothing_is_shifted_without_batch_norms() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 3))
    assert not allocated(cost_of(module, IMAGES), Budget(bops=0.05)).tensors
