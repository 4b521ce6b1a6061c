"""Operators without a rule are in the price: what is counted, by hand or by torch, and what nobody can count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

import sbs_fx
from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import BudgetError, InfeasibleBudget


@torch.library.custom_op("sbs_fx_tests::mixed", mutates_args=())
def mixed(x: Tensor) -> Tensor:
    return x @ x.transpose(-1, -2)


@mixed.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


class Net(nn.Module):
    """A convolution, and an operator on its features."""

    def __init__(self, operator: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.operator = nn.Conv2d(3, 16, 3, padding=1), operator
        self.pairs = nn.Parameter(torch.randn(5, 16, 16))
        self.grid = nn.Parameter(torch.rand(1, 10, 12, 2) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self, self.conv(x).relu())


X = torch.randn(2, 3, 8, 6)
COUNTED: dict[str, tuple[Callable[[Net, Tensor], Tensor], int]] = {
    "grid": (lambda net, y: nn.functional.grid_sample(y, net.grid.expand(y.shape[0], -1, -1, -1)), 4 * 16 * 10 * 12),
    "fourier": (lambda net, y: torch.fft.rfft2(y).abs(), math.ceil(2.5 * 16 * 48 * math.log2(48))),
    "distances": (lambda net, y: torch.cdist(y.flatten(2), y.flatten(2)), 16 * 16 * 48),
    # On 16 matrices of 6 x 6.
    "determinant": (lambda net, y: torch.linalg.slogdet(y[:, :, :6] + 9 * torch.eye(6))[1], 16 * 6**3 // 3),
    "inverse": (lambda net, y: torch.linalg.inv(y[:, :, :6] + 9 * torch.eye(6)), 16 * 6**3),
    "system": (
        lambda net, y: torch.linalg.solve(y[:, :, :6] + 9 * torch.eye(6), y[:, :, :6, :2]),
        16 * (6**3 // 3 + 6 * 6 * 2),
    ),
    "triangle": (
        lambda net, y: torch.linalg.solve_triangular(y[:, :, :6] + 9 * torch.eye(6), y[:, :, :6, :2], upper=True),
        16 * 6 * 6 * 2,
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_has_no_rule_is_counted(name: str) -> None:
    operator, macs = COUNTED[name]
    net = Net(operator).eval()
    graph = trace(net, X)
    groups = channel_groups(graph)
    cost = cost_model(graph, groups)
    conv = 16 * 3 * 9 * 48
    assert cost.reference.macs == conv + macs
    assert cost.whole["bops"] == 1024 * (conv + macs)
    (row,) = [row for row in cost.reference.layers if row.kind == "float"]
    assert (row.macs, row.weight_bits, row.activation_bits) == (macs, 32, 32)
    plan = Plan({n: tuple(range(g.size)) for n, g in groups.items()}, dict.fromkeys(cost.weights, 8))
    assert cost.price(plan)["bops"] == cost.evaluate(plan).bops == conv * 8 * 32 + macs * 1024
    with pytest.raises(InfeasibleBudget, match=f"bops .* for .*{row.name.partition(' ')[0]}.* stays in float"):
        sbs_fx.compress(net, X, budget=1e-3)
    assert f"{row.name}" in str(sbs_fx.compress(net, X, budget=0.99).report)


def test_what_torch_counts_is_counted_so() -> None:
    """An operator with a formula of torch's, whose rule is taken away."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3, stride=2)).eval()
    graph = trace(net, X)
    groups = channel_groups(graph)
    last = list(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default))[-1]
    groups.inference.unknown[last.name] = "aten.conv2d.default"
    del groups.inference.layers[last.name]
    last.target = torch.ops.aten.convolution.default
    last.args = (*last.args[:3], [2, 2], [0, 0], [1, 1], False, [0, 0], 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(X[:1])
    assert cost_model(graph, groups).reference.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("equation", ["b...c,dc->b...d", "bchw,dc,ed->behw", "bchw,dc"])
def test_an_einsum_of_any_form_is_counted(equation: str) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Parameter(drawn(6, 6)), nn.Parameter(drawn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y = y.movedim(1, -1) if "..." in equation else y
            return torch.einsum(equation, y, *[self.a, self.b][: equation.count(",")])

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    net = Sums().eval()
    graph = trace(net, X)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(X[:1])
    assert cost_model(graph, channel_groups(graph)).reference.macs == counter.get_total_flops() // 2


@pytest.fixture
def formula() -> Iterator[None]:
    target = torch.ops.sbs_fx_tests.mixed
    register_flop_formula(target)(lambda x, *_, out_shape=None, **__: 2 * math.prod(x) * x[1])
    yield
    del flop_registry[target]


def test_what_nobody_can_count_is_refused_or_said() -> None:
    net = Net(lambda net, y: mixed(y.flatten(2))).eval()
    with pytest.raises(BudgetError, match=r"nobody knows what sbs_fx_tests.mixed.* \(node mixed\) costs, .*register"):
        sbs_fx.compress(net, X, budget=0.2)
    result = sbs_fx.compress(net, X, budget=0.2, config=sbs_fx.Config(uncounted="ignore"))
    assert "not in the cost, as nobody knows it: sbs_fx_tests.mixed" in str(result.report)
    sbs_fx.compress(net, X, budget=sbs_fx.Budget(size=0.5))  # a measure that it has no part in


@pytest.mark.usefixtures("formula")
def test_a_formula_of_ones_own_counts() -> None:
    graph = trace(Net(lambda net, y: mixed(y.flatten(2))).eval(), X)
    cost = cost_model(graph, channel_groups(graph))
    assert not cost.uncounted
    assert cost.reference.macs == 16 * 3 * 9 * 48 + 16 * 48 * 16


def test_rows_that_depend_on_data_are_uncounted() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z, chosen = torch.zeros_like(y), y[..., 0] > 0
            z[chosen] = self.second(y[chosen])
            return z.mean(1)

    net, x = Masked().eval(), torch.randn(2, 5, 8)
    graph = trace(net, x)
    assert torch.equal(graph(x), net(x))
    with pytest.raises(BudgetError, match="nobody knows what second .* whose number of rows depends on data"):
        sbs_fx.compress(net, x, budget=0.5)
    result = sbs_fx.compress(net, x, budget=0.5, config=sbs_fx.Config(uncounted="ignore"))
    assert torch.isfinite(result.model(torch.randn(3, 5, 8))).all()


def test_complex_numbers_stay_as_they_are() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(6, 3)
            self.weight = nn.Parameter(torch.randn(8, 6, 2))

        def forward(self, x: Tensor) -> Tensor:
            f = torch.fft.rfft2(self.conv(x))
            f = torch.einsum("bixy,io->boxy", f, torch.view_as_complex(self.weight))
            return self.head(torch.fft.irfft2(f, s=x.shape[-2:]).mean((2, 3)))

    net = Spectral().eval()
    graph = trace(net, X)
    cost = cost_model(graph, channel_groups(graph))
    assert cost.weights.keys() == {"conv", "head"}
    assert cost.reference.macs > 3 * 8 * 9 * 48 + 8 * 6 * 8 * 4
    assert sbs_fx.compress(net, X, budget=0.95).model(X).shape == (2, 3)


def test_overlaps_of_boxes_are_counted_however_many_stay() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.conv(x).flatten(2).transpose(1, 2).flatten(0, 1)
            return rows[torchvision.ops.nms(rows[:, :4], rows[:, 4], 0.5)]

    graph = trace(Boxes().eval(), X)
    cost = cost_model(graph, channel_groups(graph))
    assert not cost.uncounted
    assert cost.reference.macs == 3 * 5 * 48 + 48**2


def test_what_is_read_in_boxes_is_counted_and_passes_channels() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 5, 1), nn.Linear(5 * 4, 2)

        def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
            number = torch.arange(x.shape[0], dtype=x.dtype)[:, None, None].expand(-1, boxes.shape[1], 1)
            rows, y = torch.cat([number, boxes], -1).flatten(0, 1), self.conv(x)
            fixed = torchvision.ops.roi_align(y, rows, 2, sampling_ratio=3)
            return self.head((fixed + torchvision.ops.roi_align(y, rows, 2)).flatten(1))

    graph = trace(Boxes().eval(), (X, torch.rand(2, 7, 4)))
    groups = channel_groups(graph)
    cost = cost_model(graph, groups)
    assert not cost.uncounted
    assert [len(g.members) for g in groups.values()] == [3]
    height, width = (-(-n // 2) for n in X.shape[2:])
    each = 7 * 5 * 2 * 2 * 4
    assert cost.reference.macs == 3 * 5 * 48 + each * (3 * 3 + height * width) + 7 * 5 * 4 * 2
