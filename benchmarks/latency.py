"""How fast is the static graph, beside float and beside the int8 of other tools?

`python benchmarks/latency.py --out FILE` takes six networks with random weights (the figures are about kernels, not
accuracy) at batch 1 and 8. Ours at three budgets, each on torch's compiler, ONNX Runtime and OpenVINO: dense int8; 30 %
of the MACs pruned away, 8 bits; 2/4/8 bits and channels at 1/60 of the BOPs. Beside them fp32 under `torch.compile`
with freezing, torchao's PT2E with its x86 quantiser, ONNX Runtime's static int8, as it comes ("ort-default") and set up
for this kind of processor ("ort-int8"), and NNCF (`pip install nncf`).
All run in turn in one process with the same number of threads; each network and batch is a process of its own and a row
of FILE, so that the same call again goes on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import platform
import statistics
import sys
import traceback
from pathlib import Path
from typing import Any

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenetv2_100",
    "efficientnet_lite0",
    "convnext_atto",
    "deit_tiny_patch16_224",
)
CONVNETS = MODELS[:5]
BACKENDS = ("inductor", "onnxruntime", "openvino")
PEERS = {"inductor": "torchao", "onnxruntime": "ort-default", "openvino": "nncf"}  # a backend's own tool
PACKAGES = ("torch", "torchao", "onnx", "onnxruntime", "openvino", "nncf", "timm")


def main() -> int:
    options = _options()
    rows: dict[str, Any] = {}
    if options.out.exists():
        rows = {_key(row): row for row in json.loads(options.out.read_text())["rows"]}
    for model in options.models:
        for batch in options.batch_sizes:
            key = f"{model} {batch}"
            if key in rows and "error" not in rows[key]:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows[key] = pool.apply(_measure, (model, batch, options.threads, options.rounds))
            options.out.write_text(json.dumps({"hardware": _hardware(), "rows": list(rows.values())}, indent=1) + "\n")
            print(json.dumps(rows[key]), flush=True)
    print(table(list(rows.values())))
    return 0


def _key(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['batch']}"


def _measure(name: str, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    """The row of one network at one batch size."""
    try:
        return _row(name, batch, threads, rounds)
    except Exception:
        return {"model": name, "batch": batch, "error": traceback.format_exc().splitlines()[-1]}


def _row(name: str, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    import timm
    import torch
    from _peers import onnxruntime_static, openvino_nncf, torchao_pt2e

    from sbs_fx import Budget
    from sbs_fx.export import runner
    from sbs_fx.export.benchmark import time_runners
    from sbs_fx.export.inductor import compile_float

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, *size))  # so that batch norms have statistics
    model.eval()
    x = torch.randn(batch, *size)
    runners: dict[str, Any] = {"float": compile_float(model, (x,))}
    refused = {}
    peers = {
        "torchao": lambda: torchao_pt2e(model, x),
        "ort-default": lambda: onnxruntime_static(model, x, threads, defaults=True),
        "ort-int8": lambda: onnxruntime_static(model, x, threads),
        "nncf": lambda: openvino_nncf(model, x, threads),
    }
    for peer, make in peers.items():
        try:
            runners[peer] = make()
        except Exception as error:
            refused[peer] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    kernels, costs = {}, {}
    for variant, result in _ours(model, torch.randn(2, *size)).items():
        costs[variant] = Budget(bops=1).shares(result.cost)
        for backend in BACKENDS:
            key = f"{variant} {backend}"
            try:
                runners[key] = runner(result.model, (x,), backend, threads=threads)
                kernels[key] = str(runners[key].kernels)
            except Exception as error:
                refused[key] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    timings = time_runners(runners, (x,), batch, rounds, threads)
    return {
        "model": name,
        "batch": batch,
        "threads": threads,
        "milliseconds": {t.backend: round(t.seconds * 1e3, 3) for t in timings},
        "spread": {t.backend: round(t.spread * 1e3, 3) for t in timings},
        "kernels": kernels,
        "costs": costs,
        "refused": refused,
    }


def _ours(model: Any, example: Any) -> dict[str, Any]:
    from sbs_fx import Budget, Config, compress

    eight = Config(weight_bits=8, activation_bits=8)
    return {
        "dense": compress(model, example, budget=Budget(bops=0.5), method="uniform", config=eight),
        "pruned": compress(model, example, budget=Budget(macs=0.7), method="uniform", config=eight),
        "mixed": compress(model, example, budget=Budget(bops=1 / 60), method="opq"),
    }


# -- the table ---------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds, then the ratios that are asked for."""
    good = [row for row in rows if "error" not in row]
    columns = list(dict.fromkeys(name for row in good for name in row["milliseconds"]))
    lines = [f"| model, batch | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for row in good:
        cells = (f"{row['milliseconds'][c]:.1f}" if c in row["milliseconds"] else "-" for c in columns)
        lines.append(f"| {row['model']}, {row['batch']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Of inductor, onnxruntime and openvino:",
        "",
        "| model, batch | dense / peer | best dense / best peer | pruned / dense | float / best pruned |",
        "| --- | --- | --- | --- | --- |",
    ]
    gains = []
    for row in good:
        ms = row["milliseconds"]
        peers = ", ".join(_ratio(ms, f"dense {b}", PEERS[b]) for b in BACKENDS)
        pruned = ", ".join(_ratio(ms, f"pruned {b}", f"dense {b}") for b in BACKENDS)
        best = {
            v: min((ms[f"{v} {b}"] for b in BACKENDS if f"{v} {b}" in ms), default=None) for v in ("dense", "pruned")
        }
        peer = min((ms[p] for p in (*PEERS.values(), "ort-int8") if p in ms), default=None)
        against = f"{best['dense'] / peer:.2f}" if peer and best["dense"] else "-"
        gain = ms["float"] / best["pruned"] if best["pruned"] else None
        if gain and row["batch"] == max(r["batch"] for r in good):
            gains.append(gain)
        lines.append(f"| {row['model']}, {row['batch']} | {peers} | {against} | {pruned} | {gain or 0:.2f} |")
    if gains:
        lines.append(
            f"\nfloat / best pruned at the largest batch, geometric mean: {statistics.geometric_mean(gains):.2f}"
        )
    return "\n".join(lines)


def _ratio(ms: dict[str, float], above: str, below: str) -> str:
    return f"{ms[above] / ms[below]:.2f}" if above in ms and below in ms else "-"


def _hardware() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), "")  # fmt: skip
    return {"processor": model, "machine": platform.machine(), "versions": versions}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True, help="JSON; goes on from what is there")
    parser.add_argument("--models", type=lambda text: text.split(","), default=MODELS)
    parser.add_argument("--batch-sizes", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
