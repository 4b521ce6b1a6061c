"""Every backend by its name: a static graph as a file, or ready to run.

In: a static graph and example inputs. Out: a file that was loaded again, run and compared with the static graph before
it got its name, or a runner. Holds: what fails leaves no file behind, and the file that was there untouched.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.export.executorch import executorch_program, run_executorch
from sbs_fx.export.inductor import run_aoti, run_inductor, save_aoti
from sbs_fx.export.onnx import onnx_model, run_onnx, save_onnx
from sbs_fx.export.openvino import openvino_model, read_openvino, run_openvino, save_openvino
from sbs_fx.export.pt2 import load_pt2, save_pt2
from sbs_fx.export.runtime import Runner, check
from sbs_fx.plan import write_atomic
from sbs_fx.plan.errors import BackendError, FileError

SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "openvino": ".xml", "aoti": ".pt2", "executorch": ".pte"}
FORMATS = tuple(SUFFIXES)
BACKENDS = ("eager", "inductor", "onnxruntime", "openvino", "executorch")


def export(
    static: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    format: str,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    low_bits: bool = False,
) -> Runner:
    """Write a static graph as a file of another tool, once what was written computes what torch computes.

    | format       | file                | runs in                                | weights            |
    |--------------|---------------------|----------------------------------------|--------------------|
    | "pt2"        | `torch.export`      | torch alone                            | at their bitwidth  |
    | "onnx"       | ONNX, opset 21      | ONNX Runtime, OpenVINO and others      | int8, int4 on wish |
    | "openvino"   | .xml and .bin       | OpenVINO                               | int8               |
    | "aoti"       | AOTInductor package | torch alone, on this kind of processor | int8               |
    | "executorch" | ExecuTorch program  | ExecuTorch with XNNPACK                | int8               |

    Args:
        example_inputs: as the graph takes them; dynamic dimensions stay so.
        metadata: kept in "pt2" and "onnx" files.
        low_bits: for "onnx", weights of 2, 3 and 4 bits as int4: a smaller file, slower in ONNX Runtime.

    Returns:
        The file as it was loaded again; `kernels` says which layers have an int8 kernel.

    Raises:
        BackendError: an unknown format, a tool that is not installed, or one that cannot compute this graph as torch
            does. FileError: the path cannot be written. GraphError: `torch.export` cannot capture the graph.
    """
    if format not in FORMATS:
        raise BackendError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    path = os.fspath(path)
    suffix = SUFFIXES[format]
    if not path.endswith(suffix):
        raise FileError(f"{path!r} does not end in {suffix!r}, as a file of format {format!r} does")
    inputs = tuple(example_inputs)
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".", prefix=".export-") as folder:
            draft = os.path.join(folder, "model" + suffix)
            runner = _written(format, draft, static, inputs, metadata, low_bits)
            check(runner, static, inputs)
            for name in sorted(os.listdir(folder)):  # reason: weights (.bin) before the model that reads them (.xml)
                os.replace(os.path.join(folder, name), path.removesuffix(suffix) + os.path.splitext(name)[1])
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {path!r}: {error.strerror or error}") from error
    return runner


def _written(
    format: str,
    path: str,
    static: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    metadata: Mapping[str, Any] | None,
    low_bits: bool,
) -> Runner:
    """Write the file and load it again."""
    if format == "pt2":
        save_pt2(static, inputs, path, metadata)
        return Runner("pt2", load_pt2(path))
    if format == "onnx":
        save_onnx(static, inputs, path, metadata, low_bits=low_bits)
        return run_onnx(Path(path).read_bytes(), static)
    if format == "openvino":
        save_openvino(static, inputs, path)
        return run_openvino(read_openvino(path), static, inputs)
    if format == "aoti":
        save_aoti(static, inputs, path)
        return run_aoti(path)
    program, kernels = executorch_program(static, inputs)
    write_atomic(path, program)
    return run_executorch(Path(path).read_bytes(), kernels)


def runner(static: fx.GraphModule, example_inputs: Sequence[Tensor], backend: str, *, threads: int = 0) -> Runner:
    """A static graph in the hands of a backend, compared with torch.

    Args:
        backend: one of `BACKENDS`. threads: 0 leaves it to the backend; torch's own number is `torch.set_num_threads`.

    Raises:
        BackendError: an unknown backend, one that is not installed, or one that computes something else.
    """
    makers: dict[str, Callable[[], Runner]] = {
        "eager": lambda: Runner("eager", _without_gradients(static)),
        "inductor": lambda: run_inductor(static, example_inputs),
        "onnxruntime": lambda: run_onnx(
            onnx_model(static, example_inputs).SerializeToString(), static, threads=threads
        ),
        "openvino": lambda: run_openvino(
            openvino_model(static, example_inputs), static, example_inputs, threads=threads
        ),
        "executorch": lambda: run_executorch(*executorch_program(static, example_inputs), threads=threads),
    }
    if backend not in makers:
        raise BackendError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    found = makers[backend]()
    check(found, static, example_inputs)
    return found


def _without_gradients(static: fx.GraphModule) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return static(*inputs)

    return run
