"""A latency model: its two forms agree, it is measured once, and a budget in seconds is met in its terms."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sbs_fx
from sbs_fx.export import latency
from sbs_fx.export.benchmark import Timing
from sbs_fx.export.latency import Latency, LatencyModel, latency_model, random_counts
from sbs_fx.passes import ChannelGroups, CostModel, channel_groups, cost_model, trace
from sbs_fx.passes.channels.importance import kernel_multiple
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import MethodError
from tests.networks.small import Residual

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Measured:
    """A small network, measured once for all tests."""

    def __init__(self, folder: Path) -> None:
        self.model = Residual().eval()
        self.settings = Latency(backend="onnxruntime", samples=4, cache=str(folder))
        self.graph = trace(self.model, IMAGES)
        self.groups: ChannelGroups = channel_groups(self.graph)
        self.plain: CostModel = cost_model(self.graph, self.groups)
        self.found: LatencyModel = self.measure()
        self.cost = cost_model(self.graph, self.groups, self.found)

    def measure(self) -> LatencyModel:
        return latency_model(self.graph, self.groups, self.plain, (IMAGES,), self.settings)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    torch.manual_seed(0)
    return Measured(tmp_path_factory.mktemp("latency"))


def test_every_layer_has_a_row(measured: Measured) -> None:
    assert set(measured.found.layers) == {layer.node for layer in measured.plain.layers}
    assert all(factor >= 0 for row in measured.found.layers.values() for factor in row)
    assert measured.found.float_seconds > 0


def test_exact_and_differentiable_forms_agree(measured: Measured) -> None:
    for seed in range(5):
        counts = random_counts(measured.groups, random.Random(seed))
        sizes = {name: torch.tensor(float(count), requires_grad=True) for name, count in counts.items()}
        expected = measured.cost.expected(sizes, {}, {})["latency"]
        kept = {name: range(count) for name, count in counts.items()}
        plan = Plan(kept, dict.fromkeys(measured.cost.weights, 8))
        exact = measured.cost.evaluate(plan).seconds
        assert measured.cost.price(plan)["latency"] == pytest.approx(exact, rel=1e-12)
        assert isinstance(expected, Tensor)
        assert float(expected) == pytest.approx(exact, rel=1e-5)
        expected.backward()
        assert all(size.grad is None or float(size.grad) >= 0 for size in sizes.values())


def test_multiples_are_those_that_save_most(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(runners: dict[str, object], *_: object) -> list[Timing]:
        rounded = {name: -(-(64 - int(name)) // step) * step for name in runners}
        return [Timing(name, 1, 1e-3 + 1e-5 * count, 0.0, 0.0, None, "") for name, count in rounded.items()]

    monkeypatch.setattr(latency, "time_runners", times)
    monkeypatch.setattr(latency, "runner", lambda *_, **__: None)
    for step in (4, 8, 16, 32):  # a kernel that computes so many channels at a time
        assert latency.preferred_multiple(measured.settings) == step
    assert measured.found.multiple in (4, 8, 16, 32)
    wide = channel_groups(trace(nn.Sequential(nn.Conv2d(3, 128, 1), nn.Conv2d(128, 4, 1)), IMAGES))["0.weight:0"]
    found = LatencyModel(float_seconds=1.0, dense_seconds=1.0, layers={}, rest=(0.0, 0.0, 0.0), error=0.0, multiple=32)
    assert kernel_multiple(wide, None, found.multiple) == 32
    assert kernel_multiple(wide, None) == 16
    assert kernel_multiple(wide, 4, found.multiple) == 4


def test_it_is_measured_once(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_measure", lambda *_: pytest.fail("measured again"))
    assert measured.measure() == measured.found


def test_a_damaged_cache_is_measured_again(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = Path(measured.settings.cache or "").glob("latency-*.json")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    monkeypatch.setattr(latency, "_measure", lambda *_: measured.found)
    assert measured.measure() == measured.found
    assert path.read_text() == whole


@pytest.mark.parametrize("method", ["uniform", "opq"])
def test_a_budget_in_seconds_is_met(measured: Measured, method: str, tmp_path: Path) -> None:
    # reason: so small a network may well take as long when it is pruned; these times are written, not measured
    rows = {layer.node: (1e-6, 1e-9, 1e-8, 1e-8) for layer in measured.plain.layers}
    known = LatencyModel(
        float_seconds=1e-2, dense_seconds=1e-3, layers=rows, rest=(1e-5, 0.0, 1e-9), error=0.0, multiple=16
    )
    settings = measured.settings.model_copy(update={"cache": str(tmp_path)})
    latency._cache_path(measured.groups, settings).write_text(known.model_dump_json())
    plan = Plan({}, dict.fromkeys(measured.cost.weights, 8), dict.fromkeys(measured.cost.activations, 8))
    dense = cost_model(measured.graph, measured.groups, known).evaluate(plan).seconds / known.float_seconds
    budget = sbs_fx.Budget(latency=min(1.0, 0.97 * dense))
    config = sbs_fx.Config(latency=settings, round_to=1)
    result = sbs_fx.compress(measured.model, IMAGES, budget=budget, method=method, config=config)
    assert budget.is_satisfied_by(result.cost)
    assert result.cost.seconds <= budget.limits["latency"] * known.float_seconds
    assert any(len(kept) < result.policy.sizes[name] for name, kept in result.policy.kept.items())


def test_bad_input(measured: Measured) -> None:
    settings = Latency(backend="eager", cache=measured.settings.cache)
    with pytest.raises(MethodError, match="onnxruntime"):
        latency_model(measured.graph, measured.groups, measured.plain, (IMAGES,), settings)
    with pytest.raises(ValueError, match="latency"):
        sbs_fx.Budget(latency=0.5).is_satisfied_by(measured.plain.evaluate(Plan({}, {}, {"x": 8})))
