"""Reconstruction and rounding in closed form: exact where there is an exact answer, else never worse than before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sbs_fx.calibration.blocks import cut_points, subgraph
from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.calibration.columns import Product
from sbs_fx.calibration.reconstruction import Reconstruction, _ends, reconstruct
from sbs_fx.calibration.rounding import compensated, input_moments, products, weight_parameters
from sbs_fx.passes import activation_gates, apply_bits, channel_groups, insert_gates, slim, trace, weight_gates
from sbs_fx.plan.errors import DataError, GraphError
from sbs_fx.quantizer.ranges import set_range, weight_top
from tests.networks.models import SMALLEST, example
from tests.oracles.gated import check_static, quantiser
from tests.oracles.search_runs import IMAGES, network

FAST = Reconstruction(images=64, batch=16, steps=20)


def prepared(module: nn.Module, x: Tensor, data: Tensor, bits: int = 2, kept: Any = None) -> Any:
    graph = trace(module.eval(), x)
    groups = channel_groups(graph)
    slimmed = slim(graph, groups, kept) if kept else graph
    gated = insert_gates(slimmed, groups, channels=False)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), bits), dict.fromkeys(activation_gates(gated), 4))
    calibrate(gated, [data], inputs=(x,))
    return graph, groups, gated


def distance(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).square().mean())


# The whole


@pytest.mark.parametrize("pruned", [False, True])
def test_reconstructed_is_closer_static_and_within_a_step(pruned: bool) -> None:
    module, data = network(), torch.randn(64, 1, 8, 8)
    kept = {"0.weight:0": [0, 1, 2, 5, 9, 11, 12, 15]} if pruned else None
    graph, groups, gated = prepared(module, IMAGES, data, kept=kept)
    weights = {n: p.detach().clone() for n, p in weight_parameters(gated).items()}
    before = distance(gated, graph, data)
    trainable = {n: p.requires_grad for n, p in gated.named_parameters()}
    rows = reconstruct(gated, graph, [data[:32], data[32:]], inputs=(IMAGES,), groups=groups, kept=kept, settings=FAST)
    assert len(rows) == (3 if pruned else 4)  # reason: pruned, what the second layer gives is a peak, and no cut
    assert all(row.after <= row.before for row in rows)
    assert distance(gated, graph, data) < 0.7 * before
    assert trainable == {n: p.requires_grad for n, p in gated.named_parameters()}
    assert not gated.training
    gates, moved = weight_gates(gated), 0
    for name, parameter in weight_parameters(gated).items():
        value = parameter.detach()
        if not torch.equal(value, weights[name]):
            assert torch.allclose(gates[name](value), value, atol=1e-6)
            moved += 1
    assert moved
    check_static(gated, data)


def test_what_errs_by_next_to_nothing_is_left_as_it_is() -> None:
    data = torch.randn(64, 1, 8, 8)
    graph, groups, gated = prepared(network(), IMAGES, data, bits=8)
    apply_bits(gated, {}, dict.fromkeys(activation_gates(gated), 8))
    calibrate(gated, [data], inputs=(IMAGES,))
    before = {n: t.clone() for n, t in gated.state_dict().items() if isinstance(t, Tensor)}
    rows = reconstruct(gated, graph, [data], inputs=(IMAGES,), groups=groups, settings=FAST)
    assert all(row.after == row.before > 0 for row in rows)
    assert all(torch.equal(gated.state_dict()[n], t) for n, t in before.items())
    closer = reconstruct(
        gated, graph, [data], inputs=(IMAGES,), groups=groups, settings=Reconstruction(steps=20, tolerance=0)
    )
    assert any(row.after < row.before for row in closer)


def test_the_same_seed_gives_the_same_network() -> None:
    data = torch.randn(32, 1, 8, 8)
    results = []
    for _ in range(2):
        graph, groups, gated = prepared(network(), IMAGES, data)
        reconstruct(gated, graph, [data], inputs=(IMAGES,), groups=groups, settings=FAST, seed=3)
        results.append({n: t for n, t in gated.state_dict().items() if isinstance(t, Tensor)})
    assert all(torch.equal(t, results[1][n]) for n, t in results[0].items())


@pytest.mark.parametrize(
    "name", ["depthwise", "dense", "attention", "tokens-and-back", "standardised", "shared", "lstm"]
)
def test_kinds_of_networks(name: str) -> None:
    x = example(name)
    data = torch.randn(8, *x.shape[1:])
    graph, groups, gated = prepared(SMALLEST[name](), x, data, bits=4)
    before = distance(gated, graph, data)
    rows = reconstruct(gated, graph, [data], inputs=(x,), groups=groups, settings=FAST)
    assert all(row.after <= row.before for row in rows)
    assert distance(gated, graph, data) <= before
    check_static(gated, data)


@pytest.mark.parametrize("name", ["channel_conv", "residual", "attention"])
def test_pruned_networks(name: str) -> None:
    """Targets are the float network's at the kept coordinates, also around operators that run at full width."""
    x = example(name)
    data = torch.randn(8, *x.shape[1:])
    groups = channel_groups(trace(SMALLEST[name](), x))
    kept = {n: list(range(0, g.size, 2)) for n, g in groups.items() if g.primary and g.size > 3}
    graph, groups, gated = prepared(SMALLEST[name](), x, data, bits=4, kept=kept)
    before = distance(gated, graph, data)
    reconstruct(gated, graph, [data], inputs=(x,), groups=groups, kept=kept, settings=FAST)
    assert kept
    assert distance(gated, graph, data) <= before
    check_static(gated, data)


def test_biases_alone_make_means_right() -> None:
    """No batch norm, no steps: what the first layer gives has the float network's mean in each channel."""
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    data = torch.randn(16, 1, 8, 8) + 0.5
    graph, groups, gated = prepared(module, IMAGES, data)
    reconstruct(gated, graph, [data], inputs=(IMAGES,), groups=groups, settings=Reconstruction(steps=0))
    for end in ("conv2d", "linear"):
        with torch.no_grad():
            got, wanted = (subgraph(g, None, [end])(data)[0] for g in (gated, graph))
        others = [i for i in range(got.ndim) if i != 1]
        assert torch.allclose(got.mean(others), wanted.mean(others), atol=1e-5)


def test_one_image_and_zero_weights() -> None:
    module = network()
    nn.init.zeros_(module[4].weight)
    graph, groups, gated = prepared(module, IMAGES, IMAGES[:1])
    reconstruct(gated, graph, [IMAGES[:1]], inputs=(IMAGES,), groups=groups, settings=FAST)
    assert all(bool(torch.isfinite(p).all()) for p in gated.parameters())
    check_static(gated, IMAGES)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_closed_form_is_better_than_rounding(bits: int) -> None:
    data = torch.randn(256, 1, 8, 8)
    graph, groups, gated = prepared(network(), IMAGES, data, bits=bits)
    before = distance(gated, graph, data)
    reconstruct(gated, graph, [data], inputs=(IMAGES,), groups=groups)
    assert distance(gated, graph, data) < 0.5 * before
    check_static(gated, data)


def test_what_cannot_be_reconstructed() -> None:
    graph, groups, gated = prepared(network(), IMAGES, IMAGES)
    with pytest.raises(DataError, match="no batch"):
        reconstruct(gated, graph, [], inputs=(IMAGES,), groups=groups)
    with pytest.raises(GraphError, match="slim graph whose bits are fixed"):
        reconstruct(insert_gates(graph, groups), graph, [IMAGES], inputs=(IMAGES,), groups=groups)


# Blocks


@pytest.mark.parametrize("name", ["residual", "dense", "attention", "class-token-relative", "odd-sizes", "lstm"])
def test_blocks_one_after_the_other_are_the_graph(name: str) -> None:
    x = example(name, batch=3)
    graph = trace(SMALLEST[name](), example(name))
    groups = channel_groups(graph)
    values: list[Tensor] = []
    begin = None
    ends = _ends(insert_gates(graph, groups, channels=False), groups)
    with torch.no_grad():
        for names in ends:
            values = list(subgraph(graph, begin, names)(x, *values))
            begin = names[0]
        assert torch.equal(values[0], graph(x))


def test_cuts_are_behind_layers_and_at_sums() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.c((self.b(y) + y).relu()).mean((2, 3))

    graph = trace(Net().eval(), IMAGES)
    groups = channel_groups(graph)
    gated = insert_gates(graph, groups, channels=False)
    assert [names for (names,) in _ends(gated, groups)] == ["relu", "relu_1", "mean"]
    assert cut_points(gated, groups.inference.layers, {"conv2d", "add"}) == ["conv2d", "add"]


def test_a_tensor_much_larger_than_its_neighbours_is_no_cut() -> None:
    """All images of it are held at once: in networks with expanded widths that is most of the memory."""
    wide = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.Conv2d(2, 5, 1), nn.Conv2d(5, 2, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)
    )
    graph = trace(wide.eval(), IMAGES)
    groups = channel_groups(graph)
    gated = insert_gates(graph, groups, channels=False)
    assert [names for (names,) in _ends(gated, groups)] == ["conv2d", "conv2d_2", "conv2d_3", "conv2d_4"]


# Rounding in closed form


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, groups=4), nn.Conv1d(6, 4, 3), nn.Linear(9, 5)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_moments_are_those_of_the_output_and_rounding_lowers_its_error(layer: Any, bits: int) -> None:
    layer.reset_parameters()  # reason: it was made when tests were collected, from whatever seed there was
    layer.bias = None
    shape = (32, 9) if isinstance(layer, nn.Linear) else (32, layer.in_channels, *[7] * (layer.weight.ndim - 2))
    mixed = torch.randn(shape) + torch.randn(shape[0], *[1] * (len(shape) - 1))  # so that columns go together
    graph = trace(nn.Sequential(layer).eval(), torch.randn(2, *shape[1:]))
    gated = insert_gates(graph, channel_groups(graph), channels=False)
    moments = input_moments(gated, [(x,) for x in mixed.split(16)], ["0"])["0"].matrix
    weight, (_, product) = layer.weight.detach(), products(gated)["0"]

    def power(w: Tensor) -> Tensor:
        rows = w.reshape(len(moments), -1, moments.shape[2])
        return ((rows @ moments) * rows).sum(2).flatten()

    with torch.no_grad():
        y = layer(mixed)
    channel = y.ndim - 1 if isinstance(layer, nn.Linear) else 1
    direct = y.square().mean([i for i in range(y.ndim) if i != channel])
    assert torch.allclose(power(weight), direct, rtol=1e-3)
    gate = quantiser(bits, channels=len(weight))
    set_range(gate, weight_top(weight, gate, "mse"))
    with torch.no_grad():
        rounded, nearest = compensated(weight, gate, product, moments), gate(weight)
        assert torch.allclose(gate(rounded), rounded, atol=1e-6)
    assert bool((power(rounded - weight) <= power(nearest - weight)).all())
    assert not isinstance(layer, nn.Conv2d) or power(rounded - weight).sum() < 0.95 * power(nearest - weight).sum()


def test_columns_without_input_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(4, 6)
    gate, product = quantiser(4, channels=4), Product(1, (4, 6))
    set_range(gate, weight_top(weight, gate, "mse"))
    with torch.no_grad():
        assert torch.allclose(compensated(weight, gate, product, torch.zeros(1, 6, 6)), gate(weight))
        assert torch.allclose(compensated(weight, gate, product, torch.eye(6)[None]), gate(weight))


def test_weights_that_are_computed_or_read_elsewhere_have_no_parameter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.computed, self.read = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(self.plain(x), self.computed.weight * 2)
            return self.read(y) + self.read.weight.sum(1)

    graph = trace(Net().eval(), torch.randn(2, 6))
    gated = insert_gates(graph, channel_groups(graph))
    assert isinstance(gated, fx.GraphModule)
    assert weight_parameters(gated).keys() == {"plain"}
