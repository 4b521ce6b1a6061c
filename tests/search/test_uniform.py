"""The uniform searcher: budgets are met, landed under closely, and refused when out of reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks._cifar_models import CifarResNet
from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.passes.channels.importance import group_importance
from sbs_fx.plan import Budget, Policy
from sbs_fx.plan.errors import InfeasibleBudget
from sbs_fx.search import uniform


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    graph = trace(CifarResNet(20).eval(), torch.randn(2, 3, 32, 32))
    groups = channel_groups(graph)
    return groups, cost_model(graph, groups)


@settings(max_examples=40)
@given(st.floats(0.012, 1.0), st.sampled_from(["bops", "size", "macs"]))
def test_a_budget_is_never_exceeded(resnet, share: float, measure: str) -> None:
    groups, cost = resnet
    share = max(share, 0.15) if measure != "bops" else share
    budget = Budget(**{measure: share})
    policy = uniform(groups, cost, budget, round_to=1)
    total = cost.evaluate(policy.kept, policy.weight_bits, policy.activation_bits)
    assert budget.is_satisfied_by(total)
    assert Policy.from_json(policy.to_json()) == policy


def test_it_lands_just_under_the_budget(resnet) -> None:
    groups, cost = resnet
    for share in (0.03, 0.04, 0.05):
        policy = uniform(groups, cost, Budget(bops=share), weight_bits=8, activation_bits=8, round_to=1)
        total = cost.evaluate(policy.kept, policy.weight_bits, policy.activation_bits)
        assert 0.9 * share < total.bops / cost.reference.bops <= share


def test_several_limits_hold_at_once(resnet) -> None:
    groups, cost = resnet
    budget = Budget(bops=0.03, size=0.2, macs=0.6)
    policy = uniform(groups, cost, budget)
    assert budget.is_satisfied_by(cost.evaluate(policy.kept, policy.weight_bits, policy.activation_bits))


def test_out_of_reach_says_what_is_reachable(resnet) -> None:
    groups, cost = resnet
    with pytest.raises(InfeasibleBudget) as caught:
        uniform(groups, cost, Budget(bops=1e-6), round_to=1)
    least = caught.value.least["bops"]
    assert least > 1e-6
    policy = uniform(groups, cost, Budget(bops=least), round_to=1)
    total = cost.evaluate(policy.kept, policy.weight_bits, policy.activation_bits)
    assert total.bops / cost.reference.bops <= least


def test_kept_channels_are_multiples_that_kernels_like(resnet) -> None:
    """Under a budget of time or MACs 16 in small groups as well, unless it cannot be met then."""
    groups, cost = resnet
    for budget, small in ((Budget(bops=0.05), 8), (Budget(macs=0.5), 16), (Budget(macs=0.3), 8)):
        policy = uniform(groups, cost, budget)
        assert all(len(kept) % (16 if policy.sizes[n] >= 64 else small) == 0 for n, kept in policy.kept.items())
        assert any(len(kept) < policy.sizes[n] for n, kept in policy.kept.items())
        assert budget.is_satisfied_by(cost.evaluate(policy.kept, policy.weight_bits, policy.activation_bits))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_importance_is_the_norm_over_every_member(resnet, norm: str) -> None:
    groups, _ = resnet
    scores = group_importance(groups, norm)  # type: ignore[arg-type]
    parameters = dict(groups.inference.graph_module.named_parameters())
    name = "layer1.0.conv1.weight:0"
    power = 1 if norm == "l1" else 2
    expected = torch.zeros(16, dtype=torch.float64)
    for member in groups[name].members:
        if member.tensor in parameters:
            mass = parameters[member.tensor].detach().double().abs() ** power
            mass = (mass / mass.mean().clamp_min(1e-30)).movedim(member.dim, 0).reshape(16, -1)
            expected += mass.sum(1)
    torch.testing.assert_close(scores[name], expected ** (1 / power))


def test_the_least_important_channels_go_first() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
    ).eval()
    with torch.no_grad():
        net[0].weight[[1, 5]] *= 1e-3
        net[0].bias[[1, 5]] *= 1e-3
        net[2].weight[:, [1, 5]] *= 1e-3
    graph = trace(net, torch.randn(2, 3, 16, 16))
    groups = channel_groups(graph)
    policy = uniform(groups, cost_model(graph, groups), Budget(macs=0.65), round_to=1)
    assert not {1, 5} & set(policy.kept["0.weight:0"])
