"""A static graph as a file of another tool, or ready to run, by the names that targets and backends have registered.

In: a static graph and example inputs. Out: a file that was loaded again, run and compared with the static graph before
it got its name, or a runner. Holds: what fails leaves no file behind, and the file that was there untouched.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.export.preprocessing import with_preprocessing
from sbs_fx.export.registry import BACKENDS, TARGETS, backend
from sbs_fx.export.runtime import Runner, check
from sbs_fx.passes.capture.inputs import inputs_of
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import BackendError, FileError
from sbs_fx.plan.files import DRAFTS, held, remove_leftovers


@boundary("export")
def export(
    static: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    format: str,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[str, float], None] | None = None,
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
    | "qnn"        | ONNX, fixed shapes  | Qualcomm's NPUs; ONNX Runtime compares | int8               |
    | "litert"     | LiteRT (.tflite)    | LiteRT with XNNPACK                    | int8, int4 on wish |

    Args:
        example_inputs: as the graph takes them; dynamic dimensions stay so.
        format: the name of a registered target: these, and those of other packages.
        metadata: kept in "pt2" and "onnx" files. progress: called with (step, share done).
        options: of the format; "onnx" takes `low_bits`: weights of 2 to 4 bits as int4, a smaller file, slower in ONNX
            Runtime; "litert" takes it too; "onnx", "tensorrt" and "qnn" take `opset`; "litert", "coreml" and "qnn"
            `batch`: images that one call takes, in place of any number; "litert" and "executorch" take `calibration`:
            images (n, ...) on which the ranges of results are measured that the graph leaves in float, so that their
            layers are in integers too; "onnx", "openvino", "qnn" and "tensorrt" take `preprocess`: "NHWC" or "NCHW",
            for a file of uint8 pictures of that layout and of the graph's size, scaled and normalised inside by
            `metadata`'s mean and std.

    Returns:
        The file as it was loaded again; `kernels` says which layers have an int8 kernel, `lost` what was not kept.

    Raises:
        BackendError: an unknown format or option, a tool that is not installed, or one that cannot compute this graph
            as torch does. InputError: pictures, of a graph that takes something else. FileError: the path cannot be
            written. GraphError: `torch.export` cannot capture the graph.

    >>> written = export(result.model, (images,), "pt2", "copy.pt2")
    >>> torch.equal(written(images), result.model(images))
    True
    """
    target = TARGETS[format]
    path, suffix = os.fspath(path), target.suffix
    asked = (name for name, value in options.items() if value is not None and value is not False)
    if unknown := sorted(name for name in asked if name not in target.options):
        raise BackendError(f"format {format!r} has no option {unknown[0]!r}; it takes {target.options or 'none'}")
    if not path.endswith(suffix):
        raise FileError(f"{path!r} does not end in {suffix!r}, as a file of format {format!r} does")
    inputs = tuple(example_inputs)
    if layout := options.pop("preprocess", None):
        static, inputs, metadata = with_preprocessing(static, inputs, layout, metadata)
    tell = progress or (lambda step, share: None)
    try:
        place = os.path.dirname(path) or "."
        remove_leftovers(place)
        with tempfile.TemporaryDirectory(dir=place, prefix=DRAFTS) as folder, held(folder):
            draft = os.path.join(folder, "model" + suffix)
            tell(f"write {format}", 0.1)
            runner = target.write(static, inputs, draft, {"metadata": metadata, **options})
            if target.runs:
                tell("run and compare", 0.8)
                check(runner, static, inputs)
            files = _rename_all(folder, path.removesuffix(suffix), suffix)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {path!r}: {error.strerror or error}") from error
    return replace(runner, inputs=inputs_of(static), files=files)


def _rename_all(folder: str, stem: str, suffix: str) -> tuple[str, ...]:
    """Give the files of a folder their final names, or none of them; the names. Holds: files of two exports are never
    together under those names. What is opened, of this suffix, goes first and comes last: killed in between, there is
    none. A package is a folder, which never takes the place of one that holds something."""
    names = sorted(os.listdir(folder), key=lambda name: name.endswith(suffix))
    drafts = {stem + os.path.splitext(name)[1]: os.path.join(folder, name) for name in names}
    before = {final: f"{draft}.before" for final, draft in reversed(drafts.items()) if os.path.exists(final)}
    try:
        if len(drafts) > 1 or any(os.path.isdir(final) for final in before):
            for final, aside in before.items():
                os.replace(final, aside)
        for final, draft in drafts.items():
            os.replace(draft, final)
    except BaseException:
        for final in drafts:
            with suppress(OSError):
                if not os.path.exists(drafts[final]):  # reason: it is under its final name
                    shutil.rmtree(final) if os.path.isdir(final) else os.unlink(final)
        for final, aside in reversed(before.items()):
            with suppress(OSError):
                os.replace(aside, final)
        raise
    return tuple(drafts)


@boundary("runner")
def runner(static: fx.GraphModule, example_inputs: Sequence[Tensor], name: str, *, threads: int = 0) -> Runner:
    """A static graph in the hands of a backend, compared with torch.

    Args:
        name: of a registered backend. threads: 0 leaves it to the backend; torch's own number is
            `torch.set_num_threads`.

    Raises:
        BackendError: an unknown backend, one that is not installed, or one that computes something else.

    >>> runner(result.model, (images,), "eager")(images).shape
    torch.Size([2, 4])
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
