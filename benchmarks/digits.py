"""The comparison of `cifar100.py` on scikit-learn's digits, over several seeds, with intervals.

`python benchmarks/digits.py --out FILE` trains a small timm network per seed and compresses it by every method at the
same epochs; a few minutes a seed on one core. The table gives the mean over seeds and its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from _rows import ROWS, Protocol, run_row
from scipy.stats import t

from sbs_fx import demo
from sbs_fx.training import Training, evaluate

CHOSEN = ("uniform-4", "uniform-3", "sbs-66", "sbs-80", "sbs-100", "two-stage-66", "two-stage-80", "two-stage-100")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=lambda text: text.split(","), default=CHOSEN, help="by comma")
    options = parser.parse_args()
    torch.set_num_threads(1)
    protocol = Protocol(2, 6, 0.01, 0.02, Training(norm_batches=10))
    named = {row.name: row for row in ROWS}
    rows: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    test = demo.digits("test")
    for seed in range(options.seeds):
        waiting = [n for n in ("float", *options.rows) if not any((r["row"], r["seed"]) == (n, seed) for r in rows)]
        if not waiting:
            continue
        demo.SEED = seed
        model = demo.train_model()
        for name in waiting:
            found = {"accuracy": evaluate(model, test), "ratio": 1.0}
            if name != "float":
                images, train = torch.zeros(2, 1, demo.IMAGE_SIZE, demo.IMAGE_SIZE), demo.digits("train", augment=True)
                found = run_row(named[name], model, images, train, test, protocol, seed)
            rows.append({"row": name, "seed": seed, **found})
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"seed {seed}  {name:14s} {found['accuracy']:.2f} % at {found['ratio']}x", flush=True)
    print(_table(rows))
    return 0


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| row | BOPs ratio | top-1 %, mean | 95 % interval | seeds |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["row"] for row in rows):
        found = [row for row in rows if row["row"] == name]
        accuracy = [row["accuracy"] for row in found]
        mean, half = statistics.mean(accuracy), 0.0
        if len(accuracy) > 1:
            half = float(t.ppf(0.975, len(accuracy) - 1)) * statistics.stdev(accuracy) / len(accuracy) ** 0.5
        ratio = statistics.mean(row["ratio"] for row in found)
        lines.append(f"| {name} | {ratio:.1f}x | {mean:.2f} | {mean - half:.2f} to {mean + half:.2f} | {len(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
