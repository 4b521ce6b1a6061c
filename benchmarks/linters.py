"""Do files for TensorRT and Core ML of every timm family keep the rules?

`python benchmarks/linters.py --models FILE --out FILE` takes the models of a table of `benchmarks/coverage.py`, those
of least MACs first: each is quantised at 8 bits on random images, with random weights, written for TensorRT and checked
by the linter of its rules, and, where coremltools is installed, converted for Core ML, whose program must hold all
codes. Rows are appended to OUT as they come (JSON lines); models that are in it are left out. Nothing is run on either
tool's device.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=pathlib.Path, required=True, help="a JSON list of rows of the coverage")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON lines")
    parser.add_argument("--most", type=int, default=98, help="models at most")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a model may take")
    options = parser.parse_args()
    rows = json.loads(options.models.read_text())
    rows.sort(key=lambda row: row.get("macs", 0))
    done = {row["model"] for row in read_rows(options.out)} if options.out.exists() else set()
    tasks = [Task(row["family"], row["model"]) for row in rows if row["model"] not in done][: options.most]
    bad = 0
    for task, result in run_tasks(check, tasks, jobs=1, timeout=options.timeout):
        row = (
            {"family": task.family, "model": task.model, "tensorrt": str(result)}
            if isinstance(result, Failed)
            else result
        )
        bad += row.get("tensorrt") != "ok" or row.get("coreml", "ok") not in (
            "ok",
            "not run: coremltools is not installed",
        )
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{task.model:32s} TensorRT: {row.get('tensorrt')}; Core ML: {row.get('coreml')}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
