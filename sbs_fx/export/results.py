"""`integer_results`: layers whose result stays in float, made to give codes, for tools whose kernels give nothing else.

In: a static graph and images. Out: a copy in which the result of each layer of two quantised operands is quantised, at
once or behind the relu that is fused into it, and which results those are. Holds: each has 8 bits over the range of
values that it takes on these images, with zero in it; all other nodes stay as they were. It rounds where the static
graph does not, so what it changed is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.export.runtime import LAYERS, weight_name
from sbs_fx.passes.dialects import DEQUANTIZE, QUANTIZE, static_of
from sbs_fx.passes.graph import copy_graph
from sbs_fx.passes.static.finalize import MAX_CODE

aten = torch.ops.aten
FUSED = {aten.relu.default, aten.relu6.default, aten.hardtanh.default}


def integer_results(static: fx.GraphModule, images: Sequence[Tensor]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph, and the layers whose result it quantises.

    Args:
        images: inputs of the graph, as many as there is memory for: what they do not reach is cut off.

    >>> graph, names = integer_results(result.model, (images,))
    >>> list(names)
    ['linear']
    """
    result = copy_graph(static)
    results = {
        layer: end(layer) for layer in result.graph.nodes if is_integer(layer, static) and not is_quantized(layer)
    }
    ranges = _Ranges(result, set(results.values()))
    with torch.no_grad():
        ranges.run(*images)
    for node in dict.fromkeys(results.values()):
        low, high = ranges.found[node]
        scale = max(high - low, 1e-12) / MAX_CODE
        zero = min(MAX_CODE, max(0, round(-low / scale)))
        readers = list(node.users)
        with result.graph.inserting_after(node):
            codes = result.graph.call_function(QUANTIZE, (node, scale, zero, 0, MAX_CODE, torch.uint8))
        with result.graph.inserting_after(codes):
            values = result.graph.call_function(DEQUANTIZE, (codes, *codes.args[1:]))
        codes.meta["val"], values.meta["val"] = node.meta["val"].to(torch.uint8), node.meta["val"]
        for reader in readers:
            reader.replace_input_with(node, values)
    result.graph.lint()
    result.recompile()
    return result.eval(), tuple(layer.name for layer in results)


def calibrated(
    static: fx.GraphModule, images: Tensor | Sequence[Tensor] | None
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """`integer_results` where there are images, and a line for each layer that was changed."""
    if images is None:
        return static, ()
    graph, names = integer_results(static, (images,) if isinstance(images, Tensor) else images)
    return graph, tuple(f"{name}: its result has 8 bits" for name in names)


def causes(floating: Sequence[str], static: fx.GraphModule) -> tuple[str, ...]:
    """For each of these layers, why a tool that wants codes all around leaves it in float."""
    layers = {node.name: node for node in static.graph.nodes}
    return tuple(f"{name}: in float, as {_cause(layers[name], static)}" for name in floating)


def _cause(layer: fx.Node, static: fx.GraphModule) -> str:
    if not is_integer(layer, static):
        return "its weight or its input is"
    if not is_quantized(layer):
        return "its result is not quantised, which calibration=IMAGES or --data does"
    return "the tool has no integer kernel for it"


def is_integer(node: fx.Node, static: fx.GraphModule) -> bool:
    """Whether a node is a layer of two quantised operands."""
    return node.target in LAYERS and weight_name(node) in static_of(static).weights and _coded(node.args[0])


def _coded(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE


def end(layer: fx.Node) -> fx.Node:
    """The layer, or the one activation function that is fused into it."""
    users = list(layer.users)
    return users[0] if len(users) == 1 and users[0].target in FUSED else layer


def is_quantized(layer: fx.Node) -> bool:
    """Whether the result of a layer is read by one quantiser alone, as an integer kernel gives it."""
    return [user.target for user in end(layer).users] == [QUANTIZE]


class _Ranges(fx.Interpreter):
    """Least and greatest value of some nodes, and zero."""

    def __init__(self, graph_module: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self.nodes = nodes
        self.found: dict[fx.Node, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.found[n] = min(0.0, float(value.min())), max(0.0, float(value.max()))
        return value
