"""Seconds instead of bit operations: what a plan will take on this machine, as a polynomial in kept channels.

In: a traced graph, its groups and cost model. Out: a `LatencyModel` for a backend, threads and batch size, fitted to
measured times of slim int8 networks: each layer's row of the backend's own profile to

    constant + per MAC x MACs + per output x output channels + per input x input channels,   none below zero,

and what is no layer's to a constant, the MACs of layers without a row, and the elements that layers give out. What kept
channels should be a multiple of is measured too, on a pair of convolutions. Measured once per model and machine and
kept in a cache. Each network is timed in turn with the dense one, and its ratio to that counts: speeds drift.
Bitwidths below 8 run on the same kernels and cost a clip here and there: the networks measured have 4 and 8 bits at
random, so that a plan of 8 bits alone takes a little less than is said.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # reason: not its parts, which take 37 MB: they load when they are read
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, fx, nn

from sbs_fx.calibration.calibrate import calibrate, calibration_batches
from sbs_fx.export import BACKENDS, Runner, runner
from sbs_fx.export.benchmark import time_runners, torch_threads
from sbs_fx.export.inductor import compile_float
from sbs_fx.export.runtime import of_batch
from sbs_fx.passes import (
    ChannelGroups,
    CostModel,
    apply_bits,
    channel_groups,
    cost_model,
    finalize,
    insert_gates,
    integer_grid,
    integer_joins,
    slim,
    trace,
)
from sbs_fx.passes.channels.importance import kernel_multiple
from sbs_fx.passes.cost.layers import LayerExpression
from sbs_fx.plan import Plan, Settings, current_versions, write_atomic
from sbs_fx.plan.errors import MethodError

FORMAT = 4
_LEAST_SHARE = 0.25  # of a group's channels that a measured network keeps
_ROUNDS = 5
_WIDTH, _SIZE = 64, 28  # channels and pixels a side of the convolutions that multiples are measured on
_MULTIPLES = (4, 8, 16, 32)
_ALMOST = 0.8  # of the most that a removed channel can save


class Latency(Settings):
    """How latency is measured for `Budget(latency=...)`.

    Attributes:
        backend: a registered one that tells the time of layers. threads, batch: as it will run.
        samples: networks that are measured.
        cache: directory of measurements; None: the user's cache directory.
    """

    backend: str = "openvino"
    threads: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1)
    samples: int = Field(default=12, ge=4)
    cache: str | None = None


class LatencyModel(BaseModel):
    """Seconds of one call. `layers`: name -> constant and factors of MACs, outputs and inputs; `rest`: constant and
    factors of the other layers' MACs and of elements. `error`: mean relative error on the networks it was fitted to.
    `float_seconds`, `dense_seconds`: of the float network, and of that with all channels at 8 bits.
    `multiple`: what kept channels should be a multiple of (`preferred_multiple`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    float_seconds: float
    dense_seconds: float
    layers: dict[str, tuple[float, float, float, float]]
    rest: tuple[float, float, float]
    error: float
    multiple: int

    def seconds(self, layer: LayerExpression, of_axis: Callable[[Any], Any]) -> Any:
        """Of one layer with a row, and its part of what belongs to none but grows with it."""
        macs, outputs, inputs, elements = features(layer, of_axis)
        if layer.node not in self.layers:
            return self.rest[1] * macs + self.rest[2] * elements
        constant, per_mac, per_output, per_input = self.layers[layer.node]
        return constant + per_mac * macs + per_output * outputs + per_input * inputs + self.rest[2] * elements


def features(layer: LayerExpression, of_axis: Callable[[Any], Any]) -> tuple[Any, Any, Any, Any]:
    """(MACs, output channels, input channels, output elements); the last three are 0 where a layer has no weight."""
    macs: Any = 0
    for product in layer.products:
        macs = macs + product.macs(of_axis)
    if len(layer.weights) != 1:
        return macs, 0, 0, 0
    ((outputs, inputs, positions),) = layer.sizes(of_axis)
    return macs, outputs, inputs, positions * outputs


def latency_model(
    graph: fx.GraphModule, groups: ChannelGroups, cost: CostModel, inputs: Sequence[Tensor], settings: Latency
) -> LatencyModel:
    """Measure, or read what was measured before.

    Raises:
        MethodError: a backend that cannot be profiled. BackendError: one that is not installed.
    """
    profiled = [entry.name for entry in BACKENDS.entries().values() if entry.profiles]
    if settings.backend not in profiled:
        raise MethodError(f"latency cannot be measured with {settings.backend!r}; expected one of {profiled}")
    path = _cache_path(groups, settings)
    try:
        model = LatencyModel.model_validate_json(path.read_text())
        if model.format == FORMAT:
            return model
    except (OSError, ValidationError):
        pass
    model = _measure(graph, groups, cost, inputs, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, model.model_dump_json(indent=1).encode())
    return model


def _measure(
    graph: fx.GraphModule, groups: ChannelGroups, cost: CostModel, inputs: Sequence[Tensor], settings: Latency
) -> LatencyModel:
    batch, draw, rows = of_batch(inputs, settings.batch), random.Random(0), []
    times = []  # of the dense network
    with torch_threads(settings.threads):
        multiple = preferred_multiple(settings)
        dense = slim_runner(cost, Plan(), inputs, batch, settings)
        for index in range(settings.samples):
            kept = random_counts(groups, draw, multiple) if index else {}
            run = slim_runner(cost, Plan(first_channels(kept), *random_bits(cost, draw)), inputs, batch, settings)
            ratio, seconds = beside(run, dense, batch, settings)
            assert run.profile is not None
            rows.append((kept, ratio, dict(run.profile(*batch))))
            times.append(seconds)
        whole, seconds = beside(compile_float(graph, batch), dense, batch, settings)
    typical = statistics.median([*times, seconds])
    rows = [(kept, ratio * typical, profile) for kept, ratio, profile in rows]
    return _fit(groups, cost, rows, whole * typical, typical, multiple)


def beside(
    run: Callable[..., Any], dense: Callable[..., Any], batch: Sequence[Tensor], settings: Latency
) -> tuple[float, float]:
    """How many times as long one takes as the other, timed in turn; and the seconds of the other."""
    it, other = time_runners({"it": run, "dense": dense}, batch, settings.batch, _ROUNDS, settings.threads)
    return it.seconds / other.seconds, other.seconds


def preferred_multiple(settings: Latency) -> int:
    """The least number of channels that, taken away together, save nearly as much each as any number does, measured
    between two 3x3 convolutions: kernels that compute 16 channels at a time save nothing for the first 15."""
    layers = [nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.ReLU()]
    inputs = (torch.randn(2, _WIDTH, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0)),)
    graph = trace(nn.Sequential(*layers).eval(), inputs)
    groups = channel_groups(graph)
    cost, batch = cost_model(graph, groups), of_batch(inputs, settings.batch)
    (inner,) = (group.name for group in groups.values() if len(group.members) > 1 and group.name.startswith("0."))
    runners = {
        str(fewer): slim_runner(cost, Plan({inner: range(_WIDTH - fewer)}), inputs, batch, settings)
        for fewer in (0, *_MULTIPLES)
    }
    timings = time_runners(runners, batch, settings.batch, 3 * _ROUNDS, settings.threads)
    seconds = {int(timing.backend): timing.seconds for timing in timings}
    saved = {fewer: (seconds[0] - seconds[fewer]) / fewer for fewer in _MULTIPLES}
    return min(fewer for fewer in _MULTIPLES if saved[fewer] >= _ALMOST * max(saved.values()))


def random_counts(groups: ChannelGroups, draw: random.Random, multiple: int | None = None) -> dict[str, int]:
    """Kept channels per group, from a quarter to all: multiples of that number, else of what kernels like."""
    counts = {}
    for group in groups.values():
        step = kernel_multiple(group, multiple if multiple and group.size > multiple else None)
        share = draw.uniform(_LEAST_SHARE, 1.0)
        counts[group.name] = min(group.size, max(step, int(group.size * share) // step * step))
    return counts


def first_channels(counts: Mapping[str, int]) -> dict[str, range]:
    """The first so many channels of each group."""
    return {name: range(count) for name, count in counts.items()}


def random_bits(cost: CostModel, draw: random.Random, candidates: Sequence[int] = (4, 8)) -> list[dict[str, int]]:
    """Bits for each weight, and for each activation."""
    return [{name: draw.choice(candidates) for name in names} for names in (cost.weights, cost.activations)]


def slim_runner(
    cost: CostModel, plan: Plan, inputs: Sequence[Tensor], batch: Sequence[Tensor], settings: Latency
) -> Runner:
    """The network under a plan, 8 bits where it names none, in the hands of the backend."""
    groups, graph = cost.groups, cost.groups.inference.graph_module
    gated = insert_gates(slim(graph, groups, plan.kept), groups, channels=False)
    weights, activations = dict.fromkeys(cost.weights, 8), dict.fromkeys(cost.activations, 8)
    apply_bits(gated, {**weights, **plan.weight_bits}, {**activations, **plan.activation_bits})
    calibrate(gated, None, inputs=inputs, method="minmax", max_batches=1)
    joined = integer_joins(finalize(gated), calibration_batches(None, inputs, 1), method="minmax")
    return runner(integer_grid(joined), batch, settings.backend, threads=settings.threads)


def _fit(
    groups: ChannelGroups,
    cost: CostModel,
    rows: Sequence[tuple[dict[str, int], float, dict[str, float]]],
    whole: float,
    dense: float,
    multiple: int,
) -> LatencyModel:
    """Least squares without negative factors, each network weighted alike by its own time."""
    tables = []  # per network: layer -> features
    for counts, _, _ in rows:
        sizes = {groups[name].axis: count for name, count in counts.items()}
        of_axis = lambda axis, sizes=sizes: sizes.get(axis, axis.size)  # noqa: E731  # reason: one expression
        tables.append({layer.node: np.array(features(layer, of_axis), dtype=float) for layer in cost.layers})
    # reason: a profile does not add up to the time of a call, which is what counts
    profiles = [{k: v * seconds / sum(p.values()) for k, v in p.items()} for _, seconds, p in rows]
    own = [layer.node for layer in cost.layers if all(layer.node in p for p in profiles) and tables[0][layer.node][1]]
    designs = {name: np.array([[1.0, *table[name][:3]] for table in tables]) for name in own}
    layers = {name: tuple(_positive(designs[name], np.array([p[name] for p in profiles]))) for name in own}
    others = [[sum(t[n][0] for n in t if n not in own), sum(t[n][3] for n in t)] for t in tables]
    design = np.array([[1.0, *pair] for pair in others])
    rest = _positive(design, np.array([sum(p.values()) - sum(p[n] for n in own) for p in profiles]))
    predicted = design @ rest + sum(designs[name] @ np.array(layers[name]) for name in own)
    seconds = np.array([row[1] for row in rows])
    error = float(np.abs(predicted / seconds - 1).mean())
    return LatencyModel(
        float_seconds=whole, dense_seconds=dense, layers=layers, rest=tuple(rest), error=error, multiple=multiple
    )


def _positive(design: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> list[float]:
    scale = design.max(0).clip(1e-300)
    return [float(x) for x in scipy.optimize.nnls(design / scale, values)[0] / scale]


def _cache_path(groups: ChannelGroups, settings: Latency) -> Path:
    """One file per model, backend, threads, batch, machine and versions."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sbs_fx"
    facts = [groups.fingerprint, settings.model_dump_json(exclude={"cache"}), platform.processor(), _processor()]
    key = hashlib.sha256(repr([*facts, current_versions()]).encode()).hexdigest()[:20]
    return (Path(settings.cache) if settings.cache else default) / f"latency-{key}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("model name")), platform.machine())
