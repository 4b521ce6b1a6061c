"""The uniform searcher: budgets are met, landed under closely, and refused when out of reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks._cifar_models import CifarResNet
from sbs_fx.passes import CostModel
from sbs_fx.passes.channels.importance import group_importance, kernel_multiple
from sbs_fx.plan import Budget, Policy
from sbs_fx.plan.errors import InfeasibleBudget
from sbs_fx.search import Run, uniform
from sbs_fx.search.uniform import _counts_of, _fill
from tests.oracles.problems import cost_of, problem_of

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def cost() -> CostModel:
    torch.manual_seed(0)
    return cost_of(CifarResNet(20), IMAGES)


def planned(cost: CostModel, budget: Budget, **space: Any) -> Policy:
    problem = problem_of(cost, IMAGES, budget, **space)
    return problem.policy(uniform(problem, Run(fine_tunes=True)).plan, "uniform")


@settings(max_examples=40)
@given(st.floats(0.012, 1.0), st.sampled_from(["bops", "size", "macs"]))
def test_a_budget_is_never_exceeded(cost: CostModel, share: float, measure: str) -> None:
    share = max(share, 0.15) if measure != "bops" else share
    budget = Budget(**{measure: share})
    policy = planned(cost, budget, round_to=1)
    assert budget.is_satisfied_by(cost.evaluate(policy.plan))
    assert Policy.from_json(policy.to_json()) == policy


def test_it_lands_just_under_the_budget(cost: CostModel) -> None:
    for share in (0.03, 0.04, 0.05):
        policy = planned(cost, Budget(bops=share), weight_bits=8, activation_bits=8, round_to=1)
        assert 0.9 * share < cost.evaluate(policy.plan).bops / cost.reference.bops <= share


def test_several_limits_hold_at_once(cost: CostModel) -> None:
    budget = Budget(bops=0.03, size=0.2, macs=0.6)
    assert budget.is_satisfied_by(cost.evaluate(planned(cost, budget).plan))


def test_out_of_reach_says_what_is_reachable(cost: CostModel) -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        planned(cost, Budget(bops=1e-6), round_to=1)
    least = caught.value.least["bops"]
    assert least > 1e-6
    policy = planned(cost, Budget(bops=least), round_to=1)
    assert cost.evaluate(policy.plan).bops / cost.reference.bops <= least


def test_kept_channels_are_multiples_that_kernels_like(cost: CostModel) -> None:
    """Under a budget of time or MACs 16 in small groups as well, unless it cannot be met then."""
    for budget, small in ((Budget(bops=0.05), 8), (Budget(macs=0.5), 16), (Budget(macs=0.3), 8)):
        policy = planned(cost, budget)
        assert all(len(kept) % (16 if policy.sizes[n] >= 64 else small) == 0 for n, kept in policy.kept.items())
        assert any(len(kept) < policy.sizes[n] for n, kept in policy.kept.items())
        assert budget.is_satisfied_by(cost.evaluate(policy.plan))


def test_only_limits_of_work_and_time_ask_for_fast_multiples(cost: CostModel) -> None:
    name = "layer1.0.conv1.weight:0"  # of 16 channels
    for budget, counts in ((Budget(bops=0.5), (8, 16)), (Budget(macs=0.9), (16,)), (Budget(size=0.5), (8, 16))):
        assert _counts_of(problem_of(cost, IMAGES, budget), (2, 2))[name] == counts


def test_what_is_left_over_goes_to_the_most_pruned_first() -> None:
    """2 of 4 and 2 of 8 channels: the second may have 4; then the first 3, where that fits too."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(8, 2, 1))
    first, second = "0.weight:0", "1.weight:0"
    given_ = problem_of(layers, IMAGES, Budget(macs=1.0), round_to=1)
    counts, kept = {first: (1, 2, 3, 4), second: (2, 4, 6, 8)}, {first: 2, second: 2}
    for more in ({first: 2, second: 4}, {first: 3, second: 4}):
        tight = replace(given_, limits=given_.price(given_.space.plan(8, 8, more)))
        assert _fill(tight, (8, 8), counts, kept) == more


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_importance_is_the_norm_over_every_member(cost: CostModel, norm: str) -> None:
    groups = cost.groups
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


def flattened(channels: int, height: int = 1, width: int = 1) -> CostModel:
    """Channels that a linear layer reads at every pixel."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 1, bias=False),
        torch.nn.Flatten(),
        torch.nn.Linear(channels * height * width, 2, bias=False),
    )
    return cost_of(layers, torch.randn(2, 3, height, width))


def test_the_importance_of_a_channel_sums_over_its_pixels() -> None:
    """Rows of a convolution of mass 3 and 9 in 12, and 2 x 4 columns of a linear layer of mass 8 and 24 in 32."""
    groups = flattened(2, 2, 2).groups
    weights = {"0.weight": torch.ones(2, 3, 1, 1), "2.weight": torch.ones(2, 8)}
    weights["0.weight"][1], weights["2.weight"][:, 4:] = 3, 3
    scores = group_importance(groups, "l1", weights)["0.weight:0"]
    torch.testing.assert_close(scores, torch.tensor([3 / 2 + 8 / 2, 9 / 2 + 24 / 2], dtype=torch.float64))


def test_the_multiple_of_a_group_by_hand() -> None:
    """16 channels, 8 in small groups, and any number where the group is no larger than that; less by the factor that
    the pixels have in common with it."""
    small, even, wide = (flattened(n).groups["0.weight:0"] for n in (8, 9, 64))
    assert [kernel_multiple(group, None) for group in (small, even, wide)] == [1, 8, 16]
    assert [kernel_multiple(small, None, fast=True), kernel_multiple(small, 8)] == [16, 8]
    of_six_pixels = flattened(64, 2, 3).groups["0.weight:0"]
    assert [kernel_multiple(of_six_pixels, n) for n in (None, 12, 5)] == [8, 2, 5]


def test_the_least_important_channels_go_first() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
    ).eval()
    with torch.no_grad():
        net[0].weight[[1, 5]] *= 1e-3
        net[0].bias[[1, 5]] *= 1e-3
        net[2].weight[:, [1, 5]] *= 1e-3
    policy = planned(cost_of(net, torch.randn(2, 3, 16, 16)), Budget(macs=0.65), round_to=1)
    assert not {1, 5} & set(policy.kept["0.weight:0"])
