"""Do files for TensorRT and Core ML of every timm family keep the rules?

`python benchmarks/linters.py --out FILE` takes the models of a table of `benchmarks/coverage.py`, those
of least MACs first: each is quantised at 8 bits on random images, with random weights, written for TensorRT and checked
by the linter of its rules, and, where coremltools is installed, converted for Core ML, whose program must hold all
codes. Rows are appended to FILE's side file (.jsonl) as they come, and good ones are not made again; FILE itself is a
JSON list. Nothing is run on either tool's device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
import time
from typing import Any

import torch
from _coverage_graph import first_line
from _coverage_models import Task
from _coverage_weights import randomise
from _coverage_workers import Failed, read_rows, run_tasks

from sbs_fx.compression import compress
from sbs_fx.config import Config
from sbs_fx.export.coreml import coreml_model
from sbs_fx.export.onnx import onnx_model
from sbs_fx.export.tensorrt import symmetric_codes
from sbs_fx.export.tensorrt_rules import tensorrt_problems
from sbs_fx.models import create_model, example_inputs

MISSING = "not run: coremltools is not installed"


def check(task: Task) -> dict[str, Any]:
    """The row of one model."""
    row: dict[str, Any] = {"family": task.family, "model": task.model}
    begun = time.process_time()
    model = create_model(task.model, pretrained=False)
    images = example_inputs(model, 2)
    randomise(model, images)
    config = Config(weight_bits=8, activation_bits=8)
    static = compress(model, images, budget=1.0, method="uniform", config=config).model
    try:
        signed, lost = symmetric_codes(static)
        problems = tensorrt_problems(onnx_model(signed, (images,), products=False))
        row |= {"tensorrt": problems[0] if problems else "ok", "problems": len(problems), "lost": len(lost)}
    except Exception as error:
        row["tensorrt"] = first_line(error)
    if importlib.util.find_spec("coremltools") is None:
        row["coreml"] = MISSING
    else:
        try:
            kernels = coreml_model(static, (images,))[1]
            row |= {"coreml": "ok", "coreml_layers": kernels.summary}
        except Exception as error:
            row["coreml"] = first_line(error)
    return row | {"cpu_seconds": round(time.process_time() - begun, 1)}


def main() -> int:
    table = pathlib.Path(__file__).parent / "results" / "coverage.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=pathlib.Path, default=table, help="JSON list of rows of the coverage")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON list of rows")
    parser.add_argument("--most", type=int, default=98, help="models at most")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a model may take")
    options = parser.parse_args()
    side = options.out.with_suffix(".jsonl")
    done = {row["model"]: row for row in (read_rows(side) if side.exists() else []) if _is_good(row)}
    rows = sorted(json.loads(options.models.read_text()), key=lambda row: row.get("macs", 0))
    tasks = [Task(row["family"], row["model"]) for row in rows if row["model"] not in done][: options.most]
    for task, result in run_tasks(check, tasks, jobs=1, timeout=options.timeout):
        row = {**task._asdict(), "tensorrt": str(result)} if isinstance(result, Failed) else result
        done[task.model] = row
        with side.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{task.model:32s} TensorRT: {row.get('tensorrt')}; Core ML: {row.get('coreml')}", flush=True)
    options.out.write_text(json.dumps([*done.values()], indent=1) + "\n")
    return 0 if all(map(_is_good, done.values())) else 1


def _is_good(row: dict[str, Any]) -> bool:
    return all(row.get(tool, MISSING) in ("ok", MISSING) for tool in ("tensorrt", "coreml"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
