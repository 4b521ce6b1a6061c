"""The comparison of the SBS paper on CIFAR-100: joint search against its counterparts, in one harness.

`python benchmarks/cifar100.py --data-dir DIR --out FILE` trains the float ResNets (widths 16-32-64, 1x1-conv shortcuts)
and then every row of the table with `--seeds N` seeds; `--rows sbs-66,uniform-4` takes only these, `--depth 56` the
deeper network. `--short` is the same protocol on fewer epochs, for two CPU cores. DIR holds
{train,test}_{images,labels}.npy, or is where torchvision downloads to. Everything is resumable: rows that FILE has are
not run again, and a row that was stopped goes on from its checkpoints in `--work-dir`. Accuracy is top-1 in percent on
the 10,000 test images, of the static graph where there is one, else of the gated graph.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _cifar_data import batches
from _cifar_models import CifarResNet
from safetensors.torch import load_file, save_file
from torch import nn

import sbs_fx
from sbs_fx.calibration import calibrate
from sbs_fx.passes import apply_bits, channel_groups, cost_model, insert_gates, trace
from sbs_fx.search import Search
from sbs_fx.search.uniform import uniform_bits
from sbs_fx.training import Checkpoints, Training, TrainingStage, evaluate, fine_tune, train


@dataclass(frozen=True)
class Row:
    """One line of the table: `method` of compress, or "uniform-qat" at `bits`; `ratio` is how many times fewer BOPs."""

    name: str
    method: str
    ratio: float = 1.0
    bits: int = 0
    decisions: str = "joint"


ROWS = [
    Row("uniform-4", "uniform-qat", bits=4),
    Row("uniform-3", "uniform-qat", bits=3),
    Row("sbs-66", "sbs", 66),
    Row("sbs-80", "sbs", 80),
    Row("sbs-100", "sbs", 100),
    Row("sbs-112", "sbs", 112),
    Row("bits-only-66", "sbs", 66, decisions="bits"),
    Row("prune-only", "sbs", 1.5, decisions="channels"),
    Row("two-stage-66", "prune_then_quantise", 66),
    Row("two-stage-80", "prune_then_quantise", 80),
    Row("two-stage-100", "prune_then_quantise", 100),
    Row("multi-path-66", "multi_path", 66),
    Row("bayesian-bits-66", "bayesian_bits", 66),
]


@dataclass(frozen=True)
class Protocol:
    """Epochs and rates. The paper searches for 30 epochs and fine-tunes for 200 at 0.1, divided by ten twice."""

    float_epochs: int
    search_epochs: int
    tune_epochs: int
    search_rate: float
    tune_rate: float
    training: Training


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protocol = _protocol(options, device)
    data = {split: batches(options.data_dir, split, options.batch_size, device) for split in ("train", "test")}
    if data["train"] is None:
        print("not run: no CIFAR-100; give --data-dir")
        return 0
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    named = {row.name: row for row in ROWS}
    chosen = [named[name] for name in options.rows or named]
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        key = {"depth": options.depth, "seed": seed, "protocol": "short" if options.short else "full"}
        model = _float_model(options, protocol, data, device, seed, key, rows)
        for row in chosen:
            if not any(_same(r, {**key, "row": row.name}) for r in rows):
                print(f"{row.name}, seed {seed} ...", flush=True)
                begun = time.perf_counter()
                work = options.work_dir / f"resnet{options.depth}-{key['protocol']}-{row.name}-{seed}"
                found = _run(row, model, data, protocol, work, seed, options)
                found |= {"seconds_of_this_sitting": round(time.perf_counter() - begun)}
                _append(options.out, rows, {**key, "row": row.name, "method": row.method, **found}, protocol, device)
    print(_table(rows))
    return 0


def _run(
    row: Row,
    model: nn.Module,
    data: dict[str, Any],
    protocol: Protocol,
    work: Path,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One row: accuracy and cost."""
    watch = _Lines(options.every)
    images = next(iter(data["test"]))[0][:2]
    if row.method == "uniform-qat":
        graph = trace(model, images)
        groups = channel_groups(graph)
        cost = cost_model(graph, groups)
        bits = uniform_bits(cost, row.bits, row.bits)
        gated = insert_gates(
            graph, groups, channels=False, candidates=(2, 4, 8) if row.bits in (2, 4, 8) else (row.bits, 2 * row.bits)
        )
        _fix(gated, bits, row.bits)
        calibrate(gated, data["train"], inputs=(images,))
        before = evaluate(gated, data["test"])
        epochs = protocol.search_epochs + protocol.tune_epochs
        with Checkpoints(work, {"row": row.name, "seed": seed, "epochs": epochs}) as checkpoints:
            fine_tune(
                gated, data["train"], epochs=epochs, lr=protocol.tune_rate, settings=protocol.training,
                teacher=graph, seed=seed, checkpoints=checkpoints, progress=watch,
            )  # fmt: skip
        spent = cost.evaluate({}, bits.weights, bits.activations)
        return _costs(spent) | {"before": before, "accuracy": evaluate(gated, data["test"]), "epochs": epochs}
    budget = sbs_fx.Budget(macs=1 / row.ratio) if row.decisions == "channels" else sbs_fx.Budget(bops=1 / row.ratio)
    search = Search(
        epochs=protocol.search_epochs, lr=protocol.search_rate, decisions=row.decisions, block=options.block
    )
    config = sbs_fx.Config(
        search=search,
        epochs=protocol.tune_epochs,
        learning_rate=protocol.tune_rate,
        training=protocol.training,
        seed=seed,
    )
    result = sbs_fx.compress(
        model, images, budget=budget, data=data["train"], method=row.method, config=config, output_dir=work,
        observer=watch,
    )  # fmt: skip
    policy = result.policy
    bits = [b for table in (policy.weight_bits, policy.activation_bits) for b in table.values()]
    return _costs(result.cost) | {
        "accuracy": evaluate(result.model, data["test"]),
        "accuracy_gated": evaluate(result.gated, data["test"]),
        "epochs": protocol.search_epochs + protocol.tune_epochs,
        "bits": {str(b): bits.count(b) for b in sorted(set(bits))},
        "kept": sum(map(len, policy.kept.values())) / sum(policy.sizes.values()),
    }


def _fix(gated: Any, bits: Any, inner: int) -> None:
    """Uniform bits; the first and last layers' gates have candidates of their own, since 3 bits do not nest with 8."""
    from sbs_fx.passes import activation_gates, weight_gates

    for gates, table in ((weight_gates(gated), bits.weights), (activation_gates(gated), bits.activations)):
        for name, gate in gates.items():
            if table[name] not in gate.candidates:
                gate.candidates = (table[name],)
    apply_bits(gated, bits.weights, bits.activations)


def _costs(cost: Any) -> dict[str, float]:
    return {
        "mega_bops": round(cost.bops / 1e6, 1),
        "ratio": round(cost.reference.bops / cost.bops, 2),
        "macs_share": round(cost.macs / cost.reference.macs, 4),
        "size_ratio": round(cost.reference.stored_bits / cost.stored_bits, 2),
    }


def _float_model(
    options: argparse.Namespace,
    protocol: Protocol,
    data: dict[str, Any],
    device: torch.device,
    seed: int,
    key: dict[str, Any],
    rows: list[dict[str, Any]],
) -> nn.Module:
    """The float network, from `--weights`, an earlier sitting, or trained."""
    torch.manual_seed(seed)
    model = CifarResNet(options.depth, 100).to(device)
    path = options.weights or options.work_dir / f"resnet{options.depth}-{key['protocol']}-float-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path, device=str(device)))
    else:
        images = next(iter(data["test"]))[0][:2]
        graph = trace(model.eval(), images)
        gated = insert_gates(graph, channel_groups(graph), channels=False)
        work = path.with_suffix("")
        settings = protocol.training.model_copy(update={"distillation": 0.0, "weight_decay": 5e-4, "clip": 0.0})
        with Checkpoints(work, {"row": "float", "seed": seed, "epochs": protocol.float_epochs}) as checkpoints:
            train(
                TrainingStage(gated, "float"), data["train"], epochs=protocol.float_epochs, lr=0.2, settings=settings,
                seed=seed, checkpoints=checkpoints, progress=_Lines(options.every),
            )  # fmt: skip
        state = gated.state_dict()
        model.load_state_dict({n: state.get(n, v) for n, v in model.state_dict().items()})
        save_file({n: v.contiguous() for n, v in model.state_dict().items()}, path)
    model.eval()
    if not any(_same(r, {**key, "row": "float"}) for r in rows):
        graph = trace(model, next(iter(data["test"]))[0][:2])
        cost = cost_model(graph, channel_groups(graph)).reference
        found = {"row": "float", "method": "float", "mega_bops": round(cost.bops / 1e6, 1), "ratio": 1.0}
        found |= {"accuracy": evaluate(model, data["test"]), "epochs": 0 if options.weights else protocol.float_epochs}
        _append(options.out, rows, {**key, **found}, protocol, device)
    return model


class _Lines:
    """A line every so many seconds, and at each epoch's end."""

    def __init__(self, every: float) -> None:
        self.every, self.last = every, 0.0

    def __call__(self, progress: Any) -> None:
        now = time.monotonic()
        ends = progress.steps and progress.step % (progress.steps // progress.epochs) == 0
        if now - self.last > self.every or ends:
            self.last = now
            m = progress.measures
            print(
                f"  {progress.stage} {progress.step}/{progress.steps} loss {progress.loss:.3f} "
                f"acc {progress.accuracy or 0:.1f} "
                + " ".join(
                    f"{k}={m[k]}"
                    for k in ("bops", "macs", "pruned", "multiplier", "weight_bits", "activation_bits")
                    if k in m
                ),
                flush=True,
            )


def _append(
    path: Path, rows: list[dict[str, Any]], row: dict[str, Any], protocol: Protocol, device: torch.device
) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    settings = protocol.training.model_dump(exclude_defaults=True)
    rows.append({**row, **versions, "python": platform.python_version(), "hardware": hardware, "training": settings})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{row['row']}: {row['accuracy']:.2f} % at {row['ratio']}x", flush=True)


def _same(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def _table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds."""
    lines = [
        "| network | protocol | row | BOPs ratio | MACs kept | top-1 % | seeds | epochs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["depth"], row["protocol"], row["row"]), []).append(row)
    for (depth, protocol, name), found in groups.items():
        accuracy = [r["accuracy"] for r in found]
        spread = f" ({min(accuracy):.2f} to {max(accuracy):.2f})" if len(accuracy) > 1 else ""
        ratio = sum(r["ratio"] for r in found) / len(found)
        macs = sum(r.get("macs_share", 1.0) for r in found) / len(found)
        lines.append(
            f"| ResNet-{depth} | {protocol} | {name} | {ratio:.1f}x | {100 * macs:.0f} % | "
            f"{sum(accuracy) / len(accuracy):.2f}{spread} | {len(found)} | {found[0]['epochs']} |"
        )
    return "\n".join(lines)


def _protocol(options: argparse.Namespace, device: torch.device) -> Protocol:
    training = Training(
        precision="bf16", channels_last=True, compiled=not options.eager, weight_decay=1e-4, norm_batches=50,
        checkpoint_every=200,
    )  # fmt: skip
    short = Protocol(60, 2, 5, 0.02, 0.04, training)
    full = Protocol(200, 30, 200, 0.02, 0.1, training)
    chosen = short if options.short else full
    epochs = {"search_epochs": options.search_epochs, "tune_epochs": options.tune_epochs}
    return Protocol(**{**chosen.__dict__, **{k: v for k, v in epochs.items() if v is not None}})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON list of rows")
    parser.add_argument("--data-dir", type=Path, help="arrays, or where torchvision keeps CIFAR-100")
    parser.add_argument("--work-dir", type=Path, default=Path("out/cifar100"), help="checkpoints and float weights")
    parser.add_argument("--weights", type=Path, help="float weights (safetensors) instead of training")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--rows", type=lambda text: text.split(","), help="only these, by comma")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="few epochs")
    parser.add_argument("--search-epochs", type=int)
    parser.add_argument("--tune-epochs", type=int)
    parser.add_argument("--block", type=int, default=4, help="channels decided together (the paper's 4)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between lines")
    options = parser.parse_args()
    if unknown := set(options.rows or []) - {row.name for row in ROWS}:
        parser.error(f"no such rows: {sorted(unknown)}; there are {[row.name for row in ROWS]}")
    return options


if __name__ == "__main__":
    sys.exit(main())
