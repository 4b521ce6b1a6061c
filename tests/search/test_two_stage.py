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
from sbs_fx.passes import activation_gates, apply_bits, channel_groups, cost_model, insert_gates, trace, weight_gates
from sbs_fx.plan import Budget, Policy
from sbs_fx.plan.errors import DataError, InfeasibleBudget, InputError, WeightsError
from sbs_fx.search.dynamic_norm import Predictor
from sbs_fx.search.gate_search import Draft
from sbs_fx.search.sensitivity import sensitivity
from sbs_fx.search.solvers.allocation import Allocator, Decision
from sbs_fx.search.two_stage import TwoStage, _counts, two_stage
from sbs_fx.search.uniform import end_bits
from tests.networks.models import SMALLEST, example
from tests.oracles.search_runs import IMAGES, digits, network

SMALL = TwoStage(images=128, judged=64, measured=40, rounds=1)
BUDGET = Budget(bops=1 / 60)


def analysed(module: nn.Module, x: Tensor) -> Any:
    graph = trace(module.eval(), x)
    groups = channel_groups(graph)
    return graph, groups, cost_model(graph, groups)


@pytest.fixture(scope="module")
def trained() -> Any:
    module = network().train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for images, labels in digits():
            optimiser.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimiser.step()
    return analysed(module, IMAGES)


@pytest.fixture(scope="module")
def found(trained: Any) -> Any:
    return two_stage(*trained, BUDGET, digits(shuffle=False), inputs=(IMAGES,), search=SMALL)


def share(analysed_: Any, policy: Policy, measure: str = "bops") -> float:
    _, _, cost = analysed_
    spent = cost.evaluate(policy.kept, policy.weight_bits, policy.activation_bits)
    return Budget(**{measure: 1.0}).shares(spent)[measure]


# What a search decides


def test_budget_ends_and_choice(trained: Any, found: Any) -> None:
    policy = found.policy
    assert 0.85 * BUDGET.limits["bops"] <= share(trained, policy) <= BUDGET.limits["bops"]
    names, tensors = list(policy.weight_bits), list(policy.activation_bits)
    assert {policy.weight_bits[names[0]], policy.weight_bits[names[-1]]} == {8}
    assert {policy.activation_bits[tensors[0]], policy.activation_bits[tensors[-1]]} == {8}
    assert policy.method == "two_stage"
    assert found.labelled
    assert not found.notes
    by_name = {score.name: score for score in found.scores}
    assert {"bits", "bits, greedy", "joint"} <= by_name.keys()
    assert by_name["bits"].proven
    assert by_name["bits"].gap == 0
    assert by_name["bits"].estimated <= by_name["bits, greedy"].estimated + 1e-12
    assert all(0 <= score.gap < np.inf for score in found.scores)
    # channels and bits together are never worse than bits alone, on what was measured
    best = min(found.scores, key=lambda score: score.predicted)
    assert best.predicted <= by_name["bits"].predicted


def test_the_same_seed_gives_the_same_policy_and_the_graph_stays(trained: Any, found: Any) -> None:
    before = {n: t.clone() for n, t in trained[0].state_dict().items()}
    again = two_stage(*trained, BUDGET, digits(shuffle=False), inputs=(IMAGES,), search=SMALL)
    assert again.policy == found.policy
    assert again.scores == found.scores
    assert all(torch.equal(t, before[n]) for n, t in trained[0].state_dict().items())


@pytest.mark.parametrize(
    ("decisions", "budget"), [("bits", Budget(bops=1 / 60, size=0.14)), ("joint", Budget(bops=1 / 30, macs=0.6))]
)
def test_limits_hold_together(trained: Any, decisions: Any, budget: Budget) -> None:
    options = SMALL.model_copy(update={"decisions": decisions, "measured": 0, "rounds": 0})
    policy = two_stage(*trained, budget, digits(shuffle=False), inputs=(IMAGES,), search=options).policy
    assert all(share(trained, policy, m) <= limit for m, limit in budget.limits.items())
    assert (decisions == "bits") == all(len(kept) == policy.sizes[n] for n, kept in policy.kept.items())


def test_what_no_choice_can_meet(trained: Any) -> None:
    with pytest.raises(InfeasibleBudget, match="the least that method 'two_stage' reaches is bops") as error:
        two_stage(*trained, Budget(bops=1e-5), digits(), inputs=(IMAGES,), search=SMALL)
    least = error.value.least["bops"]
    options = SMALL.model_copy(update={"measured": 0, "rounds": 0})
    policy = two_stage(*trained, Budget(bops=least), digits(), inputs=(IMAGES,), search=options).policy
    assert share(trained, policy) == least
    with pytest.raises(InfeasibleBudget):
        two_stage(*trained, Budget(bops=least * 0.999), digits(), inputs=(IMAGES,), search=options)


def test_without_labels_predictions_stand_in(trained: Any) -> None:
    images = [x for x, _ in digits(64)]
    options = SMALL.model_copy(update={"measured": 0, "rounds": 0})
    searched = two_stage(*trained, BUDGET, images, inputs=(IMAGES,), search=options)
    assert not searched.labelled
    assert "no labels" in searched.notes[0]


@pytest.mark.parametrize("name", ["depthwise", "dense", "attention", "tokens-and-back", "lstm", "shared"])
def test_kinds_of_networks(name: str) -> None:
    x = example(name)
    traced = analysed(SMALLEST[name](), x)
    budget = Budget(bops=1 / 50)
    options = TwoStage(measured=0, rounds=0)
    policy = two_stage(*traced, budget, [torch.randn(8, *x.shape[1:])], inputs=(x,), search=options).policy
    assert share(traced, policy) <= 1 / 50


# Data and networks that nothing can be learned from


def test_one_image_zero_weights_and_constant_images(trained: Any) -> None:
    options = SMALL.model_copy(update={"measured": 12})
    one = two_stage(*trained, BUDGET, [IMAGES[:1]], inputs=(IMAGES,), search=options)
    assert share(trained, one.policy) <= BUDGET.limits["bops"]
    module = network()
    nn.init.zeros_(module[4].weight)
    zeros = analysed(module, IMAGES)
    constant = [(torch.zeros(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64))]
    policy = two_stage(*zeros, BUDGET, constant, inputs=(IMAGES,), search=options).policy
    assert share(zeros, policy) <= BUDGET.limits["bops"]


def test_gradients_that_are_not_finite_name_the_layer() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x).relu()).mul(0).sqrt().mean((2, 3)))

    traced = analysed(Root(), IMAGES)
    with pytest.raises(WeightsError, match="gradient at 'conv2d_1' is NaN or Inf") as error:
        two_stage(*traced, Budget(bops=0.05), [IMAGES], inputs=(IMAGES,), search=TwoStage(measured=0, rounds=0))
    assert error.value.names == ("conv2d_1",)


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "no batch"), ([IMAGES * torch.nan], "NaN or Inf"), ([(IMAGES, torch.tensor([1, 99]))], "label 99")],
)
def test_bad_data(trained: Any, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        two_stage(*trained, BUDGET, data, inputs=(IMAGES,), search=SMALL)


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="images"):
        TwoStage(images=0)


def test_kept_counts() -> None:
    assert _counts(64, 16, 8) == (64, 48, 32, 16)
    assert _counts(24, 16, 8) == (24, 16)
    assert _counts(512, 16, 4) == (512, 496, 256, 16)
    assert _counts(8, 8, 8) == (8,)


# Estimates


def test_estimates_are_those_of_per_sample_gradients(trained: Any) -> None:
    graph, groups, cost = trained
    network_ = insert_gates(graph, groups)
    images, labels = next(iter(digits(16)))
    apply_bits(network_, dict.fromkeys(cost.weights, 4), dict.fromkeys(cost.activations, 2))
    calibrate(network_, [images], inputs=(IMAGES,))
    forms = {n: {4: (lambda w, g=g: 0.5 * w)} for n, g in weight_gates(network_).items()}
    rounded = {n: {2: (lambda x, t=float(g.range): x.clamp(max=t / 2))} for n, g in activation_gates(network_).items()}
    apply_bits(network_, dict.fromkeys(cost.weights, 32), dict.fromkeys(cost.activations, 32))
    got = sensitivity(network_, groups, [(images, labels)], forms, rounded, prunable=list(groups))

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
    assert {n: t[4] for n, t in got.weights.items()} == pytest.approx(wanted_w, rel=1e-3)
    assert {n: t[2] for n, t in got.activations.items()} == pytest.approx(wanted_a, rel=1e-3)
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


def start_of(traced: Any) -> Draft:
    _, groups, cost = traced
    fixed = end_bits(cost)
    return Draft(
        {n: fixed.weights.get(n, 8) for n in cost.weights},
        {n: fixed.activations.get(n, 8) for n in cost.activations},
        {n: list(range(g.size)) for n, g in groups.items()},
    )


@pytest.mark.parametrize("seed", range(3))
def test_plans_against_all_plans(trained: Any, seed: int) -> None:
    """Bits: the best of all. Channels too: no worse than that, and not below the bound, which is below the best."""
    _, groups, cost = trained
    rng = np.random.default_rng(seed)
    start, budget = start_of(trained), Budget(bops=1 / 60)
    decisions = [
        Decision(kind, name, (2, 4, 8), tuple(-np.sort(-rng.exponential(1, 3))))
        for kind, table in (("w", cost.weights), ("a", cost.activations))
        for name in list(table)[1:-1]
    ]
    decisions += [
        Decision("c", n, (g.size, g.size // 2), (0.0, float(rng.exponential(0.5))), list(range(g.size)))
        for n, g in groups.items()
    ]
    allocator = Allocator(cost, budget, start, 60.0)
    plans = {plan.name: plan for plan in allocator.plans(decisions)}

    def loss_of_best(free: list[Decision]) -> float:
        best = np.inf
        for choice in itertools.product(*(range(len(x.choices)) for x in free)):
            draft, loss = start, 0.0
            for x, c in zip(free, choice, strict=True):
                draft, loss = x.applied(draft, c), loss + x.losses[c]
            if loss < best and allocator.fits(draft):
                best = loss
        return best

    bits = loss_of_best([x for x in decisions if x.kind != "c"])
    both = loss_of_best(decisions)
    assert plans["bits"].loss == pytest.approx(bits)
    assert plans["bits, greedy"].loss >= bits - 1e-9
    assert both - 1e-9 <= plans["joint"].loss <= bits + 1e-9
    assert plans["joint"].bound <= both + 1e-9
    assert all(allocator.fits(plan.draft) for plan in plans.values())
    # from there, changes of two decisions at most
    joint = plans["joint"]
    moved = allocator.moved([replace(x, losses=tuple(-loss for loss in x.losses)) for x in decisions], joint, 2)
    if moved is not None:
        changed = [x.name for x in decisions if x.value(moved.draft) != x.value(joint.draft)]
        assert len(changed) <= 2 or moved.draft.kept != joint.draft.kept
        assert allocator.fits(moved.draft)


def test_a_layer_with_a_single_choice(trained: Any) -> None:
    _, _, cost = trained
    only = [
        Decision("w", list(cost.weights)[1], (4,), (0.1,)),
        Decision("a", list(cost.activations)[1], (8, 2), (0, 1)),
    ]
    plans = Allocator(cost, Budget(bops=0.9), start_of(trained), 60.0).plans(only)
    assert plans[0].draft.weight_bits[list(cost.weights)[1]] == 4
    assert plans[0].loss == pytest.approx(0.1)


# Dynamic BN


def test_predicted_loss_is_that_of_moved_statistics(trained: Any) -> None:
    """By hand: batch statistics of the float and of the masked network, and what the one moves the other by."""
    graph, groups, cost = trained
    images = next(iter(digits(64)))[0]
    gated = insert_gates(graph, groups)
    open_ = Draft(
        dict.fromkeys(cost.weights, 32),
        dict.fromkeys(cost.activations, 32),
        {n: [*range(g.size)] for n, g in groups.items()},
    )
    draft = replace(open_, kept={**open_.kept, "0.weight:0": list(range(8))})
    predictor = Predictor(gated, {}, {}, images, graph)
    before = {n: t.clone() for n, t in gated.state_dict().items() if "running" in n}
    assert predictor(open_) == pytest.approx(0, abs=1e-6)
    static, dynamic = predictor(draft, dynamic=False), predictor(draft)
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
