"""A comparison to be repeated on the device: inputs with what torch gives for them, and a script that runs the file.

In: a static graph and the file that was made of it. Out: `cases.npz` and `run.py` beside the file; the script needs
numpy and the target's runtime alone. Holds: it says by how much outputs differ, and how many predictions stay; it ends
with 1 where the file computes something else.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx

from sbs_fx.export.registry import TARGETS
from sbs_fx.export.runtime import TOLERANCE, flat
from sbs_fx.passes.capture.inputs import random_like
from sbs_fx.plan import write_atomic
from sbs_fx.plan.errors import BackendError, InputError

CASES = 10
_SCRIPT = '''"""Run this file of format {format!r} here, and compare it with what torch gave: python run.py"""

import pathlib
import sys
import time

import numpy as np

{script}

folder = pathlib.Path(__file__).resolve().parent
cases = np.load(folder / "cases.npz")
run = load(str(folder / {file!r}))
start = time.perf_counter()
results = np.concatenate([run(case[None]) for case in cases["inputs"]])
seconds = time.perf_counter() - start
expected = cases["expected"]
error = np.linalg.norm(results - expected) / np.linalg.norm(expected)
print(f"off by {{error:.2%}} of the norm, at most {{np.abs(results - expected).max():.3g}}")
if expected.ndim == 2:
    same = (results.argmax(1) == expected.argmax(1)).sum()
    print(f"top-1 as in torch: {{same}} of {{len(expected)}}")
print(f"{{1000 * seconds / len(expected):.2f}} ms each, the first call included")
sys.exit(not error <= {tolerance})
'''


def write_script(
    static: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    format: str,
    path: str | os.PathLike[str],
    pictures: Tensor | None = None,
) -> None:
    """Leave `cases.npz` and `run.py` beside a file of that format.

    Args:
        example_inputs: of the graph, which takes one tensor and gives one.
        path: of the file. pictures: (cases, ...) as the graph takes them; None: standard normal ones, or any bytes, of
            a fixed seed.

    Raises:
        BackendError: the format has no script. InputError: the graph takes or gives several tensors.
        FileError: the folder cannot be written.

    >>> runner = result.export("onnx", "model.onnx")
    >>> write_script(result.model, result.example_inputs, "onnx", "model.onnx")
    >>> import os; os.path.exists("run.py")
    True
    """
    if not (script := TARGETS[format].script):
        have = [name for name, entry in TARGETS.entries().items() if entry.script]
        raise BackendError(f"format {format!r} has no script for the device; expected one of {have}")
    if len(example_inputs) != 1 or not (
        example_inputs[0].is_floating_point() or example_inputs[0].dtype == torch.uint8
    ):
        raise InputError("a script for the device needs a graph that takes one tensor, of floats or of bytes")
    if pictures is None:
        generator = torch.Generator().manual_seed(0)
        pictures = random_like(example_inputs[0].new_empty(CASES, *example_inputs[0].shape[1:]), generator)
    with torch.no_grad():
        expected = flat(static(pictures))
    if len(expected) != 1:
        raise InputError(f"a script for the device needs a graph that gives one tensor; this one gives {len(expected)}")
    cases = io.BytesIO()
    np.savez(cases, inputs=pictures.numpy(), expected=expected[0].numpy())
    folder, file = os.path.split(os.fspath(path))
    write_atomic(os.path.join(folder, "cases.npz"), cases.getvalue())
    text = _SCRIPT.format(format=format, script=script.strip(), file=file, tolerance=TOLERANCE)
    write_atomic(os.path.join(folder, "run.py"), text.encode())
