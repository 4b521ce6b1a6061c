"""What a report measures, by hand; and each warning with a network that deserves it and one that does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sbs_fx
from sbs_fx import Config, Keep
from sbs_fx.passes import channel_groups, trace
from sbs_fx.passes.dialects import static_of
from sbs_fx.report import Report
from sbs_fx.report.steps import steps_of


class Block(nn.Module):
    """Two convolutions, of which the second reads a tensor whose channels are as far apart as is asked for."""

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 4)
        self.register_buffer("scales", scales.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu() * self.scales
        return self.head(self.second(y).relu().mean((2, 3)))


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def report_of(scales: Tensor | None = None, **options: Any) -> tuple[nn.Module, sbs_fx.Result]:
    torch.manual_seed(0)
    net = Block(torch.ones(16) if scales is None else scales).eval()
    options = {"budget": 0.07, "method": "uniform", "data": [images()], **options}
    return net, sbs_fx.compress(net, images(), **options)


def test_tensors_by_hand() -> None:
    net, result = report_of(config=Config(ranges="percentile", weight_bits=8, activation_bits=4, prune=False))
    row = next(row for row in result.report.tensors if row.name == "x")
    gate = result.gated.get_submodule("activation_gates.x")
    x, rounded = images(), gate(images()).detach()
    noise = (rounded - x).square().sum()
    assert row.sqnr == pytest.approx(10 * math.log10(float(x.square().sum() / noise)), rel=1e-4)
    top, bottom = float(rounded.max()), float(rounded.min())
    beyond = (x > top + row.step / 2) | (x < bottom - row.step / 2)
    assert row.clipped == pytest.approx(float(beyond.float().mean()), abs=2e-3)
    assert (row.low, row.high, row.bits, row.channels) == (float(x.min()), float(x.max()), 8, 3)
    most = x.abs().amax((0, 2, 3))
    assert row.spread == pytest.approx(float(most.max() / most.min()))
    assert row.reader == "conv2d"
    with torch.no_grad():
        wanted, given = net(x).log_softmax(1), result.model(x).log_softmax(1)
    last = result.report.stages[-1]
    assert last.name == "static"
    assert last.divergence == pytest.approx(
        float(F.kl_div(given, wanted, reduction="batchmean", log_target=True)), rel=0.1
    )
    assert last.same == float((given.argmax(1) == wanted.argmax(1)).float().mean())


def test_noise_of_weights_is_that_of_their_codes() -> None:
    """Counted again from the file's codes and scales."""
    _, result = report_of(config=Config(prune=False, constraints=[Keep("second", weight_bits=4)]), budget=0.9)
    rows = {row.node: row for row in result.report.layers}
    weight = result.gated.get_parameter("second.weight").detach()
    (name,) = [name for name in static_of(result.model).weights if name.startswith("second")]
    codes, scale = (dict(result.model.named_buffers())[each] for each in (name, f"{name}_scale"))
    rounded = codes.double() * scale.double().reshape(-1, 1, 1, 1)
    noise = (rounded - weight).square().sum()
    assert rows["conv2d_1"].weight_sqnr == pytest.approx(float(10 * (weight.square().sum() / noise).log10()), abs=0.05)
    assert rows["conv2d_1"].weight_sqnr < rows["linear"].weight_sqnr, "4 bits and 8"


def test_stages_are_those_that_ran() -> None:
    def names(**options: Any) -> list[str]:
        return [row.name for row in report_of(**options)[1].report.stages]

    assert names() == ["quantised", "refitted", "static"]
    assert names(budget=0.03) == ["pruned", "quantised", "refitted", "static"]
    assert names(config=Config(quantise=False), budget=sbs_fx.Budget(macs=0.7)) == ["pruned", "refitted", "static"]
    labelled = [(images(), torch.arange(16) % 4)]
    assert names(config=Config(epochs=1), data=labelled) == ["quantised", "fine-tuned", "static"]


def test_nothing_is_lost_in_float() -> None:
    _, result = report_of(config=Config(quantise=False, prune=False), budget=1.0)
    assert [row.divergence for row in result.report.stages] == pytest.approx([0] * len(result.report.stages), abs=1e-6)
    assert not result.report.tensors
    assert not result.report.warnings


def rules(report: Report) -> dict[str, str]:
    return {w.rule: w.where for w in report.warnings}


def test_channels_that_share_a_range_and_do_not_fit_it() -> None:
    _, report = report_of(torch.logspace(0, -4.3, 16))
    assert rules(report.report)["channel ranges"] == "mul"
    (warning,) = [w for w in report.report.warnings if w.rule == "channel ranges"]
    spread = next(row.spread for row in report.report.tensors if row.name == "mul")
    assert f"channels range {spread:,.0f} to 1 within one tensor of 8 bits" in warning.text
    assert "channel ranges" in str(report.report)
    assert "channel ranges" not in rules(report_of()[1].report)


def test_dead_channels() -> None:
    _, result = report_of(torch.tensor([0.0] * 5 + [1.0] * 11))
    row = next(row for row in result.report.tensors if row.name == "mul")
    assert (row.dead, row.channels) == (5, 16)
    assert rules(result.report)["dead channels"] == "mul"


def test_a_head_below_eight_bits_and_float_islands() -> None:
    _, result = report_of(
        config=Config(constraints=[Keep("head", weight_bits=4), Keep("second", weight_bits=32, activation_bits=32)]),
        budget=0.9,
    )
    found = rules(result.report)
    assert found["head"].startswith("head")
    assert found["float island"].startswith("second")
    assert not {"head", "float island"} & rules(report_of()[1].report).keys()


def test_counts_that_are_no_multiples() -> None:
    config = Config(round_to=1, quantise=False)
    _, result = report_of(config=config, budget=sbs_fx.Budget(macs=0.6))
    assert "multiples" in rules(result.report)
    assert "multiples" not in rules(
        report_of(config=Config(round_to=8, quantise=False), budget=sbs_fx.Budget(macs=0.6))[1].report
    )


def test_limits_and_names() -> None:
    _, result = report_of(budget=0.03)
    (limit,) = result.report.limits
    assert (limit.measure, limit.limit) == ("bops", pytest.approx(0.03))
    assert limit.reached == result.cost.bops / result.baseline_cost.bops <= 0.03
    assert result.report.model == "Block"
    assert result.report.versions["torch"] == torch.__version__.partition("+")[0]
    assert Report.from_json(result.report.to_json()) == result.report


def test_steps_are_in_order_and_name_their_source() -> None:
    steps = steps_of(channel_groups(trace(Block(torch.ones(16)), images())))
    assert [s.operator for s in steps] == ["input", "conv2d", "relu", "mul", "conv2d", "relu", "mean", "linear"]
    assert all(place < i for i, step in enumerate(steps) for place in step.reads)
    assert steps[1].module == "first"
    assert steps[1].shape == (0, 16, 8, 8)
    assert steps[1].source.startswith("test_measured.py:")
    line = int(steps[1].source.partition(":")[2])
    assert "self.first(x).relu()" in Path(__file__).read_text().splitlines()[line - 1]
    assert steps[1].groups == ("first.weight:0",)
    assert steps[-1].pinned == ("model output",)
