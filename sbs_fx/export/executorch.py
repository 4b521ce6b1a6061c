"""ExecuTorch, for telephones and small boards: a program (.pte) whose layers XNNPACK computes.

In: a static graph. Out: the program, and which layers have an int8 kernel. Holds: results as torch's, at any batch size
up to `BATCH` or that of the examples, if larger. XNNPACK asks for a form of its own:

    activations are signed codes, the same ones shifted by 128
    a bitwidth below 8 is a clip of the values before they are quantised, as quantising itself always has 256 levels
    every reader has a dequantiser of its own, and a mean keeps the dimensions it was taken over
    a layer whose result is not quantised, as the last one's, has no integer kernel, and its weights are stored in
    float: with images at hand to measure ranges on, its result is quantised (`integer_results`)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.export.onnx import LayerMatcher
from sbs_fx.export.program import exported_program
from sbs_fx.export.registry import backend, target
from sbs_fx.export.results import calibrated, causes, is_quantized
from sbs_fx.export.runtime import LAYERS, Kernels, Runner, failing_as, require, weight_name
from sbs_fx.export.signed import clip_values, shift_codes
from sbs_fx.passes.capture.export import quiet_torch
from sbs_fx.passes.dialects import DEQUANTIZE
from sbs_fx.passes.graph import attribute, copy_graph
from sbs_fx.plan import write_atomic
from sbs_fx.plan.errors import BackendError

aten = torch.ops.aten
BATCH = 8  # images at once, at most: the program's memory is planned for them
_WEIGHTS = torch.ops.quantized_decomposed.dequantize_per_channel.default


def executorch_program(static: fx.GraphModule, example_inputs: Sequence[Tensor]) -> tuple[bytes, Kernels]:
    """A static graph as a program, and its layers by kernel.

    Raises:
        BackendError: executorch is not installed, or the graph has an operator that it has not.
        GraphError: `torch.export` cannot capture the graph.
    """
    exir, xnnpack, _ = require(
        "executorch.exir",
        "executorch.backends.xnnpack.partition.xnnpack_partitioner",
        "executorch.kernels.quantized",  # reason: importing it registers quantising outside XNNPACK
    )
    largest = max(BATCH, len(example_inputs[0]))
    program = exported_program(_signed(static), example_inputs, largest=largest)
    with failing_as("ExecuTorch fails on this graph"), _silent(), torch.no_grad():
        lowered = exir.to_edge_transform_and_lower(
            program,
            partitioner=[xnnpack.XnnpackPartitioner()],
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
        )
        integer = set(_integer_weights(lowered.exported_program().graph_module))
        buffer = lowered.to_executorch().buffer
    reached = (node.name for node in static.graph.nodes if node.target in LAYERS and weight_name(node) in integer)
    return buffer, LayerMatcher(static).kernels(reached)


def run_executorch(program: bytes, kernels: Kernels, *, threads: int = 0) -> Runner:
    """A program in ExecuTorch's own runtime. `threads`: 0 leaves it to the runtime; they are the whole process's."""
    runtime, library = require("executorch.runtime", "executorch.extension.pybindings._C")
    if threads:
        library._unsafe_reset_threadpool(threads)
    loaded = runtime.Runtime.get().load_program(program)
    with failing_as("ExecuTorch's runtime cannot load this program"):
        held = program, loaded, loaded.load_method("forward")  # reason: the tool reads memory that it does not own

    def run(*inputs: Tensor) -> list[Tensor]:
        try:
            return [y.clone() for y in held[2].execute([x.contiguous() for x in inputs])]
        except RuntimeError as error:
            raise BackendError(
                f"ExecuTorch cannot run inputs of shapes {[tuple(x.shape) for x in inputs]}; the program was made for "
                f"at most {BATCH} images, or as many as the examples are: {error}"
            ) from error

    return Runner("executorch", run, kernels)


def _signed(static: fx.GraphModule) -> fx.GraphModule:
    """A static graph in the form that XNNPACK asks for."""
    result = copy_graph(static)
    graph = result.graph
    clip_values(graph, fused=True)
    shift_codes(graph)
    for node in list(graph.nodes):
        if node.target is aten.mean.dim and not (len(node.args) > 2 and node.args[2]):
            with graph.inserting_after(node):
                flat = graph.call_function(aten.squeeze.dims, node.args[:2])
            node.replace_all_uses_with(flat)
            flat.update_arg(0, node)
            node.args = (*node.args[:2], True)
    for node in graph.find_nodes(op="call_function", target=DEQUANTIZE):
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.call_function(DEQUANTIZE, node.args))
    for node in list(graph.nodes):
        if node.target in LAYERS and node.args[1].target is _WEIGHTS and not is_quantized(node):
            weight = node.args[1]
            values = [attribute(result, str(a.target)) if isinstance(a, fx.Node) else a for a in weight.args]
            result.register_buffer(f"{node.name}_weight", _WEIGHTS(*values))
            with graph.inserting_before(node):
                node.replace_input_with(weight, graph.get_attr(f"{node.name}_weight"))
    graph.eliminate_dead_code()
    graph.lint()
    result.recompile()
    return result.eval()


def _integer_weights(lowered: fx.GraphModule) -> Iterator[str]:
    """Weights whose codes are in XNNPACK's hands."""
    for node in lowered.graph.find_nodes(op="get_attr"):
        module = getattr(lowered, str(node.target))
        if not hasattr(module, "original_module"):
            continue
        part = module.original_module
        names = {**part.graph_signature.inputs_to_buffers, **part.graph_signature.inputs_to_parameters}
        for inner in part.graph.nodes:
            if "dequantize_per_channel" in str(inner.target) and inner.args[0].name in names:
                yield names[inner.args[0].name]


@contextmanager
def _silent() -> Iterator[None]:
    """Without the tool's remarks, which are many."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet_torch():
            yield
    finally:
        logging.disable(level)


@target(
    "executorch",
    suffix=".pte",
    help="ExecuTorch program, weights int8; runs in ExecuTorch with XNNPACK",
    options=("calibration",),
)
def executorch(static: fx.GraphModule, inputs: Sequence[Tensor], path: str, options: Mapping[str, Any]) -> Runner:
    """The program as a file, and as it was loaded again."""
    graph, lost = calibrated(static, options.get("calibration"))
    program, kernels = executorch_program(graph, inputs)
    write_atomic(path, program)
    runner = run_executorch(Path(path).read_bytes(), kernels)
    return replace(runner, lost=(*lost, *causes(kernels.floating, graph)))


@backend("executorch", profiles=False)
def executorch_here(static: fx.GraphModule, inputs: Sequence[Tensor], threads: int) -> Runner:
    """ExecuTorch with XNNPACK."""
    return run_executorch(*executorch_program(static, inputs), threads=threads)
