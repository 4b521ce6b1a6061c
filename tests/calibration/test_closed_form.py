"""The closed form: a layer as a matrix product, least squares on what it reads now, channels that went made good."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.calibration.closed_form import Moments, intercept, refit
from sbs_fx.calibration.columns import Product
from sbs_fx.calibration.reconstruction import Reconstruction, reconstruct
from sbs_fx.calibration.rounding import DAMPING
from sbs_fx.passes import activation_gates, apply_bits, channel_groups, insert_gates, slim, trace, weight_gates
from tests.oracles.gated import quantiser

LAYERS = [
    (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False), (6, 9, 11)),
    (nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2), bias=False), (6, 9, 11)),
    (nn.Conv2d(6, 8, 4, padding="same", bias=False), (6, 9, 11)),
    (nn.Conv2d(6, 8, 4, padding="valid", bias=False), (6, 9, 11)),
    (nn.Conv1d(6, 8, 3, padding="same", dilation=2, bias=False), (6, 9)),
    (nn.Conv3d(4, 8, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2), groups=4, bias=False), (4, 5, 6, 7)),
    (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, bias=False), (6, 5, 4)),
    (nn.ConvTranspose2d(6, 8, 2, stride=2, padding=1, bias=False), (6, 5, 4)),
    (nn.ConvTranspose1d(6, 8, 4, stride=3, groups=2, dilation=2, bias=False), (6, 5)),
    (nn.Linear(6, 8, bias=False), (6,)),
    (nn.Linear(6, 8, bias=False), (3, 4, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
@pytest.mark.parametrize("count", [7, 1000])
def test_rows_times_columns_is_what_the_layer_gives(layer: Any, shape: tuple[int, ...], count: int) -> None:
    x = torch.randn(2, *shape)
    graph = trace(nn.Sequential(layer).eval(), x)
    node = next(n for n in graph.graph.nodes if n.name.startswith(("conv", "linear")))
    weight = layer.weight.detach()
    product = Product.of(node, weight)
    assert product is not None
    with torch.no_grad():
        y = layer(x)
    places = product.places(y, count, torch.Generator().manual_seed(0))
    rows, columns = product.rows(weight), product.columns(x, y.shape, places)
    assert rows.shape[2] == columns.shape[1] == product.width
    assert torch.allclose(rows @ columns, product.outputs(y, places), atol=1e-5)
    assert torch.equal(product.weight(rows), weight)


def test_moments_in_parts_are_those_of_all_samples() -> None:
    x, y = torch.randn(2, 5, 300) * 3 + 100, torch.randn(2, 4, 300) - 50
    moments = Moments()
    for part in range(0, 300, 100):
        moments.add(x[:, :, part : part + 100], y[:, :, part : part + 100])
    found = moments.finished(centred=True)
    xd, yd = x.double(), y.double()
    xc, yc = xd - xd.mean(2, keepdim=True), yd - yd.mean(2, keepdim=True)
    for value, expected in (
        (found.mean_x, xd.mean(2)),
        (found.mean_y, yd.mean(2)),
        (found.xx, xc @ xc.mT / 300),
        (found.yx, yc @ xc.mT / 300),
        (found.yy, yc.square().mean(2)),
    ):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-4)
    whole = moments.finished(centred=False)
    assert torch.allclose(whole.xx, xd @ xd.mT / 300, rtol=1e-5)


def test_a_fit_is_least_squares_drawn_to_the_weight() -> None:
    """Against torch.linalg.lstsq on the samples themselves, with rows that stand for the damping."""
    weight, product = torch.randn(4, 6), Product(1, (4, 6))
    x = torch.randn(6, 500) * torch.linspace(0.5, 2, 6)[:, None]
    y = torch.randn(4, 6) @ x + 0.1 * torch.randn(4, 500) + 3
    moments = Moments()
    moments.add(x[None], y[None])
    statistics = moments.finished(centred=True)
    gate = quantiser(32, channels=4)
    fitted = refit(weight, gate, product, statistics)
    xc, yc = x.double() - x.mean(1, keepdim=True), y.double() - y.mean(1, keepdim=True)
    damping = (500 * DAMPING * xc.square().mean()).sqrt()
    left = torch.cat([xc, damping * torch.eye(6)], 1).T
    right = torch.cat([yc, damping * weight.double()], 1).T
    expected = torch.linalg.lstsq(left, right).solution.T
    assert torch.allclose(fitted.double(), expected, atol=1e-5)
    added = intercept(product.rows(fitted), statistics)
    assert torch.allclose((fitted @ x).mean(1) + added.float(), y.mean(1), atol=1e-4)
    one = Moments()  # a sample says little of six columns
    one.add(x[None, :, :2], y[None, :, :2])
    moved = refit(weight, gate, product, one.finished(centred=True))
    assert 0 < float((moved - weight).norm()) < 0.5 * float((fitted - weight).norm())


class Twins(nn.Module):
    """Half of the channels of its first layer say what the other half says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3)
        with torch.no_grad():
            self.first.weight[4:] = self.first.weight[:4]
            self.first.bias[4:] = self.first.bias[:4]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).mean((2, 3))


def test_channels_that_others_stand_for_go_without_a_trace() -> None:
    x = torch.randn(64, 3, 10, 10)
    graph = trace(Twins().eval(), x[:2])
    groups = channel_groups(graph)
    kept = {next(name for name, group in groups.items() if group.size == 8): [0, 1, 2, 3]}
    gated = insert_gates(slim(graph, groups, kept), groups, channels=False)
    with torch.no_grad():
        wanted, cut = graph(x), gated(x)
        reconstruct(gated, graph, [x], inputs=(x[:2],), groups=groups, kept=kept, settings=Reconstruction(tolerance=0))
        mended = gated(x)
    assert float((cut - wanted).square().mean()) > 100 * float((mended - wanted).square().mean())


class Join(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.norm(self.layer(x))


@pytest.mark.parametrize("norm", [False, True])
def test_what_comes_in_wrong_by_the_other_way_is_made_good(norm: bool) -> None:
    """The stem's weights have 2 bits, the layer none: all that the stem does wrong and the layer can undo is undone."""
    x = torch.randn(64, 3, 8, 8)
    module = Join(norm).eval()
    if norm:
        nn.init.uniform_(module.norm.weight, 0.5, 1.5)
        nn.init.uniform_(module.norm.running_var, 0.5, 1.5)
    graph = trace(module, x[:2])
    groups = channel_groups(graph)
    gated = insert_gates(graph, groups, channels=False)
    apply_bits(gated, {"stem": 2, "layer": 32}, dict.fromkeys(activation_gates(gated), 32))
    reconstruct(gated, graph, [x], inputs=(x[:2],), groups=groups, settings=Reconstruction(tolerance=0))
    with torch.no_grad():
        assert float((gated(x) - graph(x)).square().mean()) < 1e-4 * float(graph(x).square().mean())
    assert not weight_gates(gated)["stem"].is_float


def test_a_bias_that_is_computed_is_left_to_what_computes_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shift, self.last = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.first(x).relu(), self.last.weight, self.shift(x).mean(0))

    x = torch.randn(64, 6)
    graph = trace(Net().eval(), x[:2])
    groups = channel_groups(graph)
    gated = insert_gates(graph, groups, channels=False)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), 2), dict.fromkeys(activation_gates(gated), 8))
    calibrate(gated, [x], inputs=(x[:2],))
    with torch.no_grad():
        before = float((gated(x) - graph(x)).square().mean())
        reconstruct(gated, graph, [x], inputs=(x[:2],), groups=groups, settings=Reconstruction(tolerance=0))
        assert float((gated(x) - graph(x)).square().mean()) < before


def test_a_result_that_is_added_to_itself_is_no_other_way() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y + y

    x = torch.randn(64, 3, 8, 8)
    graph = trace(Twice().eval(), x[:2])
    groups = channel_groups(graph)
    gated = insert_gates(graph, groups, channels=False)
    apply_bits(gated, {"layer": 4}, dict.fromkeys(activation_gates(gated), 8))
    calibrate(gated, [x], inputs=(x[:2],))
    reconstruct(gated, graph, [x], inputs=(x[:2],), groups=groups, settings=Reconstruction(tolerance=0))
    with torch.no_grad():
        assert float((gated(x) - graph(x)).square().mean()) < 1e-2 * float(graph(x).square().mean())
