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
from pathlib import Path
from typing import Any

import torch
from _cifar_data import batches
from _cifar_models import CifarResNet
from _rows import ROWS, Lines, Protocol, run_row
from safetensors.torch import load_file, save_file
from torch import nn

from sbs_fx.passes import channel_groups, cost_model, insert_gates, trace
from sbs_fx.training import Checkpoints, Training, TrainingStage, evaluate, train

FLOAT_EPOCHS = {"short": 60, "full": 200}


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protocol = _protocol(options)
    data = {split: batches(options.data_dir, split, options.batch_size, device) for split in ("train", "test")}
    if data["train"] is None:
        print("not run: no CIFAR-100; give --data-dir")
        return 0
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    named = {row.name: row for row in ROWS}
    chosen = [named[name] for name in options.rows or named]
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        data["train"].seed = seed
        key = {"depth": options.depth, "seed": seed, "protocol": "short" if options.short else "full"}
        model = _float_model(options, protocol, data, device, seed, key, rows)
        for row in chosen:
            if not any(_same(r, {**key, "row": row.name}) for r in rows):
                print(f"{row.name}, seed {seed} ...", flush=True)
                begun = time.perf_counter()
                work = options.work_dir / f"resnet{options.depth}-{key['protocol']}-{row.name}-{seed}"
                images = next(iter(data["test"]))[0][:2]
                found = run_row(row, model, images, data["train"], data["test"], protocol, seed, work, options.every)
                found |= {"seconds_of_this_sitting": round(time.perf_counter() - begun)}
                _append(options.out, rows, {**key, "row": row.name, "method": row.method, **found}, protocol, device)
    print(_table(rows))
    return 0


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
    float_epochs = FLOAT_EPOCHS[key["protocol"]]
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
        with Checkpoints(work, {"row": "float", "seed": seed, "epochs": float_epochs}) as checkpoints:
            train(
                TrainingStage(gated, "float"), data["train"], epochs=float_epochs, lr=0.2, settings=settings,
                seed=seed, checkpoints=checkpoints, progress=Lines(options.every),
            )  # fmt: skip
        state = gated.state_dict()
        model.load_state_dict({n: state.get(n, v) for n, v in model.state_dict().items()})
        save_file({n: v.contiguous() for n, v in model.state_dict().items()}, path)
    model.eval()
    if not any(_same(r, {**key, "row": "float"}) for r in rows):
        graph = trace(model, next(iter(data["test"]))[0][:2])
        cost = cost_model(graph, channel_groups(graph)).reference
        found = {"row": "float", "method": "float", "mega_bops": round(cost.bops / 1e6, 1), "ratio": 1.0}
        found |= {"accuracy": evaluate(model, data["test"]), "epochs": 0 if options.weights else float_epochs}
        _append(options.out, rows, {**key, **found}, protocol, device)
    return model


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


def _protocol(options: argparse.Namespace) -> Protocol:
    """The paper searches for 30 epochs and fine-tunes for 200 at 0.1, divided by ten twice; ours falls as a cosine."""
    training = Training(
        precision="bf16", channels_last=True, compiled=not options.eager, norm_batches=50, checkpoint_every=200
    )
    search, tune, rate = (2, 8, 0.02) if options.short else (30, 200, 0.1)
    return Protocol(options.search_epochs or search, options.tune_epochs or tune, rate, rate, training, options.block)


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
