"""Core ML (.mlpackage), for telephones and computers of Apple's.

In: a static graph. Out: an ML program of int8 codes: weights linear, one scale a channel, activations quantised. Holds:
its program holds every quantised weight's own codes; nothing was run, as that needs a Mac. The converter asks for
signed codes, and for clips of values in place of clips of codes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.export.registry import Numerics, target
from sbs_fx.export.runtime import LAYERS, Kernels, Runner, failing_as, of_batch, require, sorted_codes, weight_name
from sbs_fx.export.signed import clip_values, shift_codes
from sbs_fx.passes.capture.export import quiet_torch
from sbs_fx.passes.dialects import DEQUANTIZE, static_of
from sbs_fx.passes.graph import attribute, copy_graph
from sbs_fx.passes.static.fold import Constants
from sbs_fx.plan.errors import BackendError

_DEQUANTIZERS = {DEQUANTIZE, torch.ops.quantized_decomposed.dequantize_per_channel.default}


def coreml_model(static: fx.GraphModule, example_inputs: Sequence[Tensor], *, batch: int = 1) -> tuple[Any, Kernels]:
    """The `coremltools.models.MLModel` of a static graph for so many images, and its layers by kernel: those whose
    weight is held as codes and whose input is.

    Raises:
        BackendError: coremltools is not installed, or fails on this graph.
    """
    (tools,) = require("coremltools")
    signed = copy_graph(static)
    clip_values(signed.graph, fused=True)
    shift_codes(signed.graph)
    _fold_tables(signed)
    signed.recompile()
    inputs = of_batch(example_inputs, batch)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with failing_as("coremltools fails on this graph"), quiet_torch(), torch.no_grad():
            program = torch.export.export(signed.eval(), inputs, strict=False).run_decompositions({})
            model = tools.convert(
                program, convert_to="mlprogram", minimum_deployment_target=tools.target.iOS17, skip_model_load=True
            )
    finally:
        logging.disable(level)
    codes = _quantised_weights(model)
    names = {node.name: weight_name(node) for node in static.graph.nodes if node.target in LAYERS}
    weights = {name: sorted_codes(attribute(static, weight)) for name, weight in names.items() if weight}
    stored = static_of(static).weights
    integer = tuple(n for n, weight in names.items() if weight in stored and weights[n] in codes)
    return model, Kernels(integer, tuple(n for n in names if n not in integer))


def _fold_tables(graph_module: fx.GraphModule) -> None:
    """What is computed of float parameters alone, such as a resized table of positions, becomes a table: the converter
    has not all of these operators."""
    constants, graph = Constants(graph_module), graph_module.graph
    tables: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        of_floats = all(n in tables or n.op == "get_attr" for n in sources)  # reason: weights stay codes
        if node.op == "call_function" and node in constants and of_floats and node.target not in _DEQUANTIZERS:
            tables.add(node)
    for node in [node for node in graph.nodes if node in tables and not all(user in tables for user in node.users)]:
        value = constants.value(node)
        if isinstance(value, Tensor):
            graph_module.register_buffer(f"{node.name}_table", value.clone())
            with graph.inserting_before(node):
                table = graph.get_attr(f"{node.name}_table")
            table.meta = dict(node.meta)
            node.replace_all_uses_with(table)
    graph.eliminate_dead_code()


def _quantised_weights(model: Any) -> set[bytes]:
    found = set()
    for function in model._mil_program.functions.values():
        for operator in function.operations:
            if operator.op_type == "constexpr_affine_dequantize":
                readers = {child.op_type for child in operator.outputs[0].child_ops}
                sources = [child.x.op for child in operator.outputs[0].child_ops if hasattr(child, "x")]
                if readers and all(source is not None and source.op_type == "dequantize" for source in sources):
                    found.add(sorted_codes(torch.from_numpy(operator.quantized_data.val.copy())))
    return found


@target(
    "coreml",
    suffix=".mlpackage",
    help="Core ML program, int8; runs on a Mac or a telephone of Apple's, not here",
    options=("batch",),
    numerics=Numerics(activation_bits=(8,)),
    runs=False,
)
def coreml(static: fx.GraphModule, inputs: Sequence[Tensor], path: str, options: Mapping[str, Any]) -> Runner:
    """The package; calling what comes back is an error, as nothing here can run it."""
    model, kernels = coreml_model(static, inputs, batch=options.get("batch") or 1)
    model.save(path)

    def run(*inputs: Tensor) -> Any:
        raise BackendError("a Core ML program was not run: that needs a Mac")

    return Runner("coreml", run, kernels)
