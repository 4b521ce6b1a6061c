"""ONNX in the form that TensorRT reads: signed symmetric codes, float biases, quantisers where its fusions allow them.

In: a static graph. Out: a .onnx file that keeps TensorRT's published rules (`tensorrt_rules`), run in ONNX Runtime and
compared. Holds: nothing was run in TensorRT, which needs a GPU; a tensor whose codes have no symmetric form of the same
values is quantised anew, and named.

    codes around 128 become those around 0, and unsigned ones of up to 7 bits stay: both exactly
    unsigned ones of 8 bits, and those with another zero point, get 127 levels on the larger side
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from sbs_fx.export.onnx import OPSET, onnx_model, run_onnx, write_model
from sbs_fx.export.onnx_graph import attention_as_products
from sbs_fx.export.registry import Numerics, target
from sbs_fx.export.runtime import Runner
from sbs_fx.export.signed import clip_values, shift_codes
from sbs_fx.export.tensorrt_rules import tensorrt_problems
from sbs_fx.passes.dialects import quantizers
from sbs_fx.passes.graph import copy_graph
from sbs_fx.passes.static.finalize import MIDDLE
from sbs_fx.plan.errors import BackendError

aten = torch.ops.aten
_HIGHEST = 127


def symmetric_codes(static: fx.GraphModule) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A copy of a static graph whose activations are int8 codes with zero point 0; the tensors that lost values."""
    result = copy_graph(static)
    clip_values(result.graph, fused=True)
    lost = []
    for first, last in quantizers(result.graph):
        scale, zero, low, high = cast("tuple[Any, ...]", first.args[1:5])
        if zero == 0 and _top(first) <= _HIGHEST:
            arguments = (scale, 0, -MIDDLE, _HIGHEST, torch.int8)
        elif zero != MIDDLE:
            scale = scale * max(high - zero, zero - low) / _HIGHEST
            arguments = (scale, 0, -MIDDLE, _HIGHEST, torch.int8)
            lost.append(first.args[0].name)
        else:
            continue
        for node in (first, last):
            node.args = (node.args[0], *arguments)
    shift_codes(result.graph)
    attention_as_products(result.graph)
    result.graph.lint()
    result.recompile()
    return result.eval(), tuple(lost)


def _top(quantizer: fx.Node) -> int:
    """The largest code that values reach."""
    value, scale, zero, _, high = quantizer.args[:5]
    bounds = value.args[1:] if value.target is aten.hardtanh.default else ()
    return min(high, round(bounds[1] / scale) + zero) if bounds else high


def tensorrt_model(
    static: fx.GraphModule, example_inputs: Sequence[Tensor], *, opset: int = OPSET
) -> tuple[Any, tuple[str, ...]]:
    """The `onnx.ModelProto`, and the names of tensors that were quantised anew.

    Raises:
        BackendError: as `onnx_model`, or the model breaks a rule of TensorRT's; names the first.
    """
    signed, lost = symmetric_codes(static)
    model = onnx_model(signed, example_inputs, opset=opset, products=False)
    if problems := tensorrt_problems(model):
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise BackendError(f"TensorRT would not read this graph: {problems[0]}{more}; use another format")
    return model, lost


@target(
    "tensorrt",
    suffix=".onnx",
    help="ONNX, int8 symmetric, as TensorRT reads it; computed by ONNX Runtime here",
    options=("opset", "preprocess"),
    numerics=Numerics(zero_points=False, activation_bits=(8,)),
)
def tensorrt(static: fx.GraphModule, inputs: Sequence[Tensor], path: str, options: Mapping[str, Any]) -> Runner:
    """The file, and as ONNX Runtime loads it, whose kernels say nothing of TensorRT's."""
    model, lost = tensorrt_model(static, inputs, opset=options.get("opset") or OPSET)
    write_model(model, static, inputs, path, options["metadata"])
    # reason: ONNX Runtime moves signed codes through transpositions and gives them an unsigned zero point
    runner = run_onnx(Path(path).read_bytes(), static, integers=False)
    return replace(runner, kernels=None, lost=tuple(f"{name}: codes around 0, 127 levels a side" for name in lost))
