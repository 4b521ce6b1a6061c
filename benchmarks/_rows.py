"""Rows of a comparison of methods: the same network, data, epochs and training for each.

In: a float network, training and test batches. Out: accuracy (top-1 in percent, of the static graph where there is one,
else of the gated graph), costs and decisions as plain data.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import sbs_fx
from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.passes import CostModel, apply_bits, channel_groups, cost_model, insert_gates, trace
from sbs_fx.plan import Plan
from sbs_fx.search import Search, Space, SpaceSettings
from sbs_fx.training import Checkpoints, Training, evaluate, fine_tune
from sbs_fx.training.progress import Progress


@dataclass(frozen=True)
class Row:
    """One line of a table: `method` of compress, or "uniform-qat" at `bits`; `ratio` is how many times fewer BOPs are
    asked for; fewer MACs where nothing is quantised."""

    name: str
    method: str
    ratio: float = 1.0
    bits: int = 0
    prune: bool = True
    quantise: bool = True


ROWS = [
    Row("uniform-4", "uniform-qat", bits=4),
    Row("uniform-3", "uniform-qat", bits=3),
    Row("sbs-66", "sbs", 66),
    Row("sbs-80", "sbs", 80),
    Row("sbs-100", "sbs", 100),
    Row("sbs-112", "sbs", 112),
    Row("bits-only-66", "sbs", 66, prune=False),
    Row("prune-only", "sbs", 1.5, quantise=False),
    Row("two-stage-66", "prune_then_quantise", 66),
    Row("two-stage-80", "prune_then_quantise", 80),
    Row("two-stage-100", "prune_then_quantise", 100),
    Row("multi-path-66", "multi_path", 66),
    Row("bayesian-bits-66", "bayesian_bits", 66),
]


@dataclass(frozen=True)
class Protocol:
    """Epochs and rates of search and fine-tuning, the same for every row; uniform QAT trains for both together."""

    search_epochs: int
    tune_epochs: int
    search_rate: float
    tune_rate: float
    training: Training
    block: int | None = None


def run_row(
    row: Row,
    model: nn.Module,
    images: torch.Tensor,
    train: Iterable[Any],
    test: Iterable[Any],
    protocol: Protocol,
    seed: int,
    work: Path | None = None,
    every: float = 30.0,
) -> dict[str, Any]:
    """One row; with `work`, checkpoints are kept there and a run that was stopped goes on."""
    watch = Lines(every)
    if row.method == "uniform-qat":
        return _uniform_qat(row, model, images, train, test, protocol, seed, work, watch)
    measure = "bops" if row.quantise else "macs"
    config = sbs_fx.Config(
        search=Search(epochs=protocol.search_epochs, lr=protocol.search_rate),
        prune=row.prune,
        quantise=row.quantise,
        block=protocol.block,
        epochs=protocol.tune_epochs,
        learning_rate=protocol.tune_rate,
        training=protocol.training,
        seed=seed,
    )
    result = sbs_fx.compress(
        model,
        images,
        budget=sbs_fx.Budget(**{measure: 1 / row.ratio}),
        data=train,
        method=row.method,
        config=config,
        output_dir=work,
        observer=watch,
    )
    policy = result.policy
    bits = {kind: list(table.values()) for kind, table in (("w", policy.weight_bits), ("a", policy.activation_bits))}
    return costs(result.cost) | {
        "accuracy": evaluate(result.model, test),
        "accuracy_gated": evaluate(result.gated, test),
        "epochs": protocol.search_epochs + protocol.tune_epochs,
        "bits": {f"{kind}{b}": found.count(b) for kind, found in bits.items() for b in sorted(set(found))},
        "kept": round(sum(map(len, policy.kept.values())) / sum(policy.sizes.values()), 4),
    }


def _uniform_qat(
    row: Row,
    model: nn.Module,
    images: torch.Tensor,
    train: Iterable[Any],
    test: Iterable[Any],
    protocol: Protocol,
    seed: int,
    work: Path | None,
    watch: Lines,
) -> dict[str, Any]:
    gated, spent = uniform_network(model, images, train, row.bits)
    before = evaluate(gated, test)
    epochs = protocol.search_epochs + protocol.tune_epochs
    checkpoints = None if work is None else Checkpoints(work, {"row": row.name, "seed": seed, "epochs": epochs})
    fine_tune(
        gated,
        train,
        epochs=epochs,
        lr=protocol.tune_rate,
        settings=protocol.training,
        teacher=model,
        seed=seed,
        checkpoints=checkpoints,
        progress=watch,
    )
    if checkpoints is not None:
        checkpoints.close()
    return costs(spent) | {"before": before, "accuracy": evaluate(gated, test), "epochs": epochs}


def uniform_network(
    model: nn.Module, images: torch.Tensor, train: Iterable[Any], bits: int
) -> tuple[fx.GraphModule, sbs_fx.Cost]:
    """The gated network of one bitwidth (2 to 8), first and last layer 8/8, calibrated; and what it costs."""
    graph = trace(model, images)
    groups = channel_groups(graph)
    cost = cost_model(graph, groups)
    plan = even_plan(cost, bits, bits)
    gated = insert_gates(graph, groups, channels=False)
    apply_bits(gated, plan.weight_bits, plan.activation_bits)
    calibrate(gated, train, inputs=(images,))
    return gated, cost.evaluate(plan)


def even_plan(cost: CostModel, weight_bits: int, activation_bits: int) -> Plan:
    """The same bits everywhere but in the first and last layers, which have 8/8; all channels."""
    return Space(cost.groups, cost, SpaceSettings(weight_bits=weight_bits, activation_bits=activation_bits)).most


def costs(cost: Any) -> dict[str, float]:
    """What a table shows of a cost."""
    return {
        "mega_bops": round(cost.bops / 1e6, 1),
        "ratio": round(cost.reference.bops / cost.bops, 2),
        "macs_share": round(cost.macs / cost.reference.macs, 4),
        "size_ratio": round(cost.reference.stored_bits / cost.stored_bits, 2),
    }


class Lines:
    """A line every so many seconds."""

    SHOWN = ("bops", "macs", "pruned", "multiplier", "weight_bits", "activation_bits")

    def __init__(self, every: float) -> None:
        self.every, self.last = every, 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self.last > self.every or progress.step == progress.steps:
            self.last = now
            facts = " ".join(f"{k}={progress.measures[k]}" for k in self.SHOWN if k in progress.measures)
            place = f"{progress.stage} {progress.step}/{progress.steps}"
            print(f"  {place} loss {progress.loss:.3f} accuracy {progress.accuracy or 0:.1f} {facts}", flush=True)
