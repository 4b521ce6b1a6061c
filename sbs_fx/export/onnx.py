"""ONNX with quantise and dequantise nodes, for ONNX Runtime and whatever else reads it.

In: a static graph. Out: an ONNX model of opset 21, weights as int8 (or int4 on request), biases as int32 on the grid of
their products, a dynamic batch. Holds: the file passes the checker; in ONNX Runtime every convolution and linear of two
quantised operands has an int8 kernel, where it has one (`Kernels` says which have not).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from sbs_fx.export.onnx_graph import for_integer_products
from sbs_fx.export.program import exported_program, output_names
from sbs_fx.export.registry import backend, target
from sbs_fx.export.runtime import PROFILED, Kernels, Runner, failing_as, layer_names, require
from sbs_fx.passes.capture.export import quiet_torch
from sbs_fx.passes.dialects import DEQUANTIZE, QUANTIZE, static_of
from sbs_fx.plan import current_versions, write_atomic

OPSET = 21  # the first with 4-bit integers
# reason: fused to a Gemm first, what is still a product of tensors would never become an integer one
DISABLED = ["MatMulAddFusion"]
SCRIPT = """
import onnxruntime


def load(path):
    session = onnxruntime.InferenceSession(
        path, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs})[0]
"""
_INTEGER = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "QLinearConvTranspose"}
_SMALLEST, _LARGEST = -(2**31), 2**31 - 1
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_SUFFIX = re.compile(r"_token_\d+$")  # what ONNX Runtime adds to the name of a fused node
_LAYER = "layer:"  # before the name of a layer with weights


def onnx_model(
    static: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    low_bits: bool = False,
    opset: int = OPSET,
    products: bool = True,
) -> Any:
    """The `onnx.ModelProto` of a static graph.

    Args:
        low_bits: store weights of 2 to 4 bits as int4, not int8. ONNX Runtime then runs their convolutions in float.
        opset: version of the operators. products: in the forms that CPU tools have integer kernels for, with int32
            biases; False: operators as the graph has them, biases in float.

    Raises:
        BackendError: onnx or onnxscript is not installed, or the graph has an operator that ONNX has not.
        GraphError: `torch.export` cannot capture the graph.
    """
    onnx, _ = require("onnx", "onnxscript")
    graph = for_integer_products(static) if products else static
    program = exported_program(graph, example_inputs)
    names = dict(zip(layer_names(program.graph_module), layer_names(static), strict=True))
    codes = dict(zip(_quantizer_names(program.graph_module), _quantizer_names(graph), strict=True))
    with failing_as("cannot be exported to ONNX"), quiet_torch():
        exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    assert exported is not None
    model = exported.model_proto
    _name_layers(model.graph, names, codes, output_names(program))
    _own_zero_points(model.graph)
    if products:
        _integer_biases(model.graph)
    if low_bits:
        names = {name for name, stored in static_of(static).weights.items() if _most_bits(stored.bits) <= 4}
        _four_bits(model.graph, names)
    onnx.checker.check_model(model, full_check=True)
    return model


def save_onnx(
    static: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write `onnx_model`, which takes the options, to a file as `write_model` does.

    Raises:
        BackendError, GraphError: as `onnx_model`. FileError: the path cannot be written.
    """
    write_model(onnx_model(static, example_inputs, **options), static, example_inputs, path, metadata)


def write_model(
    model: Any,
    static: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None,
) -> None:
    """Write a model to a file, whole or not at all; each property of it is JSON: "version", "bits" of weights and
    activations by name, "size" of images where it is fixed, and `metadata`."""
    form, shape = static_of(static), example_inputs[0].shape
    last = (metadata or {}).get("preprocess", {}).get("layout") == "NHWC"
    bits = {"weights": {name: stored.bits for name, stored in form.weights.items()}}
    bits |= {"activations": {name: a.bits for name, a in form.activations.items()}}
    facts = {"version": current_versions()["sbs_fx"], "bits": bits, "size": list(shape[1:-1] if last else shape[2:])}
    for key, value in {**facts, **(metadata or {})}.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    write_atomic(path, model.SerializeToString())


def run_onnx(model: bytes, static: fx.GraphModule, *, threads: int = 0, integers: bool = True) -> Runner:
    """An ONNX model in ONNX Runtime on the CPU. `threads`: 0 leaves it to the runtime; `integers=False`: every node is
    computed as it is written, none in integers."""
    onnx, ort = require("onnx", "onnxruntime")

    def session(folder: str, **options: Any) -> Any:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        if not integers:
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        for name, value in options.items():
            setattr(settings, name, os.path.join(folder, value) if isinstance(value, str) else value)
        return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED)

    with tempfile.TemporaryDirectory() as folder:
        running = session(folder, optimized_model_filepath="optimised.onnx")
        optimised = onnx.load(os.path.join(folder, "optimised.onnx"))
    names = [value.name for value in running.get_inputs()]

    def feed(inputs: Sequence[Tensor]) -> dict[str, Any]:
        return {name: x.numpy() for name, x in zip(names, inputs, strict=True)}

    def run(*inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(y) for y in running.run(None, feed(inputs))]

    def profile(*inputs: Tensor) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            profiled = session(folder, enable_profiling=True, profile_file_prefix="profile")
            for _ in range(PROFILED):
                profiled.run(None, feed(inputs))
            with open(profiled.end_profiling()) as file:
                events = json.load(file)
        times: dict[str, list[float]] = {}
        for event in events:
            name = event["name"].removesuffix("_kernel_time")
            if event.get("cat") == "Node" and name != event["name"]:
                times.setdefault(name, []).append(event["dur"] / 1e6)
        seconds: dict[str, float] = {}
        for name, found in times.items():
            key = matcher.row(name)
            seconds[key] = seconds.get(key, 0.0) + min(found)
        return seconds

    matcher = LayerMatcher(static)
    kernels = matcher.kernels(node.name for node in optimised.graph.node if node.op_type in _INTEGER)
    return Runner("onnxruntime", run, kernels, profile)


class LayerMatcher:
    """Finds the layers that a tool speaks of, by its own names of one or several nodes of the model."""

    def __init__(self, static: fx.GraphModule) -> None:
        self.layers = layer_names(static)
        self._known = set(self.layers)

    def named(self, name: str) -> set[str]:
        return self._known & {_SUFFIX.sub("", word.removeprefix(_LAYER)) for word in re.split(r"[,/]", name)}

    def row(self, name: str) -> str:
        """Under which name a profile lists the time of that node: its layer's, or its own."""
        return next(iter(self.named(name)), name)

    def kernels(self, integer: Iterable[str]) -> Kernels:
        """From the tool's names of the nodes that are integer kernels."""
        reached = {layer for name in integer for layer in self.named(name)}
        return Kernels(tuple(n for n in self.layers if n in reached), tuple(n for n in self.layers if n not in reached))


# -- the model ---------------------------------------------------------------------------------------------------------


def _quantizer_names(graph_module: fx.GraphModule) -> list[str]:
    return [node.name for node in graph_module.graph.nodes if node.target in (QUANTIZE, DEQUANTIZE)]


def _name_layers(graph: Any, layers: Mapping[str, str], codes: Mapping[str, str], outputs: Sequence[str]) -> None:
    """Call outputs by these names, where they are free, and what multiplies by a weight or quantises, and its result,
    as our graph does (exporter's name -> ours); drop the exporter's notes on where nodes came from, which are half of a
    small file."""
    results = {**codes, **layers}
    own = [value.name for value in graph.output]
    taken = {*results.values(), "input", *(name for node in graph.node for name in node.output if name not in own)}
    if len(outputs) == len({*own}) == len({*outputs} - taken) == len(own):
        results |= dict(zip(own, outputs, strict=True))
    inputs = {graph.input[0].name: "input"} if len(graph.input) == 1 else {}
    for node in graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        del node.metadata_props[:]
        source = notes.get("pkg.torch.onnx.fx_node", "").partition(" ")[0].removeprefix("%")
        if node.op_type in _PRODUCTS and source in layers:
            node.name = f"{_LAYER}{layers[source]}"
        elif source in codes:
            node.name = codes[source]
        elif node.op_type == "DequantizeLinear":
            node.name = f"{node.input[0]}_values"
        for values in (node.input, node.output):
            values[:] = [inputs.get(name, results.get(name, name)) for name in values]
    first = graph.input[0].type.tensor_type.shape.dim[:1] if graph.input else []
    symbol = first[0].dim_param if first else ""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim if symbol else ():
            if size.dim_param:  # an expression of several sizes, maybe
                size.dim_param = re.sub(rf"\b{symbol}\b", "batch", size.dim_param)
        value.name = inputs.get(value.name, results.get(value.name, value.name))


def _own_zero_points(graph: Any) -> None:
    """Each weight gets zero points of its own: shared by a convolution and a linear, they would keep both from integer
    kernels in OpenVINO; without any, ONNX Runtime has none for linears."""
    numpy_helper = require("onnx")[0].numpy_helper
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) > 2 and node.input[0] in tensors:
            values = numpy_helper.to_array(tensors[node.input[2]])
            if len(tensors[node.input[0]].dims) == 1:  # a vector has one scale, and kernels want it as one number
                values, scale = values[:1].reshape(()), numpy_helper.to_array(tensors[node.input[1]])[:1].reshape(())
                node.input[1] = f"{node.input[0]}_one_scale"
                graph.initializer.append(numpy_helper.from_array(scale, node.input[1]))
            node.input[2] = f"{node.input[0]}_zero_points"
            graph.initializer.append(numpy_helper.from_array(values, node.input[2]))
    _drop_unread(graph)


def _integer_biases(graph: Any) -> None:
    """Biases of layers with two quantised operands as int32 codes: only so runtimes have an integer kernel for them."""
    onnx = require("onnx")[0]
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    made = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) != 3 or node.input[2] not in tensors:
            continue
        scales = [_scale(makers.get(name), tensors) for name in node.input[:2]]
        if scales[0] is None or scales[1] is None:
            continue
        step = scales[0] * scales[1]
        codes = np.round(onnx.numpy_helper.to_array(tensors[node.input[2]]).astype(np.float64) / step)
        name = f"{node.name}_bias"
        codes = np.clip(codes, _SMALLEST, _LARGEST).astype(np.int32)
        step = np.broadcast_to(step, codes.shape).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(codes, f"{name}_codes"))
        graph.initializer.append(onnx.numpy_helper.from_array(step, f"{name}_scale"))
        inputs = [f"{name}_codes", f"{name}_scale"]
        made.append(onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}_values"], name=name, axis=0))
        node.input[2] = f"{name}_values"
    nodes = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unread(graph)


def _scale(node: Any, tensors: Mapping[str, Any]) -> Any:
    """The scale of a dequantised operand, () or (channels,), float64; None if it is none."""
    if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in tensors:
        return None
    return require("onnx")[0].numpy_helper.to_array(tensors[node.input[1]]).astype(np.float64)


def _drop_unread(graph: Any) -> None:
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _four_bits(graph: Any, names: set[str]) -> None:
    """Codes of these weights, and zero points of their own, as int4."""
    onnx = require("onnx")[0]
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in names:
            codes, scale = (onnx.numpy_helper.to_array(tensors[name]) for name in node.input[:2])
            zeros = f"{node.name}_zero_points"
            for name, value in ((node.input[0], codes), (zeros, np.zeros(scale.shape, np.int8))):
                four = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, value.shape, _nibbles(value), raw=True)
                if name in tensors:
                    tensors[name].CopyFrom(four)
                else:
                    graph.initializer.append(four)
            del node.input[2:]
            node.input.append(zeros)
    del graph.value_info[:]  # reason: it states the old types; a checker infers them again
    _drop_unread(graph)


def _nibbles(codes: Any) -> bytes:
    """Two codes a byte, the first in the lower half."""
    flat = np.append(codes.astype(np.uint8).flatten() & 15, np.zeros(codes.size % 2, np.uint8))
    return (flat[::2] | flat[1::2] << 4).tobytes()


def _most_bits(bits: int | Sequence[int]) -> int:
    return bits if isinstance(bits, int) else max(bits)


@target(
    "onnx",
    suffix=".onnx",
    help="ONNX, opset 21, weights int8, int4 on wish; runs in ONNX Runtime, OpenVINO and others",
    options=("low_bits", "opset", "preprocess"),
    script=SCRIPT,
)
def onnx(static: fx.GraphModule, inputs: Sequence[Tensor], path: str, options: Mapping[str, Any]) -> Runner:
    """`save_onnx`, and the file as ONNX Runtime loads it."""
    asked = {"low_bits": bool(options.get("low_bits")), "opset": options.get("opset") or OPSET}
    save_onnx(static, inputs, path, options["metadata"], **asked)
    return run_onnx(Path(path).read_bytes(), static)


@backend("onnxruntime")
def onnxruntime(static: fx.GraphModule, inputs: Sequence[Tensor], threads: int) -> Runner:
    """ONNX Runtime."""
    return run_onnx(onnx_model(static, inputs).SerializeToString(), static, threads=threads)
