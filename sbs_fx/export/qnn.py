"""ONNX for Qualcomm's NPUs, which ONNX Runtime's QNN provider hands over, and for others that want fixed shapes.

In: a static graph. Out: a .onnx file as `onnx` writes it, unsigned codes, for a fixed number of images, and what of it
the NPU's published rules leave to the CPU (`qnn_rules`). Holds: compared in ONNX Runtime on the CPU; nothing was run on
such a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from sbs_fx.export.onnx import OPSET, SCRIPT, onnx_model, run_onnx, write_model
from sbs_fx.export.qnn_rules import qnn_problems
from sbs_fx.export.registry import Numerics, target
from sbs_fx.export.runtime import Runner, flat, in_batches, require


def qnn_model(static: fx.GraphModule, example_inputs: Sequence[Tensor], *, batch: int = 1, opset: int = OPSET) -> Any:
    """The `onnx.ModelProto` for so many images a call. Raises BackendError, GraphError as `onnx_model`."""
    onnx, tools = require("onnx", "onnxruntime.tools.onnx_model_utils")
    model = onnx_model(static, example_inputs, opset=opset)
    del model.graph.value_info[:]  # reason: it speaks of a dynamic batch
    tools.make_dim_param_fixed(model.graph, "batch", batch)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    onnx.checker.check_model(inferred, full_check=True)
    return inferred


@target(
    "qnn",
    suffix=".onnx",
    help="ONNX of fixed shapes, for Qualcomm's NPUs; computed by ONNX Runtime on the CPU here",
    options=("batch", "opset", "preprocess"),
    numerics=Numerics(activation_bits=(8,)),
    script=SCRIPT,
)
def qnn(static: fx.GraphModule, inputs: Sequence[Tensor], path: str, options: Mapping[str, Any]) -> Runner:
    """The file, and as ONNX Runtime loads it; `lost` says what of it the NPU's rules leave to the CPU."""
    batch = options.get("batch") or 1
    model = qnn_model(static, inputs, batch=batch, opset=options.get("opset") or OPSET)
    write_model(model, static, inputs, path, options["metadata"])
    loaded = run_onnx(Path(path).read_bytes(), static)

    def run(*inputs: Tensor) -> list[Tensor]:
        return in_batches(lambda part: flat(loaded(*part)), inputs, batch)

    return replace(loaded, name="qnn", run=run, kernels=None, profile=None, lost=tuple(qnn_problems(model)))
