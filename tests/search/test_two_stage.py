"""The search without training: its estimates against per-sample gradients, its costs against the cost model, its plans
against all plans, and what it does with data and networks that nothing can be learned from."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.passes import CostModel, activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.plan import Budget, Plan
from sbs_fx.plan.errors import DataError, InfeasibleBudget, SettingsError, WeightsError
from sbs_fx.search import Run, SearchResult, TwoStage, two_stage
from sbs_fx.search.allocation import Allocator, Decision
from sbs_fx.search.dynamic_norm import Predictor
from sbs_fx.search.sensitivities import replan
from sbs_fx.search.sensitivity import sensitivity
from sbs_fx.search.two_stage import _levels, evidence_of
from tests.networks.models import SMALLEST, example
from tests.oracles.problems import cost_of, problem_of
from tests.oracles.search_runs import IMAGES, digits, network

SMALL = TwoStage(images=128, judged=64, measured=40, rounds=1)
FEWEST = SMALL.model_copy(update={"measured": 0, "rounds": 0})
BUDGET = Budget(bops=1 / 60)


@pytest.fixture(scope="module")
def trained() -> CostModel:
    module = network().train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for images, labels in digits():
            optimiser.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimiser.step()
    return cost_of(module, IMAGES)


def searched(
    cost: CostModel, budget: Budget = BUDGET, data: Any = None, settings: TwoStage = SMALL, **space: Any
) -> SearchResult:
    data = digits(shuffle=False) if data is None else data
    return two_stage(problem_of(cost, IMAGES, budget, **space), Run(data, settings))


@pytest.fixture(scope="module")
def found(trained: CostModel) -> SearchResult:
    return searched(trained)


def share(cost: CostModel, plan: Plan, measure: str = "bops") -> float:
    return Budget(**{measure: 1.0}).shares(cost.evaluate(plan))[measure]


# What a search decides


def test_budget_ends_and_choice(trained: CostModel, found: SearchResult) -> None:
    plan = found.plan
    assert 0.8 * BUDGET.limits["bops"] <= share(trained, plan) <= BUDGET.limits["bops"]
    names, tensors = list(plan.weight_bits), list(plan.activation_bits)
    assert {plan.weight_bits[names[0]], plan.weight_bits[names[-1]]} == {8}
    assert {plan.activation_bits[tensors[0]], plan.activation_bits[tensors[-1]]} == {8}
    assert not found.tensors
    assert not found.notes, "the data has labels, and the solver ran to its end"
    by_name = {considered.name: considered for considered in found.considered}
    assert {"bits", "bits, greedy", "joint"} <= by_name.keys()
    assert by_name["bits"].proven
    assert by_name["bits"].gap == 0
    assert by_name["bits"].estimated <= by_name["bits, greedy"].estimated + 1e-12
    assert all(0 <= considered.gap < np.inf for considered in found.considered)
    # channels and bits together are never worse than bits alone, on what was measured
    (taken,) = [considered for considered in found.considered if not considered.reason]
    assert taken.predicted is not None
    assert by_name["bits"].predicted is not None
    assert taken.predicted <= by_name["bits"].predicted


def test_the_same_seed_gives_the_same_plan_and_the_graph_stays(trained: CostModel, found: SearchResult) -> None:
    graph = trained.groups.inference.graph_module
    before = {n: t.clone() for n, t in graph.state_dict().items()}
    again = searched(trained)
    assert again.plan == found.plan
    assert again.considered == found.considered
    assert all(torch.equal(t, before[n]) for n, t in graph.state_dict().items())


@pytest.mark.parametrize(
    ("prune", "budget"), [(False, Budget(bops=1 / 60, size=0.14)), (True, Budget(bops=1 / 30, macs=0.6))]
)
def test_limits_hold_together(trained: CostModel, prune: bool, budget: Budget) -> None:
    plan = searched(trained, budget, settings=FEWEST, prune=prune).plan
    assert all(share(trained, plan, m) <= limit for m, limit in budget.limits.items())
    assert prune != all(len(kept) == trained.groups[n].size for n, kept in plan.kept.items())


def test_what_no_choice_can_meet(trained: CostModel) -> None:
    with pytest.raises(InfeasibleBudget, match="the least that method 'two_stage' reaches is bops") as error:
        searched(trained, Budget(bops=1e-5))
    least = error.value.least["bops"]
    assert share(trained, searched(trained, Budget(bops=least), settings=FEWEST).plan) == least
    with pytest.raises(InfeasibleBudget):
        searched(trained, Budget(bops=least * 0.999), settings=FEWEST)


def test_without_labels_predictions_stand_in(trained: CostModel) -> None:
    (note,) = searched(trained, data=[x for x, _ in digits(64)], settings=FEWEST).notes
    assert "no labels" in note


def test_a_network_of_a_first_and_a_last_layer_has_nothing_to_decide() -> None:
    """Both have their bits by convention, and whole channels that must stay leave nothing."""
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    found = searched(cost_of(module, IMAGES), Budget(bops=0.07), [IMAGES], FEWEST, prune=False)
    assert set(found.plan.weight_bits.values()) == set(found.plan.activation_bits.values()) == {8}
    assert found.notes == ("nothing is left to decide: constraints fix every choice",)
    alone = searched(cost_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), IMAGES), Budget(bops=0.07), [IMAGES])
    assert alone.plan.weight_bits == {"1": 8}
    # channels between the two may still go
    pruned = searched(cost_of(module, IMAGES), Budget(bops=0.04), [IMAGES], FEWEST, round_to=1).plan
    assert len(pruned.kept["0.weight:0"]) < 8
    assert set(pruned.weight_bits.values()) == {8}


@pytest.mark.parametrize("name", ["depthwise", "dense", "attention", "tokens-and-back", "lstm", "shared"])
def test_kinds_of_networks(name: str) -> None:
    x = example(name)
    problem = problem_of(SMALLEST[name](), x, Budget(bops=1 / 50))
    plan = two_stage(problem, Run([torch.randn(8, *x.shape[1:])], TwoStage(measured=0, rounds=0))).plan
    assert share(problem.cost, plan) <= 1 / 50


# Data and networks that nothing can be learned from


def test_one_image_zero_weights_and_constant_images(trained: CostModel) -> None:
    options = SMALL.model_copy(update={"measured": 12})
    one = searched(trained, data=[IMAGES[:1]], settings=options)
    assert share(trained, one.plan) <= BUDGET.limits["bops"]
    module = network()
    nn.init.zeros_(module[4].weight)
    zeros = cost_of(module, IMAGES)
    constant = [(torch.zeros(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64))]
    assert share(zeros, searched(zeros, data=constant, settings=options).plan) <= BUDGET.limits["bops"]


def test_gradients_that_are_not_finite_name_the_layer() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x).relu()).mul(0).sqrt().mean((2, 3)))

    with pytest.raises(WeightsError, match="gradient at 'conv2d_1' is NaN or Inf") as error:
        searched(cost_of(Root(), IMAGES), Budget(bops=0.05), [IMAGES], FEWEST)
    assert error.value.names == ("conv2d_1",)


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "no batch"), ([IMAGES * torch.nan], "NaN or Inf"), ([(IMAGES, torch.tensor([1, 99]))], "label 99")],
)
def test_bad_data(trained: CostModel, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        searched(trained, data=data)


def test_bad_settings() -> None:
    with pytest.raises(SettingsError, match="images"):
        TwoStage(images=0)


def test_kept_counts() -> None:
    assert _levels((16, 32, 48, 64), 8) == (64, 48, 32, 16)
    assert _levels((16, 24), 8) == (24, 16)
    assert _levels(tuple(range(16, 513, 16)), 4) == (512, 496, 256, 16)
    assert _levels((8,), 8) == (8,)


# Estimates


def test_estimates_are_those_of_per_sample_gradients(trained: CostModel) -> None:
    groups, cost = trained.groups, trained
    graph = groups.inference.graph_module
    network_ = insert_gates(graph, groups)
    images, labels = next(iter(digits(16)))
    apply_bits(network_, dict.fromkeys(cost.weights, 4), dict.fromkeys(cost.activations, 2))
    calibrate(network_, [images], inputs=(IMAGES,))
    forms = {n: {4: (lambda w, g=g: 0.5 * w)} for n, g in weight_gates(network_).items()}
    tops = {n: float(g.range.detach()) for n, g in activation_gates(network_).items()}
    rounded = {n: {2: (lambda x, top=top: x.clamp(max=top / 2))} for n, top in tops.items()}
    apply_bits(network_, dict.fromkeys(cost.weights, 32), dict.fromkeys(cost.activations, 32))
    both = {"weight": forms, "activation": rounded}
    got = sensitivity(network_, groups, [((images,), labels)], both, prunable=list(groups))

    module = dict(graph.named_parameters())
    wanted_w = dict.fromkeys(forms, 0.0)
    wanted_a = dict.fromkeys(rounded, 0.0)
    rows: list[Tensor] = []
    for x, y in zip(images, labels, strict=True):
        kept: dict[str, Tensor] = {}

        class Keep(torch.fx.Interpreter):
            def run_node(self, n: Any) -> Any:
                result = super().run_node(n)
                if n.name in rounded:
                    result = result if result.requires_grad else result.detach().requires_grad_()
                    result.retain_grad()
                    kept[n.name] = result  # noqa: B023
                return result

        graph.zero_grad()
        loss = F.cross_entropy(Keep(graph).run(x[None]), y[None])
        loss.backward()
        for name in forms:
            weight = module[f"{name}.weight"]
            wanted_w[name] += 0.5 / len(images) * float((weight.grad * -0.5 * weight).sum()) ** 2
        for name, tensor in kept.items():
            step = rounded[name][2](tensor) - tensor
            wanted_a[name] += 0.5 / len(images) * float((tensor.grad * step).sum()) ** 2
        rows.append(_products(kept["max_pool2d"]))
    assert {n: t[4] for n, t in got.bits["weight"].items()} == pytest.approx(wanted_w, rel=1e-3)
    assert {n: t[2] for n, t in got.bits["activation"].items()} == pytest.approx(wanted_a, rel=1e-3)
    # channels: all that is read of them, but for their mean
    first = torch.stack(rows)
    assert got.channels["0.weight:0"].shape == first.shape[:2]
    mean = _means(graph, images)
    for n in range(len(images)):
        assert torch.allclose(got.channels["0.weight:0"][n], -(first[n, :, 0] - mean * first[n, :, 1]), atol=1e-4)
    gone = [0, 3]
    expected = 0.5 * got.channels["0.weight:0"][:, gone].sum(1).square().mean()
    assert got.of_removing("0.weight:0", gone) == pytest.approx(float(expected))


def _products(x: Tensor) -> Tensor:
    """(channels, 2): sums of gradient times value, and of the gradient."""
    assert x.grad is not None
    return torch.stack([(x.grad * x).sum((0, 2, 3)), x.grad.sum((0, 2, 3))], 1).detach()


def _means(graph: Any, images: Tensor) -> Tensor:
    found = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Keep(graph).run(images)
    return found["max_pool2d"].mean((0, 2, 3))


# Allocation


@pytest.mark.parametrize("seed", range(3))
def test_plans_against_all_plans(trained: CostModel, seed: int) -> None:
    """Bits: the best of all. Channels too: no worse than that, and not below the bound, which is below the best."""
    rng = np.random.default_rng(seed)
    problem = problem_of(trained, IMAGES, BUDGET)
    start = problem.space.most
    decisions = [
        Decision(kind, name, (2, 4, 8), tuple(-np.sort(-rng.exponential(1, 3))))
        for kind, table in (("weight", trained.weights), ("activation", trained.activations))
        for name in list(table)[1:-1]
    ]
    decisions += [
        Decision("channels", n, (g.size, g.size // 2), (0.0, float(rng.exponential(0.5))), list(range(g.size)))
        for n, g in trained.groups.items()
    ]
    allocator = Allocator(problem, 60.0)
    candidates = {candidate.name: candidate for candidate in allocator.candidates(decisions)}

    def fits(plan: Plan) -> bool:
        return BUDGET.is_satisfied_by(trained.evaluate(plan))

    def loss_of_best(free: list[Decision]) -> float:
        best = np.inf
        for choice in itertools.product(*(range(len(x.choices)) for x in free)):
            loss = sum(x.losses[c] for x, c in zip(free, choice, strict=True))
            if loss < best:
                plan = start
                for x, c in zip(free, choice, strict=True):
                    plan = x.applied(plan, c)
                best = loss if problem.fits(plan) else best
        return best

    bits = loss_of_best([x for x in decisions if x.kind != "channels"])
    both = loss_of_best(decisions)
    assert candidates["bits"].loss == pytest.approx(bits)
    assert candidates["bits, greedy"].loss >= bits - 1e-9
    assert both - 1e-9 <= candidates["joint"].loss <= bits + 1e-9
    assert candidates["joint"].bound <= both + 1e-9
    assert all(fits(candidate.plan) for candidate in candidates.values())
    # from there, changes of two decisions at most
    joint = candidates["joint"]
    moved = allocator.moved([replace(x, losses=tuple(-loss for loss in x.losses)) for x in decisions], joint, 2)
    if moved is not None:
        changed = [x.name for x in decisions if x.value(moved.plan) != x.value(joint.plan)]
        assert len(changed) <= 2 or moved.plan.kept != joint.plan.kept
        assert fits(moved.plan)


def test_a_layer_with_a_single_choice(trained: CostModel) -> None:
    weight, tensor = list(trained.weights)[1], list(trained.activations)[1]
    only = [Decision("weight", weight, (4,), (0.1,)), Decision("activation", tensor, (8, 2), (0, 1))]
    first = Allocator(problem_of(trained, IMAGES, Budget(bops=0.9)), 60.0).candidates(only)[0]
    assert first.plan.weight_bits[weight] == 4
    assert first.loss == pytest.approx(0.1)


# Dynamic BN


def test_a_loss_is_the_same_whatever_was_measured_before(trained: CostModel) -> None:
    """Refits start from the float weights, never from what an earlier plan has left."""
    given = problem_of(trained, IMAGES, BUDGET)
    run = Run(digits(shuffle=False), SMALL)
    fewer = [given.space.most.with_value("channels", "8.weight:0", range(0, 24, step)) for step in (3, 2)]
    alone = [evidence_of(given, run, SMALL)[1](plan) for plan in fewer]
    _, predictor = evidence_of(given, run, SMALL)
    assert [predictor(plan) for plan in (*fewer, *fewer)] == [*alone, *alone]


def test_predicted_loss_is_that_of_moved_statistics(trained: CostModel) -> None:
    """By hand: batch statistics of the float and of the masked network, and what the one moves the other by."""
    groups, cost = trained.groups, trained
    graph = groups.inference.graph_module
    images = next(iter(digits(64)))[0]
    gated = insert_gates(graph, groups)
    open_ = Plan(
        {n: range(g.size) for n, g in groups.items()},
        dict.fromkeys(cost.weights, 32),
        dict.fromkeys(cost.activations, 32),
    )
    plan = open_.with_value("channels", "0.weight:0", range(8))
    predictor = Predictor(gated, {}, {}, (images,), graph)
    before = {n: t.clone() for n, t in gated.state_dict().items() if "running" in n}
    assert predictor(open_) == pytest.approx(0, abs=1e-6)
    static, dynamic = predictor(plan, dynamic=False), predictor(plan)
    assert all(torch.equal(t, gated.state_dict()[n]) for n, t in before.items())
    assert dynamic < static
    assert predictor.passes == 3

    first, second = graph.get_submodule("1"), graph.get_submodule("5")
    pooled = F.max_pool2d(
        F.batch_norm(
            F.conv2d(images, graph.get_parameter("0.weight"), graph.get_parameter("0.bias"), padding=1),
            first.running_mean, first.running_var, first.weight, first.bias,
        ).relu(), 2,
    )  # fmt: skip

    def convolved(channels: int) -> Tensor:
        weight = graph.get_parameter("4.weight")[:, :channels]
        return F.conv2d(pooled[:, :channels], weight, graph.get_parameter("4.bias"), padding=1)

    with torch.no_grad():
        whole, masked = convolved(16), convolved(8)
        (m, v), (m_float, v_float) = ((y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)) for y in (masked, whole))
        mean = second.running_mean + m - m_float
        var = (second.running_var + 1e-5) * (v + 1e-5) / (v_float + 1e-5) - 1e-5
        y = F.batch_norm(masked, mean, var, second.weight, second.bias).relu()
        y = F.conv2d(y, graph.get_parameter("8.weight"), graph.get_parameter("8.bias"), padding=1).relu()
        y = F.linear(y.mean((2, 3)), graph.get_parameter("12.weight"), graph.get_parameter("12.bias"))
        wanted = graph(images).log_softmax(1)
        by_hand = F.kl_div(y.log_softmax(1), wanted, reduction="batchmean", log_target=True)
    assert dynamic == pytest.approx(float(by_hand), rel=1e-3)
    predictor.reset()
    assert predictor(open_, dynamic=False) == pytest.approx(0, abs=1e-6)


class Outlier(nn.Module):
    """One channel of the tensor between two layers is 20,000 times the others, and counts for next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)
        self.factors = nn.Parameter(torch.tensor([2e4, *[1.0] * 15]).view(16, 1, 1))
        with torch.no_grad():
            self.middle.weight[:, 0] *= 1e-6
            self.last.weight *= 30

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).tanh() * self.factors).relu().mean((2, 3)))


def test_what_8_bits_cannot_hold_stays_in_float_unless_bits_were_asked_for() -> None:
    torch.manual_seed(0)
    cost = cost_of(Outlier().eval(), IMAGES)
    data = [x for x, _ in digits(64)]
    loose, asked = (
        searched(cost, Budget(bops=0.3), data, FEWEST, prune=False, **space) for space in ({}, {"candidates": (4, 8)})
    )
    (between,) = (name for name, bits in loose.plan.activation_bits.items() if bits == 32)
    assert any(f"the activation {between!r} stays in float: 8 bits alone would lose" in note for note in loose.notes)
    assert 32 not in asked.plan.activation_bits.values()
    # and a table that was kept says the same under another budget, or that there is no room for it
    problem = problem_of(cost, IMAGES, Budget(bops=0.25), prune=False)
    assert loose.sensitivities is not None
    assert replan(problem, loose.sensitivities).plan.activation_bits[between] == 32
    tight = problem_of(cost, IMAGES, Budget(bops=0.05), prune=False)
    assert replan(tight, loose.sensitivities).plan.activation_bits[between] < 32
