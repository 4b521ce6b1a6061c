"""Post-training int8 of other tools, as they come: torchao's PT2E, ONNX Runtime's static quantiser, NNCF for OpenVINO.

In: a float model and a batch that all calibrate on. Out: a callable that takes batches of that size. Each tool
is one that a user installs if they want it: a missing one raises ImportError.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def torchao_pt2e(model: nn.Module, x: Tensor) -> Any:
    from torch._inductor import config

    with torch.no_grad(), config.patch(freezing=True):
        compiled = torch.compile(_converted(model, [x]), dynamic=False)
        compiled(x)

    def run(x: Tensor) -> Any:
        with torch.no_grad():
            return compiled(x)

    return run


def torchao_int8(model: nn.Module, batches: list[Tensor]) -> Any:
    """The same, calibrated on all batches; run as it is, uncompiled. Takes batches of any size."""
    return _converted(model, batches, ({0: torch.export.Dim("batch", min=2)},))


def _converted(model: nn.Module, batches: list[Tensor], dynamic_shapes: Any = None) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        program = torch.export.export(model, (batches[0],), dynamic_shapes=dynamic_shapes)
        prepared = prepare_pt2e(program.module(), quantizer)
        for x in batches:
            prepared(x)
        return convert_pt2e(prepared)  # type: ignore[no-any-return]


def onnxruntime_static(model: nn.Module, x: Tensor, threads: int, *, defaults: bool = False) -> Any:
    """`defaults`: as `quantize_static` does it unasked; else prepared, per channel, uint8 activations, which is several
    times faster on a convnet."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, path = (str(Path(folder) / f"{name}.onnx") for name in ("float", "prepared", "int8"))
        torch.onnx.export(model, (x,), plain, dynamo=True, opset_version=21, verbose=False, external_data=False)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        name = ort.InferenceSession(prepared, providers=["CPUExecutionProvider"]).get_inputs()[0].name

        class Batch(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.waiting = [{name: x.numpy()}]

            def get_next(self) -> Any:
                return self.waiting.pop() if self.waiting else None

        chosen = {
            "quant_format": QuantFormat.QDQ,
            "per_channel": True,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
        }
        quantize_static(plain if defaults else prepared, path, Batch(), **({} if defaults else chosen))
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {name: x.numpy()})


def openvino_nncf(model: nn.Module, x: Tensor, threads: int) -> Any:
    import nncf
    import openvino

    found = openvino.convert_model(model, example_input=x)
    found.reshape(list(x.shape))
    quantised = nncf.quantize(found, nncf.Dataset([x], lambda x: x.numpy()), subset_size=1)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(quantised, "CPU", settings)
    return lambda x: compiled([x.numpy()])[0]


def nncf_int8(model: nn.Module, batches: list[Tensor]) -> Any:
    """NNCF's quantisation for OpenVINO as it comes, on all pictures."""
    import nncf
    import openvino

    found = openvino.convert_model(model, example_input=batches[0])
    found.reshape([-1, *batches[0].shape[1:]])
    pictures = [x for batch in batches for x in batch.split(1)]
    quantised = nncf.quantize(found, nncf.Dataset(pictures, lambda x: x.numpy()), subset_size=len(pictures))
    compiled = openvino.Core().compile_model(quantised, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: compiled([x.numpy()])[0]
