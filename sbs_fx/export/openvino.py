"""OpenVINO's own format, by way of ONNX.

In: a static graph. Out: an OpenVINO model (.xml and .bin), int8 weights, a dynamic batch. Holds: results as torch's; in
exact mode bit for bit. Some things are said that OpenVINO would otherwise simplify away, or not find:

    a quantiser before an addition is followed by a clip to all its codes: fused into a convolution that adds, OpenVINO
    would not round there. It costs a deep residual network a sixth of its time; with 8 bits throughout and float
    scales, where few predictions move, it is left out
    the graph's input, in exact mode, is rounded to its grid first: the shift by the zero point would cost it two bits
    what attention multiplies is signed codes: only without a zero point it has an integer product for them
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.export.onnx import LayerMatcher, onnx_model
from sbs_fx.export.preprocessing import LARGEST
from sbs_fx.export.registry import backend, target
from sbs_fx.export.runtime import PROFILED, Runner, least, require
from sbs_fx.passes.dialects import quantizers, static_of
from sbs_fx.passes.graph import copy_graph
from sbs_fx.passes.static.finalize import MAX_CODE, MIDDLE

aten = torch.ops.aten
SCRIPT = """
import openvino


def load(path):
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: model([inputs])[0]
"""
_PRODUCTS = {aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default}
_LAYERS = {"Convolution", "FullyConnected", "MatMul", "Deconvolution", "GroupConvolution", "GroupDeconvolution"}


@cache
def _core() -> Any:
    """The runtime, one a process: each has a signal stack of its own, which is gone with it, and with AMX the next
    signal would end the process."""
    (openvino,) = require("openvino")
    return openvino.Core()


def openvino_model(static: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Any:
    """The `openvino.Model` of a static graph.

    Raises:
        BackendError: openvino, onnx or onnxscript is not installed, or the graph has an operator that ONNX has not.
    """
    require("openvino")
    onnx = onnx_model(_explicit(static), example_inputs)
    return _core().read_model(onnx.SerializeToString())


def save_openvino(
    static: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write the model to `path` (.xml), with `model_info` of what is known of its pictures and classes, and its weights
    beside it (.bin). Raises BackendError as `openvino_model`."""
    (openvino,) = require("openvino")
    model = openvino_model(static, example_inputs)
    classifies = [output.any_name for output in model.outputs] == ["logits"]
    for key, value in model_info(metadata or {}, classifies=classifies).items():
        model.set_rt_info(value, ["model_info", key])
    openvino.save_model(model, os.fspath(path), compress_to_fp16=False)


def model_info(metadata: Mapping[str, Any], *, classifies: bool) -> dict[str, str]:
    """What OpenVINO's Model API reads of a file, by its names (github.com/open-edge-platform/model_api, "Model
    configuration"): lists by spaces, mean and scale of pixels of 0 to 255.

    >>> model_info({"mean": [0.5], "std": [0.25], "classes": ["hot dog", "other"]}, classifies=True)
    {'model_type': 'Classification', 'labels': 'hot_dog other', 'mean_values': '127.5', 'scale_values': '63.75'}
    """
    facts = {"model_type": "Classification"} if classifies else {}
    if classes := metadata.get("classes"):
        facts["labels"] = " ".join("_".join(str(name).split()) for name in classes)
    inside = metadata.get("preprocess")
    if inside:
        facts["layout"] = f"input:{inside['layout']}"
    for key, ours in (("mean_values", "mean"), ("scale_values", "std")):
        if ours in metadata and not inside:
            facts[key] = " ".join(f"{LARGEST * value:.7g}" for value in metadata[ours])
    if metadata.get("crop_mode") == "center" or "crop_pct" in metadata:
        facts["resize_type"] = "crop"
    return facts


def read_openvino(path: str | os.PathLike[str]) -> Any:
    """The `openvino.Model` of a file, which may go away afterwards."""
    with open(path, "rb") as model, open(os.path.splitext(path)[0] + ".bin", "rb") as weights:
        return _core().read_model(model.read(), weights.read())


def run_openvino(model: Any, static: fx.GraphModule, example_inputs: Sequence[Tensor], *, threads: int = 0) -> Runner:
    """An OpenVINO model on the CPU, compiled for each shape of inputs that comes: compiled for any batch size it takes
    other kernels, slower ones, which round ties in their own way. `threads`: 0 leaves it to the runtime."""
    # reason: some processors would compute what is left in float in bfloat16
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    core, made = _core(), dict[tuple[torch.Size, ...], Any]()

    def fresh(shapes: tuple[torch.Size, ...], **more: Any) -> Any:
        fixed = model.clone()
        fixed.reshape({i: list(shape) for i, shape in enumerate(shapes)})
        return core.compile_model(fixed, "CPU", {**settings, **more})

    def compiled(inputs: Sequence[Tensor]) -> Any:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in made:
            made[shapes] = fresh(shapes)
        return made[shapes]

    def run(*inputs: Tensor) -> list[Tensor]:
        results = compiled(inputs)([x.numpy() for x in inputs])
        return [torch.from_numpy(results[i].copy()) for i in range(len(model.outputs))]

    def profile(*inputs: Tensor) -> dict[str, float]:
        request = fresh(tuple(x.shape for x in inputs), PERF_COUNT=True).create_infer_request()
        calls: list[dict[str, float]] = []
        for _ in range(PROFILED + 1):
            request.infer([x.numpy() for x in inputs])
            calls.append({})
            for row in request.get_profiling_info():
                key = matcher.row(row.node_name)
                calls[-1][key] = calls[-1].get(key, 0.0) + row.real_time.total_seconds()
        return least(calls[1:])  # reason: the first also packs weights

    matcher, names = LayerMatcher(static), []
    for operation in compiled(example_inputs).get_runtime_model().get_ordered_ops():
        facts = {key: getattr(value, "value", value) for key, value in operation.get_rt_info().items()}
        if facts.get("layerType") in _LAYERS and _is_integer(facts):
            names.append(str(facts.get("originalLayersNames")))
    return Runner("openvino", run, matcher.kernels(names), profile)


def _is_integer(facts: dict[str, Any]) -> bool:
    return "I8" in str(facts.get("primitiveType")).upper() or str(facts.get("runtimePrecision")) in ("u8", "i8")


def _explicit(static: fx.GraphModule) -> fx.GraphModule:
    """A graph with what OpenVINO must be told."""
    exact = static_of(static).exact
    result = copy_graph(static)
    graph = result.graph
    pairs = list(quantizers(graph))
    rounds = exact or any(last.args[0] is not first for first, last in pairs)  # reason: a clip is a bitwidth below 8
    for first, last in pairs:
        source, scale = first.args[:2]
        if exact and source.op == "placeholder":
            with graph.inserting_before(first):
                steps = graph.call_function(aten.mul.Tensor, (source, 1 / scale))
                rounded = graph.call_function(aten.round.default, (steps,))
                first.replace_input_with(source, graph.call_function(aten.mul.Tensor, (rounded, scale)))
        if rounds and last.args[0] is first and any(user.target is aten.add.Tensor for user in last.users):
            with graph.inserting_after(first):
                last.replace_input_with(first, graph.call_function(aten.clamp_max.default, (first, MAX_CODE)))
        if last.args[0] is first and first.args[2] == MIDDLE and all(user.target in _PRODUCTS for user in last.users):
            for node in (first, last):
                node.args = (*node.args[:2], 0, -MIDDLE, MAX_CODE - MIDDLE, torch.int8)
    result.recompile()
    return result.eval()


@target(
    "openvino",
    suffix=".xml",
    help=".xml and .bin, weights int8; runs in OpenVINO",
    options=("preprocess",),
    script=SCRIPT,
)
def openvino(static: fx.GraphModule, inputs: Sequence[Tensor], path: str, options: Mapping[str, Any]) -> Runner:
    """`save_openvino`, and the files as they were loaded again."""
    save_openvino(static, inputs, path, options.get("metadata"))
    return run_openvino(read_openvino(path), static, inputs)


@backend("openvino")
def openvino_here(static: fx.GraphModule, inputs: Sequence[Tensor], threads: int) -> Runner:
    """OpenVINO."""
    return run_openvino(openvino_model(static, inputs), static, inputs, threads=threads)
