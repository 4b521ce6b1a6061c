"""A static graph as a file of another tool, or ready to run, by the names that targets and backends have registered.

In: a static graph and example inputs. Out: a file that was loaded again, run and compared with the static graph before
it got its name, or a runner. Holds: what fails leaves no file behind, and the file that was there untouched.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.export.registry import BACKENDS, TARGETS, backend
from sbs_fx.export.runtime import Runner, check
from sbs_fx.passes.capture.inputs import inputs_of
from sbs_fx.plan.errors import BackendError, FileError


def export(
    static: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    format: str,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> Runner:
    """Write a static graph as a file of another tool, once what was written computes what torch computes.

    | format       | file                | runs in                                | weights            |
    |--------------|---------------------|----------------------------------------|--------------------|
    | "pt2"        | `torch.export`      | torch alone                            | at their bitwidth  |
    | "onnx"       | ONNX, opset 21      | ONNX Runtime, OpenVINO and others      | int8, int4 on wish |
    | "openvino"   | .xml and .bin       | OpenVINO                               | int8               |
    | "aoti"       | AOTInductor package | torch alone, on this kind of processor | int8               |
    | "executorch" | ExecuTorch program  | ExecuTorch with XNNPACK                | int8               |
    | "coreml"     | Core ML (.mlpackage) | Core ML; not run here                 | int8               |
    | "tensorrt"   | ONNX, symmetric     | TensorRT; ONNX Runtime compares it     | int8               |
    | "litert"     | LiteRT (.tflite)    | LiteRT with XNNPACK                    | int8               |

    Args:
        example_inputs: as the graph takes them; dynamic dimensions stay so.
        format: the name of a registered target: these, and those of other packages.
        metadata: kept in "pt2" and "onnx" files.
        options: of the format; "onnx" takes `low_bits`: weights of 2 to 4 bits as int4, a smaller file, slower in ONNX
            Runtime; it and "tensorrt" take `opset`; "litert" and "coreml" take `batch`: images that one
            call takes, in place of any number.

    Returns:
        The file as it was loaded again; `kernels` says which layers have an int8 kernel, `lost` what was not kept.

    Raises:
        BackendError: an unknown format or option, a tool that is not installed, or one that cannot compute this graph
            as torch does. FileError: the path cannot be written. GraphError: `torch.export` cannot capture the graph.
    """
    target = TARGETS[format]
    path, suffix = os.fspath(path), target.suffix
    if unknown := sorted(name for name, value in options.items() if value and name not in target.options):
        raise BackendError(f"format {format!r} has no option {unknown[0]!r}; it takes {target.options or 'none'}")
    if not path.endswith(suffix):
        raise FileError(f"{path!r} does not end in {suffix!r}, as a file of format {format!r} does")
    inputs = tuple(example_inputs)
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".", prefix=".export-") as folder:
            draft = os.path.join(folder, "model" + suffix)
            runner = target.write(static, inputs, draft, {"metadata": metadata, **options})
            if target.runs:
                check(runner, static, inputs)
            for name in sorted(os.listdir(folder)):  # reason: weights (.bin) before the model that reads them (.xml)
                final = path.removesuffix(suffix) + os.path.splitext(name)[1]
                if os.path.isdir(os.path.join(folder, name)) and os.path.isdir(final):
                    shutil.rmtree(final)  # reason: a folder never takes the place of one that holds something
                os.replace(os.path.join(folder, name), final)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {path!r}: {error.strerror or error}") from error
    return replace(runner, inputs=inputs_of(static))


def runner(static: fx.GraphModule, example_inputs: Sequence[Tensor], name: str, *, threads: int = 0) -> Runner:
    """A static graph in the hands of a backend, compared with torch.

    Args:
        name: of a registered backend. threads: 0 leaves it to the backend; torch's own number is
            `torch.set_num_threads`.

    Raises:
        BackendError: an unknown backend, one that is not installed, or one that computes something else.
    """
    ready = BACKENDS[name].run(static, example_inputs, threads)
    check(ready, static, example_inputs)
    return replace(ready, inputs=inputs_of(static))


@backend("eager", profiles=False)
def eager(static: fx.GraphModule, example_inputs: Sequence[Tensor], threads: int) -> Runner:
    """torch, operator by operator."""

    def run(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return static(*inputs)

    return Runner("eager", run)
