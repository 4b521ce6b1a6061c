"""Unsigned codes as signed ones, and clips of codes as clips of values: forms that some tools ask for.

In: a static graph of our own copying, which is changed in place. Holds: values stay as they were, bit for bit; what is
shifted is the code that stands for a value and, with it, the zero point.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from sbs_fx.passes.dialects import DEQUANTIZE, QUANTIZE, quantizers
from sbs_fx.passes.static.finalize import MIDDLE

aten = torch.ops.aten


def shift_codes(graph: fx.Graph) -> None:
    """Codes of 0 to 255 become those of -128 to 127; the graph must have no clips of codes (`clip_values`)."""
    for node in graph.nodes:
        if node.target in (QUANTIZE, DEQUANTIZE) and node.args[5] == torch.uint8:
            value, scale, zero, low, high, _ = node.args
            node.args = (value, scale, zero - MIDDLE, low - MIDDLE, high - MIDDLE, torch.int8)


def clip_values(graph: fx.Graph, *, fused: bool) -> None:
    """Clips of codes, which bitwidths below 8 have, as a hardtanh of values before they are quantised.

    Args:
        fused: straight behind the layer, where a tool fuses a hardtanh into it; False: between two quantisers, so that
            all that the layer gives is codes already.
    """
    for first, last in list(quantizers(graph)):
        if last.args[0] is not first:
            _clip(graph, first, last, fused)
    graph.eliminate_dead_code()


def _clip(graph: fx.Graph, first: fx.Node, last: fx.Node, fused: bool) -> None:
    value, scale, zero, low, high = cast("tuple[Any, ...]", first.args[:5])
    node: Any = last.args[0]
    while node is not first:
        if node.target is aten.clamp_max.default:
            high = min(high, node.args[1])
        else:
            low = max(low, node.args[1])
        node = node.args[0]
    bounds = (low - zero) * scale, (high - zero) * scale
    with graph.inserting_before(last):
        if len(first.users) > 1 or not fused:  # reason: with two readers, the layer before would not be an integer one
            value = graph.call_function(DEQUANTIZE, (first, *first.args[1:]))
        elif value.target is aten.relu.default and len(value.users) == 1:
            value, bounds = value.args[0], (max(0.0, bounds[0]), bounds[1])
        clipped = graph.call_function(aten.hardtanh.default, (value, *bounds))
        last.update_arg(0, graph.call_function(QUANTIZE, (clipped, *first.args[1:])))
