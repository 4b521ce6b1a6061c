"""LiteRT (.tflite), for telephones, browsers and small boards.

In: a static graph. Out: a file of int8 codes throughout, and which layers have an int8 kernel. Holds: results as
torch's under XNNPACK, not always under the runtime's reference kernels; a dynamic batch, or images one after another
where the converter has no dynamic form of an operator, such as a reshape. It asks for a form of its own:

    activations are signed codes, the same ones shifted by 128
    weights are floats on their grid, quantised and dequantised: it stores their codes
    a bitwidth below 8 is a clip of the values between two quantisers
    a layer whose result is not quantised, as the last one's, has no integer kernel, and its weights would be stored in
    float: with images at hand to measure ranges on, its result is quantised (`integer_results`)

Where the first operator quantises the input, the file takes its codes, as `input_codes` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.export.litert_weights import four_bit_weights
from sbs_fx.export.program import dynamic_shapes
from sbs_fx.export.registry import Numerics, backend, target
from sbs_fx.export.results import calibrated, causes
from sbs_fx.export.runtime import LAYERS, Kernels, Runner, failing_as, in_batches, require, sorted_codes, weight_name
from sbs_fx.export.signed import clip_values, shift_codes
from sbs_fx.passes.capture.export import quiet_torch
from sbs_fx.passes.channels.facts import facts_of
from sbs_fx.passes.dialects import DEQUANTIZE, QUANTIZE
from sbs_fx.passes.graph import attribute, copy_graph
from sbs_fx.plan import write_atomic
from sbs_fx.plan.errors import BackendError

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
# Operators with a weight, and the argument that it is.
_WEIGHTS = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1, "CONV_3D": 1}

SCRIPT = """
from ai_edge_litert.interpreter import Interpreter


def load(path):
    call = Interpreter(path).get_signature_runner()
    ((name, takes),) = call.get_input_details().items()
    ((result, gives),) = call.get_output_details().items()

    def run(inputs):
        scale, zero = takes["quantization"]
        codes = np.clip(np.round(inputs / np.float32(scale)) + zero, -128, 127).astype(np.int8) if scale else inputs
        values = call(**{name: codes})[result]
        scale, zero = gives["quantization"]
        return (values.astype(np.float32) - zero) * np.float32(scale) if scale else values

    return run
"""
_FLAT = {aten.flatten.using_ints, aten.reshape.default, aten.view.default}


def litert_model(static: fx.GraphModule, example_inputs: Sequence[Tensor], *, batch: int | None = None) -> bytes:
    """A static graph as the bytes of a LiteRT file.

    Args:
        batch: images that one call of the file takes. None: any number, or one where the converter cannot say so.

    Raises:
        BackendError: litert-torch is not installed, or its converter fails on this graph.
    """
    litert, config, quantizer = require(
        "litert_torch", "litert_torch.quantize.quant_config", "litert_torch.quantize.pt2e_quantizer"
    )
    settings = quantizer.get_symmetric_quantization_config(is_per_channel=True)
    # reason: it is what tells the converter to keep codes; it quantises nothing by itself
    options: dict[str, Any] = {
        "quant_config": config.QuantConfig(pt2e_quantizer=quantizer.PT2EQuantizer().set_global(settings))
    }
    inputs, signed = tuple(example_inputs), _signed(static)
    shapes = dynamic_shapes(static, inputs)
    if batch is not None:
        fixed = [_of_batch(x, batch) if 0 in shape else x for x, shape in zip(inputs, shapes, strict=True)]
        return _converted(litert, signed, tuple(fixed), options)
    try:
        model = _converted(litert, signed, inputs, {**options, "dynamic_shapes": shapes})
    except BackendError:
        model = None
    return model if model is not None and _takes_any_batch(model) else litert_model(static, inputs, batch=1)


def _takes_any_batch(model: bytes) -> bool:
    """Whether the runtime can prepare it for one image and for two: the converter may have written a number of images
    into a shape."""
    (runtime,) = require("ai_edge_litert.interpreter")
    interpreter = runtime.Interpreter(model_content=model)
    try:
        for batch in (1, 2):
            for detail in interpreter.get_input_details():
                if detail["shape_signature"][0] == -1:
                    interpreter.resize_tensor_input(detail["index"], [batch, *detail["shape"][1:]])
            interpreter.allocate_tensors()
    except RuntimeError:
        return False
    return True


def _converted(litert: Any, signed: fx.GraphModule, inputs: tuple[Tensor, ...], options: Mapping[str, Any]) -> bytes:
    with failing_as("LiteRT's converter fails on this graph"), _silent(litert), torch.no_grad():
        return litert.convert(signed, inputs, **options)._exporter.to_bytes()


def _of_batch(x: Tensor, batch: int) -> Tensor:
    """The first images, the first of them again where there are too few."""
    return torch.cat([x[:batch], x[:1].expand(max(0, batch - len(x)), *x.shape[1:])])


def run_litert(model: bytes, static: fx.GraphModule, *, threads: int = 0, reference: bool = False) -> Runner:
    """A LiteRT file in its runtime on the CPU.

    Args:
        threads: 0 leaves it to the runtime. reference: its plain kernels, not XNNPACK's.
    """
    (runtime,) = require("ai_edge_litert.interpreter")
    kinds = runtime.OpResolverType
    kind = kinds.BUILTIN_REF if reference else kinds.BUILTIN
    interpreter = runtime.Interpreter(
        model_content=model, num_threads=threads or None, experimental_op_resolver_type=kind
    )
    call = interpreter.get_signature_runner()
    takes, gives = (_in_order(details) for details in (call.get_input_details(), call.get_output_details()))
    held = interpreter, call  # reason: the call reads memory that the interpreter owns
    batch = takes[0]["shape_signature"][0]  # -1 if any

    def once(inputs: Sequence[Tensor]) -> list[Tensor]:
        codes = {d["name"]: input_codes(x, d).contiguous().numpy() for x, d in zip(inputs, takes, strict=True)}
        with failing_as(f"LiteRT cannot run inputs of shapes {[tuple(x.shape) for x in inputs]}"):
            results = held[1](**codes)
        return [_values(torch.from_numpy(results[d["name"]].copy()), d) for d in gives]

    def run(*inputs: Tensor) -> list[Tensor]:
        return once(inputs) if batch in (-1, len(inputs[0])) else in_batches(once, inputs, batch)

    name = "litert reference kernels" if reference else "litert"
    return Runner(name, run, litert_kernels(model, static))


def litert_kernels(model: bytes, static: fx.GraphModule) -> Kernels:
    """Layers by whether an operator of the file takes int8 codes, holds the layer's own and gives int8 codes."""
    (runtime,) = require("ai_edge_litert.interpreter")
    plain = runtime.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = runtime.Interpreter(model_content=model, experimental_op_resolver_type=plain)
    interpreter.allocate_tensors()
    kinds = {detail["index"]: detail["dtype"].__name__ for detail in interpreter.get_tensor_details()}
    held: list[bytes] = []
    for operator in interpreter._get_ops_details():
        if operator["op_name"] in _WEIGHTS:
            source, weight = operator["inputs"][0], operator["inputs"][_WEIGHTS[operator["op_name"]]]
            # reason: a transposed convolution takes the shape of its result first
            source = operator["inputs"][2] if operator["op_name"] == "TRANSPOSE_CONV" else source
            if kinds[source] == kinds[weight] == kinds[operator["outputs"][0]] == "int8":
                held.append(sorted_codes(torch.from_numpy(interpreter.get_tensor(weight).copy())))
    integer: list[str] = []
    floating: list[str] = []
    for node in static.graph.nodes:
        if node.target in LAYERS:
            name = weight_name(node)
            codes = sorted_codes(attribute(static, name)) if name else b""
            (integer if codes in held else floating).append(node.name)
            if codes in held:
                held.remove(codes)
    return Kernels(tuple(integer), tuple(floating))


def input_codes(x: Tensor, detail: Mapping[str, Any]) -> Tensor:
    """An input as the file takes it: itself, or its int8 codes. detail: of the runtime's `get_input_details`."""
    scale, zero = detail["quantization"]
    if not scale:
        return x
    return decomposed.quantize_per_tensor.default(x, float(scale), int(zero), -128, 127, torch.int8)


def _values(codes: Tensor, detail: Mapping[str, Any]) -> Tensor:
    scale, zero = detail["quantization"]
    return (codes.float() - zero) * scale if scale else codes


def _in_order(details: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Inputs or outputs as the graph has them, by the number at the end of the converter's names."""
    names = sorted(details, key=lambda name: int(name.rpartition("_")[2]))
    return [{**details[name], "name": name} for name in names]


def _signed(static: fx.GraphModule) -> fx.GraphModule:
    """A static graph in the form that the converter asks for."""
    result = copy_graph(static)
    graph = result.graph
    for pool in graph.nodes:
        if facts_of(pool.target).codes == "pick":
            _leave_to_reader(pool)
    clip_values(graph, fused=False)
    shift_codes(graph)
    for node in graph.find_nodes(op="call_function", target=decomposed.dequantize_per_channel.default):
        codes = node.args[0]
        values = [attribute(result, str(a.target)) if isinstance(a, fx.Node) else a for a in node.args]
        result.register_buffer(f"{node.name}_values", decomposed.dequantize_per_channel.default(*values))
        with graph.inserting_before(node):
            floats = graph.get_attr(f"{node.name}_values")
            again = graph.call_function(decomposed.quantize_per_channel.default, (floats, *node.args[1:]))
        node.replace_input_with(codes, again)
    for node in graph.nodes:
        if node.target in _FLAT and _is_squeeze(node):  # reason: the converter has no reshape of a dynamic batch
            node.target, node.args, node.kwargs = aten.squeeze.dims, (node.args[0], [2, 3]), {}
    graph.eliminate_dead_code()
    graph.lint()
    result.recompile()
    return result.eval()


def _leave_to_reader(pool: fx.Node) -> None:
    """Codes of a pool's result that are only quantised again, more coarsely, are left out: the converter would give the
    pool the coarser scale, which it must not have."""
    users = list(pool.users)
    values = next(iter(users[0].users), None) if len(users) == 1 and users[0].target is QUANTIZE else None
    if values is not None and values.target is DEQUANTIZE and all(user.target is QUANTIZE for user in values.users):
        values.replace_all_uses_with(pool)


def _is_squeeze(node: fx.Node) -> bool:
    """Whether it only drops two last dimensions of size one."""
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if before is None or after is None or before.ndim != 4 or after.ndim != 2:
        return False
    return tuple(before.shape[2:]) == (1, 1) and before.shape[1] == after.shape[1]


@contextmanager
def _silent(litert: Any) -> Iterator[None]:
    """Without the tool's progress, which it prints."""
    shown, litert.config.show_progress = litert.config.show_progress, False
    try:
        with quiet_torch():
            yield
    finally:
        litert.config.show_progress = shown


@target(
    "litert",
    suffix=".tflite",
    help="LiteRT, int8 throughout; runs in LiteRT (formerly TensorFlow Lite)",
    options=("batch", "calibration", "low_bits"),
    numerics=Numerics(activation_bits=(8,)),
    script=SCRIPT,
)
def litert(static: fx.GraphModule, inputs: Sequence[Tensor], path: str, options: Mapping[str, Any]) -> Runner:
    """The file, and as it was loaded again."""
    graph, lost = calibrated(static, options.get("calibration"))
    model = litert_model(graph, inputs, batch=options.get("batch"))
    write_atomic(path, four_bit_weights(model) if options.get("low_bits") else model)
    runner = run_litert(Path(path).read_bytes(), static)
    floating = runner.kernels.floating if runner.kernels is not None else ()
    return replace(runner, lost=(*lost, *causes(floating, graph)))


@backend("litert", profiles=False)
def litert_here(static: fx.GraphModule, inputs: Sequence[Tensor], threads: int) -> Runner:
    """LiteRT with XNNPACK."""
    return run_litert(litert_model(static, inputs), static, threads=threads)
