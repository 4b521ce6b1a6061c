"""What TensorRT reads of a quantised ONNX model, as rules that need no GPU.

In: an `onnx.ModelProto`. Out: what breaks a rule, each with the rule's name and the node's. Holds: each rule is one
that TensorRT publishes, cited beside it; nothing here says how fast a model is. Sources:

    QT   NVIDIA, TensorRT documentation, "Working with Quantized Types"
         (docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html)
    OPS  onnx-tensorrt, docs/operators.md: operators that the parser supports, with restrictions
    OG   NVIDIA, TensorRT documentation, "ONNX Opset Guide"
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sbs_fx.export.onnx_reading import Model, Rules

OPSETS = range(9, 26)
_UNSUPPORTED = {
    "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul", "BitShift",
}  # fmt: skip
_CONVOLUTIONS = {"Conv", "ConvTranspose"}
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}

_RULES = Rules()


def tensorrt_problems(model: Any) -> list[str]:
    """Lines "RULE: NODE WHAT", in the order of the rules; none for a model that TensorRT's rules allow.

    Args:
        model: an `onnx.ModelProto`.
    """
    return _RULES.problems(model)


@_RULES.rule
def opset(model: Model) -> Iterator[tuple[str, str]]:
    """OG, "Supported ONNX and Opset Versions": 9 to 25."""
    if model.opset not in OPSETS:
        yield "model", f"has opset {model.opset}, not one of {OPSETS.start} to {OPSETS.stop - 1}"


@_RULES.rule
def supported_operators(model: Model) -> Iterator[tuple[str, str]]:
    """OPS: operators on integers are not read; quantisation is said by Q/DQ pairs alone."""
    for node in model.of(*_UNSUPPORTED):
        yield node.name, f"is a {node.op_type}, which the parser does not read"


@_RULES.rule
def zero_points(model: Model) -> Iterator[tuple[str, str]]:
    """OPS, QuantizeLinear and DequantizeLinear: the zero point must be 0. QT: the scheme is symmetric."""
    for node in model.of("QuantizeLinear", "DequantizeLinear"):
        zero = model.constants.get(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        if zero is None or np.any(np.asarray(zero).astype(np.int64)):
            yield node.name, "has a zero point that is not 0"


@_RULES.rule
def signed_codes(model: Model) -> Iterator[tuple[str, str]]:
    """QT, "Supported Data Types": INT8 and INT4 are signed, so neither uint8 activations nor int32 biases are read."""
    for node in model.of("QuantizeLinear", "DequantizeLinear"):
        if (kind := model.code_type(node)) not in ("int8", "int4"):
            yield node.name, f"has codes of {kind}"


@_RULES.rule
def constant_scales(model: Model) -> Iterator[tuple[str, str]]:
    """QT, "Explicit quantization": scales are build-time constants; they are positive."""
    for node in model.of("QuantizeLinear", "DequantizeLinear"):
        scale = model.constants.get(node.input[1])
        if scale is None or not np.all(scale > 0):
            yield node.name, "has a scale that is not a positive constant"


@_RULES.rule
def scales_per_channel(model: Model) -> Iterator[tuple[str, str]]:
    """QT, "Quantization Scheme": activations have one scale a tensor; weights one, or one per output channel."""
    for node in model.of("QuantizeLinear", "DequantizeLinear"):
        scale = model.constants.get(node.input[1])
        if scale is None or scale.size == 1:
            continue
        if not model.is_weight(node):
            yield node.name, "is an activation with several scales"
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        for layer in model.readers.get(node.output[0], []):
            transposed = any(a.name == "transB" and a.i for a in layer.attribute)
            if axis != {"Conv": 0, "ConvTranspose": 1}.get(layer.op_type, 0 if transposed else axis):
                yield node.name, f"has scales along axis {axis}, which is not that of {layer.name}'s output channels"


@_RULES.rule
def convolutions(model: Model) -> Iterator[tuple[str, str]]:
    """OPS, Conv and ConvTranspose: 2D or 3D alone, weights constants (behind a DequantizeLinear)."""
    for node in model.of("Conv", "ConvTranspose"):
        maker = model.makers.get(node.input[1])
        weight = model.constants.get(maker.input[0] if maker is not None and model.is_weight(maker) else node.input[1])
        if weight is None:
            yield node.name, "has a weight that is not a constant"
        elif weight.ndim not in (4, 5):
            yield node.name, f"is a convolution over {weight.ndim - 2} dimensions"


@_RULES.rule
def all_operands(model: Model) -> Iterator[tuple[str, str]]:
    """QT, "Q/DQ Layer-Placement Recommendations": quantise all inputs of weighted operations, or none. A product of two
    tensors that are no weights, as in attention, is none: it is in float where one of them is."""
    for node in model.of(*_LAYERS):
        if not any(model.is_constant(name) for name in node.input[:2]):
            continue
        kinds = [model.maker(name) == "DequantizeLinear" for name in node.input[:2]]
        if any(kinds) and not all(kinds):
            yield node.name, f"has a quantised {'weight' if kinds[1] else 'input'} alone"


@_RULES.rule
def residual_adds(model: Model) -> Iterator[tuple[str, str]]:
    """QT, "Q/DQ Layer-Placement Recommendations": quantise the residual input in skip connections."""
    for node in model.of("Add"):
        tensors = [name for name in node.input if name not in model.constants]
        kinds = [model.maker(name) == "DequantizeLinear" for name in tensors]
        if any(kinds) and not all(kinds):
            yield node.name, "adds a quantised tensor to one that is not"


@_RULES.rule
def inside_fusions(model: Model) -> Iterator[tuple[str, str]]:
    """QT, "Q/DQ Layer-Placement Recommendations": no quantiser between a layer and the batch norm or relu that is fused
    into it; no batch norm left where it could be folded."""
    for node in model.of("Relu", "Clip", "BatchNormalization"):
        source = model.makers.get(node.input[0])
        if source is not None and source.op_type == "DequantizeLinear":
            quantizer = model.makers.get(source.input[0])
            alone = all(reader is node for reader in model.readers[source.output[0]])
            if alone and quantizer is not None and model.maker(quantizer.input[0]) in _LAYERS:
                yield node.name, "reads a quantised result of a layer, into which it would be fused"
        elif node.op_type == "BatchNormalization" and source is not None and source.op_type in _CONVOLUTIONS:
            if len(model.readers[node.input[0]]) > 1:  # reason: somebody else reads what is before the batch norm
                continue
            yield node.name, f"is not folded into {source.name}"
