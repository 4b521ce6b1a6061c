"""Ranges against exact computation, on graphs whose statistics are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sbs_fx.calibration.calibrate import METHODS, Observations, calibrate, observe
from sbs_fx.passes.capture.trace import trace
from sbs_fx.passes.channels.groups import channel_groups
from sbs_fx.passes.gates.insertion import activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.plan.errors import DataError, InputError, MethodError, WeightsError
from sbs_fx.quantizer.ranges import grid_of
from tests.networks.models import SMALLEST, example
from tests.oracles.gated import error_of

# Kinds of block that differ in what a gate sees: computed and shared weights, several operands, signs, statistics.
NETWORKS = [
    "residual",
    "squeeze_excite",
    "lstm",
    "standardised",
    "summed_weights",
    "shared",
    "transposed_conv",
    "channel_conv",
    "gated_mlp",
    "token_mixing",
    "attention",
    "relative_attention",
]


def gated_network(module: nn.Module, x: Tensor, bits: int = 4) -> fx.GraphModule:
    graph_module = trace(module, x)
    gated = insert_gates(graph_module, channel_groups(graph_module), channels=False)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), bits), dict.fromkeys(activation_gates(gated), bits))
    return gated


def ranges(gated: fx.GraphModule) -> dict[str, Tensor]:
    gates = {
        **{f"w {n}": g for n, g in weight_gates(gated).items()},
        **{f"a {n}": g for n, g in activation_gates(gated).items()},
    }
    return {name: gate.range.detach().clone() for name, gate in gates.items()}


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    for norm in (layers[1], layers[6]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return layers.eval()


class Together(nn.Module):
    """Networks that read the same input, as one module: one export costs little more than the first network's."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: SMALLEST[name]() for name in names})
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(x) for network in self.networks.values())


def test_every_network_calibrates_with_and_without_data() -> None:
    x = example(NETWORKS[0])
    gated = gated_network(Together(NETWORKS), x)
    tensors = {
        n: t.clone()
        for n, t in gated.state_dict().items()
        if not n.startswith("activation_gates") and ".range" not in n
    }
    state = torch.get_rng_state()
    results = []
    for data in (None, [(x, torch.zeros(2, dtype=torch.int64)), x]):
        calibrate(gated, data, inputs=(x,))
        results.append(ranges(gated))
        calibrate(gated, data, inputs=(x,))
        assert all(torch.equal(value, results[-1][n]) for n, value in ranges(gated).items())
        assert all(bool((value > 0).all() and value.isfinite().all()) for value in results[-1].values())
        assert all(bool(torch.isfinite(y).all()) for y in gated(x))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, gated.state_dict()[n]) for n, t in tensors.items())
    free, observed = results
    assert sum(not torch.equal(free[n], observed[n]) for n in free) > len(activation_gates(gated)) / 2
    assert all(torch.equal(free[n], observed[n]) for n in free if n.startswith("w "))


@pytest.mark.parametrize("data", [None, [torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)]])
def test_one_run_serves_all_bitwidths(data: list[Tensor] | None) -> None:
    x = torch.randn(2, 3, 8, 8)
    gated, again = gated_network(conv_net(), x), gated_network(conv_net(), x)
    observations = observe(gated, data, inputs=(x,))
    for bits in (2, 5, 8):
        for network in (gated, again):
            apply_bits(
                network, dict.fromkeys(weight_gates(network), bits), dict.fromkeys(activation_gates(network), bits)
            )
        observations.set_ranges()
        calibrate(again, data, inputs=(x,))
        assert all(torch.equal(value, ranges(again)[name]) for name, value in ranges(gated).items())


def test_minmax_takes_in_exactly_what_occurs() -> None:
    """Observed by running the float module by hand."""
    module = conv_net()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    gated = gated_network(module, batches[0])
    calibrate(gated, [(b, torch.zeros(4, dtype=torch.int64)) for b in batches], inputs=(batches[0],), method="minmax")
    with torch.no_grad():
        values = [torch.cat([module[:stop](b).flatten() for b in batches]) for stop in (0, 5, 9)]
    for gate, x in zip(activation_gates(gated).values(), values, strict=True):
        low, high, _ = (float(g) * float(gate.scale()) for g in grid_of(gate))
        ends = min(float(x.min()), 0), float(x.max())
        assert (low, high) == pytest.approx(ends, abs=0.51 * float(gate.scale()))  # as zero is on the grid
        assert high - low == pytest.approx(ends[1] - ends[0], rel=1e-5)
    weight = module[0].weight.detach()
    gate = weight_gates(gated)["0"]
    assert torch.allclose(gate(weight).abs().amax((1, 2, 3)), weight.abs().amax((1, 2, 3)))
    again = gated_network(module, batches[0])
    calibrate(again, batches, inputs=(batches[0],), method="percentile", percentile=100)
    for name, value in ranges(again).items():
        if name.startswith("a "):
            assert torch.equal(value, ranges(gated)[name])


def test_no_more_batches_than_allowed() -> None:
    x = torch.randn(2, 3, 8, 8)
    gated = gated_network(conv_net(), x)
    calibrate(gated, [x, 100 * x], inputs=(x,), max_batches=1, method="minmax")
    first = ranges(gated)
    calibrate(gated, [x], inputs=(x,), method="minmax")
    assert all(torch.equal(value, first[n]) for n, value in ranges(gated).items())


@pytest.mark.parametrize("spread", [3.0, 4.0])
def test_data_free_ranges_are_those_of_the_batch_norms(spread: float) -> None:
    """beta + spread * |gamma| through ReLU and max pool; SiLU, which is not monotone, at a fine grid of values."""
    module, x = conv_net(), torch.randn(2, 3, 8, 8)
    gated = gated_network(module, x, bits=8)
    calibrate(gated, inputs=(x,), method="minmax", spread=spread)
    _, pooled, flat = activation_gates(gated).values()
    beta, gamma = module[1].bias.detach(), module[1].weight.detach().abs()
    assert not pooled.signed
    assert pooled.range.item() == pytest.approx(float((beta + spread * gamma).max()), rel=1e-6)
    beta, gamma = module[6].bias.detach(), module[6].weight.detach().abs()
    values = nn.functional.silu(beta + torch.linspace(-spread, spread, 2001)[:, None] * gamma)
    assert 2 * flat.range.item() == pytest.approx(float(values.max() - values.min()), rel=1e-3)


def test_data_free_least_error_is_that_of_the_channels_distribution() -> None:
    module, x = conv_net(), torch.randn(2, 3, 8, 8)
    gated = gated_network(module, x, bits=2)
    calibrate(gated, inputs=(x,))
    gate = list(activation_gates(gated).values())[1]
    drawn = (module[1].bias + torch.randn(100_000, 8) * module[1].weight).detach().relu()
    tops = torch.linspace(0.02, 1, 99) * float(drawn.max())
    best = min(float(error_of(gate, drawn, top.view(1))) for top in tops)
    calibrate(gated, inputs=(x,))
    assert float((gate(drawn).detach() - drawn).square().sum()) <= 1.03 * best


def test_data_free_batch_norms_use_the_batch() -> None:
    """After an add the distribution is unknown; the synthetic run gives unit deviation, whatever the running one."""

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
            nn.init.constant_(self.norm.running_var, 1e6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.last(y + y)

    x = torch.randn(2, 3, 16, 16)
    gated = gated_network(Add().eval(), x, bits=8)
    calibrate(gated, inputs=(x,), method="percentile", percentile=68.27)
    gate = list(activation_gates(gated).values())[-1]
    assert gate.range.item() == pytest.approx(2.0, rel=0.1)  # one deviation of y + y


@pytest.mark.parametrize(
    ("size", "pooled", "batches"),
    [(256, False, [1, 1]), (256, True, [2, 2]), (32, False, [64, 64]), (512, False, [1]), (512, True, [2])],
)
def test_data_free_input_is_no_more_than_statistics_need(
    size: int, pooled: bool, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One large image does, unless a batch norm sees a single value of it; small images are many."""
    module = nn.Sequential(
        nn.Conv2d(3, 4, 7, 8),
        nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 1),
    ).eval()
    x = torch.randn(2, 3, size, size)
    gated = gated_network(module, x, bits=8)
    seen: list[int] = []
    monkeypatch.setattr(Observations, "add", lambda observations, index, batch: seen.append(len(batch[0])))
    calibrate(gated, inputs=(x,))
    assert seen == batches


def test_zeros_and_constants_get_a_range_that_keeps_them() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    nn.init.zeros_(module[0].weight)
    nn.init.constant_(module[0].bias, -1.0)
    nn.init.constant_(module[2].weight, 0.3)
    x = torch.full((2, 3, 4, 4), 0.7)
    for method in METHODS:
        gated = gated_network(module, x, bits=2)
        calibrate(gated, [x], inputs=(x,), method=method)
        assert all(float(value.min()) >= 0.1 for value in ranges(gated).values())
        assert torch.allclose(gated(x), module(x))


def test_open_gates_keep_their_range_and_searching_ones_get_one() -> None:
    x = torch.randn(2, 3, 8, 8)
    gated = gated_network(conv_net(), x)
    calibrate(gated, [x], inputs=(x,))
    fixed = ranges(gated)
    opened = gated_network(conv_net(), x, bits=32)
    calibrate(opened, [x], inputs=(x,))
    assert all(torch.equal(value, torch.ones_like(value)) for value in ranges(opened).values())
    for gate in (*weight_gates(opened).values(), *activation_gates(opened).values()):
        gate.search()
    calibrate(opened, [x], inputs=(x,))
    assert all(torch.equal(value, fixed[n]) for n, value in ranges(opened).items())


def test_mode_is_kept_and_several_inputs_are_taken() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.first(x) + self.second(y)

    x, y = torch.randn(3, 6), torch.randn(3, 4)
    graph_module = trace(Two(), (x, y))
    gated = insert_gates(graph_module, channel_groups(graph_module), channels=False)
    apply_bits(gated, {"first": 4, "second": 4}, dict.fromkeys(activation_gates(gated), 8))
    gated.train()
    calibrate(gated, [(x, y), ((x, y), torch.zeros(3, dtype=torch.int64))], inputs=(x, y), method="minmax")
    assert gated.training
    widths = [2 * float(g.range) for g in activation_gates(gated).values()]
    assert widths == pytest.approx([float(x.max() - x.min()), float(y.max() - y.min())])
    calibrate(gated, inputs=(x, y))
    with pytest.raises(InputError, match="1 example inputs for a graph that takes 2"):
        calibrate(gated, inputs=(x,))


def raising() -> Any:
    yield torch.zeros(2, 3, 8, 8)
    raise RuntimeError("reader died")


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, DataError, "no batch"),
        (raising(), {}, DataError, "RuntimeError at batch 1: reader died"),
        ([torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), math.nan)], {}, DataError, "NaN or Inf in batch 1"),
        ([torch.full((2, 3, 8, 8), math.inf)], {}, DataError, "NaN or Inf in batch 0"),
        ([torch.zeros(2, 3, 9, 8)], {}, DataError, r"batch 0 has shape \(2, 3, 9, 8\); the graph takes \(batch, 3, 8"),
        ([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], {}, DataError, "normalised"),
        ([torch.full((2, 3, 8, 8), -3e38)], {}, DataError, "activation .* is NaN or Inf at batch 0"),
        (None, {"method": "guess"}, MethodError, "unknown calibration method 'guess'"),
        (None, {"max_batches": 0}, InputError, "max_batches 0"),
        (None, {"percentile": 101}, InputError, "percentile 101"),
    ],
)
def test_bad_input(data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    module = conv_net()
    nn.init.constant_(module[0].weight[0], -1.0)  # reason: so that the largest finite input overflows
    gated = gated_network(module, x)
    with pytest.raises(error, match=message):
        calibrate(gated, data, inputs=(x,), **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_are_named(value: float) -> None:
    module, x = conv_net(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        module[5].weight[3, 2, 0, 0] = value
    gated = gated_network(module, x)
    with pytest.raises(WeightsError, match="weight '5'") as caught:
        calibrate(gated, [x], inputs=(x,))
    assert caught.value.names == ("5",)
