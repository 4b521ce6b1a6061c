"""What Qualcomm's NPUs take of a quantised ONNX model through ONNX Runtime's QNN provider, as rules without a device.

In: an `onnx.ModelProto`. Out: what breaks a rule, each with the rule's name and the node's. Holds: each rule is one
that is published, cited beside it; nothing here was run on such a device. Sources:

    EP   ONNX Runtime, "QNN Execution Provider" (onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html)
    QC   ONNX Runtime, onnxruntime/python/tools/quantization/execution_providers/qnn/quant_config.py (github.com/
         microsoft/onnxruntime), by which its own tool quantises for QNN
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sbs_fx.export.onnx_reading import Model, Rules

SUPPORTED = {
    "Abs", "Add", "And", "ArgMax", "ArgMin", "Asin", "Atan", "AveragePool", "BatchNormalization", "Cast", "Clip",
    "Concat", "Conv", "ConvTranspose", "Cos", "DepthToSpace", "DequantizeLinear", "Div", "Elu", "Equal", "Exp",
    "Expand", "Flatten", "Floor", "Gather", "Gelu", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual",
    "GridSample", "HardSwish", "InstanceNormalization", "LRN", "LayerNormalization", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Not",
    "Or", "PRelu", "Pad", "Pow", "QuantizeLinear", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "Relu", "Reshape", "Resize", "Round", "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "SpaceToDepth", "Split",
    "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
_FREE = {"Constant", "Identity"}  # of which nothing is computed on the device
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_AXES = {"Conv": 0, "ConvTranspose": 1}

_RULES = Rules()


def qnn_problems(model: Any) -> list[str]:
    """Lines "RULE: NODE WHAT", in the order of the rules; none for a model that can run on the NPU whole.

    Args:
        model: an `onnx.ModelProto`.
    """
    return _RULES.problems(model)


@_RULES.rule
def fixed_shapes(model: Model) -> Iterator[tuple[str, str]]:
    """EP, "Model requirements": no dynamic shapes, such as a dynamic batch."""
    for value in (*model.graph.input, *model.graph.output):
        sizes = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        if any(not isinstance(size, int) or size < 1 for size in sizes):
            yield value.name, f"has shape {sizes}"


@_RULES.rule
def supported_operators(model: Model) -> Iterator[tuple[str, str]]:
    """EP, "Supported ONNX operators"; others are left to the CPU."""
    for node in model.nodes:
        if node.op_type not in SUPPORTED | _FREE:
            yield node.name, f"is a {node.op_type}, which runs on the CPU"


@_RULES.rule
def quantized(model: Model) -> Iterator[tuple[str, str]]:
    """EP, "Running a model with QNN EP's HTP backend": it takes quantised models alone."""
    for node in model.of(*_LAYERS):
        if any(model.maker(name) != "DequantizeLinear" for name in node.input[:2]):
            yield node.name, "has an operand that is not quantised"


@_RULES.rule
def unsigned_codes(model: Model) -> Iterator[tuple[str, str]]:
    """EP, "Generating a quantized model": QNN's operators typically support uint8 and uint16."""
    for node in model.of("QuantizeLinear"):
        if (kind := model.code_type(node)) not in ("uint8", "uint16"):
            yield node.name, f"gives codes of {kind}"


@_RULES.rule
def products(model: Model) -> Iterator[tuple[str, str]]:
    """EP, "Supported ONNX operators", MatMul: (uint8, uint8), (uint8, uint16) or (uint16, uint8) on the NPU."""
    for node in model.of("MatMul"):
        makers = [model.source(name) for name in node.input[:2]]
        kinds = [model.code_type(m) for m in makers if m is not None and m.op_type == "DequantizeLinear"]
        if len(kinds) == 2 and (set(kinds) - {"uint8", "uint16"} or kinds == ["uint16", "uint16"]):
            yield node.name, f"multiplies codes of {kinds[0]} by {kinds[1]}"


@_RULES.rule
def scales_per_channel(model: Model) -> Iterator[tuple[str, str]]:
    """QC, `per_channel`: of Conv along axis 0, of ConvTranspose along axis 1; QNN has none for MatMul. Activations have
    one scale a tensor."""
    for node in model.of("DequantizeLinear", "QuantizeLinear"):
        scale = model.constants.get(node.input[1])
        if scale is None or scale.size == 1:
            continue
        if not model.is_weight(node):
            yield node.name, "is an activation with several scales"
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        for layer in model.readers.get(node.output[0], []):
            if layer.op_type == "MatMul" or node.output[0] == layer.input[1] and axis != _AXES.get(layer.op_type, axis):
                yield node.name, f"has scales along axis {axis}, which {layer.op_type} {layer.name} does not take"
