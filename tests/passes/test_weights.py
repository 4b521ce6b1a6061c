"""Weights that a module computes: traced, typed, priced and finalised as those of the plain layer would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import sbs_fx
from sbs_fx.passes import ChannelGroups, channel_groups, cost_model, trace
from sbs_fx.plan import Plan
from tests.networks.models import randomise
from tests.oracles.agreement import Traced, check_network, traced


class LowRank(nn.Module):
    """The product of two parameters, added to a weight."""

    def __init__(self, weight: Tensor, factor: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight_a = nn.Parameter(torch.randn(3, weight[0].numel()) / 9) if factor is None else factor
        self.weight_b = nn.Parameter(torch.randn(weight.shape[0], 3))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.weight_b @ self.weight_a).view_as(weight)


class DividedByNorm(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))


def parametrized(make: Callable[[Tensor], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", make(layer.weight))


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "weight norm, hook": nn.utils.weight_norm,
    "weight norm by hand": parametrized(lambda weight: DividedByNorm()),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm, hook": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "low rank": parametrized(LowRank),
}


class Net(nn.Module):
    """Convolutions of every kind, one of them called twice, and a linear."""

    def __init__(self, way: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.twice = way(nn.Conv2d(3, 8, 3, padding=1)), way(nn.Conv2d(8, 8, 3, padding=1))
        self.depthwise = way(nn.Conv2d(8, 8, 3, groups=8, bias=False))
        self.up, self.head = way(nn.ConvTranspose2d(8, 6, 2, 2)), way(nn.Linear(6, 5))
        self.norm = nn.BatchNorm2d(8)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(self.stem(x))))
        x = F.relu(self.norm(self.depthwise(F.relu(x))))
        return self.head(self.up(x).mean((2, 3)))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def places(groups: ChannelGroups) -> set[frozenset[tuple[str, int]]]:
    return {frozenset((m.tensor, m.dim) for m in group.members) for group in groups.values()}


@pytest.fixture(scope="module")
def plain() -> Traced:
    return traced(Net(lambda layer: layer), images)


@pytest.mark.parametrize("way", WAYS)
def test_a_computed_weight_is_a_plain_one(way: str, plain: Traced) -> None:
    net = Net(WAYS[way])
    before = {name: (id(p), p.detach().clone()) for name, p in net.named_parameters()}
    case = check_network(net, images, seed=0)
    assert {name: id(p) for name, p in net.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in net.named_parameters())
    assert places(case.groups) == places(plain.groups)
    assert {name: p.requires_grad for name, p in case.graph.named_parameters()} == {
        name: p.requires_grad for name, p in plain.graph.named_parameters()
    }
    prices = [cost_model(c.exact, c.groups).evaluate(Plan()) for c in (case, plain)]
    assert prices[0] == prices[1]


class Recurrent(nn.Module):
    def __init__(self, way: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(12, 8, batch_first=True), nn.Linear(8, 5)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            way(self.cell, name)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.reshape(-1, 12, 12))[0].mean(1))


def test_weights_of_recurrent_layers() -> None:
    torch.manual_seed(0)
    case = check_network(Recurrent(parametrizations.weight_norm), lambda batch: images(batch)[..., :6], seed=0)
    assert list(case.groups) == ["cell.weight_ih_l0:0"]


class Shared(nn.Module):
    """Two low-rank updates with a factor in common: neither may become a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)
        parametrize.register_parametrization(self.first, "weight", LowRank(self.first.weight))
        factor = self.first.parametrizations.weight[0].weight_a  # type: ignore[union-attr,index]
        parametrize.register_parametrization(self.second, "weight", LowRank(self.second.weight, factor))
        randomise(self.head, 0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def test_a_product_that_cannot_be_folded_is_no_layer_and_is_stored_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6)
    graph = trace(Shared(), x)
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)) == 2
    cost = cost_model(graph, channel_groups(graph)).evaluate(Plan())
    assert [layer.kind for layer in cost.layers] == ["linear"] * 3
    assert cost.macs == 6 * 6 + 6 * 6 + 6 * 5
    result = sbs_fx.compress(Shared(), x, budget="bops=10%", method="uniform")
    names = {str(node.target) for node in result.model.graph.nodes}
    assert not any("matmul" in name or "weight_a" in name for name in names)
    assert not any("weight_a" in name or "original" in name for name in result.model.state_dict())


def test_a_standardised_weight_stays_live() -> None:
    """Its statistics run over the channels that are left."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
            return F.conv2d(x, (self.weight - mean) * torch.rsqrt(var + 1e-5), self.bias)

    graph = trace(nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 4, 3)).eval(), images(2))
    groups = channel_groups(graph)
    assert groups.inference.statistics
    assert [m.tensor for m in groups["0.weight:0"].members] == ["0.weight", "0.bias", "2.weight"]
