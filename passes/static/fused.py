"""`fused`: the numbers of a static graph from fewer operators, for looking at many pictures in torch.

In: a static graph. Out: a traced one that keeps the names of all float tensors of it: weights are dequantised once, and
a quantisation, its clips and the dequantisation behind them are one function. Holds: equal values, since whole numbers
are exact in floats: x * (1 / scale) is rounded, clipped and multiplied by the scale either way; codes that something
else reads stay codes. Costs: weights as floats.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from sbs_fx.passes.dialects import DEQUANTIZE, QUANTIZE, Traced, set_dialect
from sbs_fx.passes.graph import attribute, copy_graph

aten = torch.ops.aten

_CLIPS = {aten.clamp_max.default: min, aten.clamp_min.default: max}


def rounded(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    """x on the grid of levels low to high times `scale`; a new tensor. Zero may be negative.

    >>> rounded(torch.tensor([0.3, 9.0]), 0.5, -2, 2)
    tensor([0.5000, 1.0000])
    """
    # reason: a new tensor from `round`, as in quantisation, or the strides of one example differ, and sums behind them
    return (x * (1 / scale)).round().clamp_(low, high).mul_(scale)


@torch.no_grad()
def fused(static: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes the same, faster.

    Args:
        static: from `finalize` or what follows it; it stays as it is.

    >>> torch.equal(fused(result.model)(images), result.model(images))
    True
    """
    result = copy_graph(static)
    for node in result.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        _fuse(node)
    result.graph.eliminate_dead_code()
    _fold_constants(result)
    set_dialect(result, Traced())
    result.graph.lint()
    result.recompile()
    return result.eval()


def _fuse(node: fx.Node) -> None:
    codes, clips = node.args[0], list[fx.Node]()
    while isinstance(codes, fx.Node) and codes.target in _CLIPS:
        clips.append(codes)
        codes = codes.args[0]
    if not isinstance(codes, fx.Node) or codes.target != QUANTIZE or codes.args[1:] != node.args[1:]:
        return
    source, scale, zero, low, high, _ = cast(tuple[Any, ...], codes.args)
    for clip in reversed(clips):
        nearest = _CLIPS[clip.target]
        low, high = nearest(low, clip.args[1]), nearest(high, clip.args[1])
    with node.graph.inserting_before(node):
        value = node.graph.call_function(rounded, (source, scale, low - zero, high - zero))
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
    value.name = node.name


def _fold_constants(result: fx.GraphModule) -> None:
    """What is computed from tensors of the graph alone is computed now."""
    values: dict[fx.Node, Tensor] = {}
    for node in list(result.graph.nodes):
        if node.op == "get_attr":
            values[node] = attribute(result, str(node.target))
        elif node.op == "call_function" and node.all_input_nodes and all(n in values for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            value = node.target(*args, **kwargs)
            if not isinstance(value, Tensor):
                continue
            values[node] = value
    for node, value in values.items():
        if node.op == "call_function" and any(user not in values for user in node.users):
            result.register_buffer(f"folded_{node.name}", value, persistent=False)
            with result.graph.inserting_before(node):
                read = result.graph.get_attr(f"folded_{node.name}")
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)
    result.graph.eliminate_dead_code()
    result.delete_all_unused_submodules()
