"""Channels priced after the refit: against least squares done anew for each set that stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sbs_fx.calibration.columns import Product
from sbs_fx.calibration.rounding import InputMoments
from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.search.refitted import Reading, readers_of, readings, removal


def reading(outputs: int, channels: int, width: int) -> Reading:
    mixed = torch.randn(channels * width, channels * width)
    moments = mixed @ mixed.T / channels + 0.1 * torch.eye(channels * width)
    columns = torch.arange(channels * width).view(channels, width)
    product = Product(1, (outputs, channels, width), (1,), ((0, 0),), (1,))
    return Reading(product, torch.randn(outputs, channels * width), moments, {"group": columns})


def loss_of(each: Reading, importance: Tensor, stays: list[int]) -> float:
    """Of the best weights on the columns that stay, by the normal equations."""
    at = each.columns["group"][stays].flatten()
    target = each.rows @ each.moments
    solved = torch.linalg.solve(each.moments[at][:, at].double(), target[:, at].double().T).T
    power = ((each.rows @ each.moments) * each.rows).sum(1).double()
    return float((importance * (power - (solved * target[:, at].double()).sum(1))).sum())


@pytest.mark.parametrize("width", [1, 3])
def test_losses_are_those_of_least_squares_anew(width: int) -> None:
    readers = [(reading(outputs, 8, width), torch.rand(outputs, dtype=torch.float64)) for outputs in (5, 3)]
    order, losses = removal("group", 8, 2, readers)
    assert len(order) == 6
    assert len(set(order)) == 6
    assert losses == sorted(losses)
    for gone in range(7):
        stays = [c for c in range(8) if c not in order[:gone]]
        assert losses[gone] == pytest.approx(sum(loss_of(r, f, stays) for r, f in readers), rel=1e-3, abs=1e-4)
    first = min(range(8), key=lambda c: sum(loss_of(r, f, [k for k in range(8) if k != c]) for r, f in readers))
    assert order[0] == first


@pytest.mark.parametrize("width", [1, 3])
def test_refitted_weights_are_least_squares(width: int) -> None:
    each = reading(4, 6, width)
    stays = [0, 2, 5]
    at = each.columns["group"][stays].flatten()
    weight = each.product.weight(each.rows[None])
    found = each.product.rows(each.refitted(weight, {"group": stays}))[0]
    expected = torch.linalg.solve(each.moments[at][:, at], (each.rows @ each.moments)[:, at].T).T
    assert torch.allclose(found[:, at], expected, atol=1e-3)
    gone = each.columns["group"][[1, 3, 4]].flatten()
    assert not found[:, gone].any()
    assert each.refitted(weight, {"group": range(6)}) is weight


def test_twins_cost_nothing_and_go_one_at_a_time() -> None:
    x = torch.randn(500, 4)
    x = torch.cat([x, x], 1)
    moments = x.T @ x / 500 + 1e-4 * torch.eye(8)
    each = Reading(Product(1, (3, 8)), torch.randn(3, 8), moments, {"g": torch.arange(8)[:, None]})
    order, losses = removal("g", 8, 1, [(each, torch.ones(3))])
    assert {c % 4 for c in order[:4]} == {0, 1, 2, 3}
    assert losses[4] < 1e-2 * losses[5]


class Net(nn.Module):
    """Hidden channels that one convolution reads; a head whose products of activations read others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu().flatten(2).mT
        return self.q(x) @ self.k(x).mT


def test_what_activations_multiply_cannot_be_made_good() -> None:
    graph = trace(Net().eval(), torch.randn(2, 3, 8, 8))
    cost = cost_model(graph, channel_groups(graph))
    weights = dict(Net().named_parameters())
    product = {n: Product(1, tuple(weights[f"{n}.weight"].shape)) for n in ("a", "b", "q", "k")}
    moments = {n: InputMoments(torch.eye(p.width)[None], 1000) for n, p in product.items()}
    read = readings(cost, product, {n: weights[f"{n}.weight"] for n in product}, moments)
    readers = readers_of(cost, read, {n: torch.ones(len(weights[f"{n}.weight"])) for n in product})
    by_size = {group.size: group.name for group in cost.groups.values()}
    assert readers.keys() == {by_size[8], by_size[6]}
    assert len(readers[by_size[6]]) == 2
