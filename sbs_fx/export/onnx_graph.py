"""`for_integer_products`: a static graph said in the way ONNX Runtime has integer kernels for.

In: a static graph. Out: a copy that computes the same, where

    a convolution that cuts images into patches is a linear of the patches: its result, which norms or streams read, is
    not quantised, and only a linear has an integer kernel with a float result
    attention is two products and a softmax, the scale in the queries' step: queries and keys have an integer product
    linears take matrices: the integer kernel of a Gemm adds the bias, that of a product of tensors does not

Holds: layers keep their names; what has a dynamic dimension besides the batch stays as it is.
"""

from __future__ import annotations

import torch
from torch import fx

from sbs_fx.passes.attention import ATTENTION, as_products, has_added_mask
from sbs_fx.passes.dialects import DEQUANTIZE, QUANTIZE
from sbs_fx.passes.graph import attribute, copy_graph

aten = torch.ops.aten
# What an integer convolution takes in: the quantisation of its result, or what cuts off before that.
_FUSED = {QUANTIZE, aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}


def for_integer_products(static: fx.GraphModule) -> fx.GraphModule:
    """See above."""
    result = copy_graph(static)
    graph = result.graph
    for node in graph.find_nodes(op="call_function", target=aten.conv2d.default):
        _patches_as_linear(result, node)
    attention_as_products(graph)
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        _flat(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    result.recompile()
    return result.eval()


def _patches_as_linear(module: fx.GraphModule, node: fx.Node) -> None:
    x, weight = node.args[:2]
    bias, stride, padding, _, groups = (*node.args[2:], *(None, 1, 0, 1, 1)[len(node.args) - 2 :])
    stored = weight.args[0] if weight.args else None
    if not isinstance(stored, fx.Node) or stored.op != "get_attr" or len(stored.users) > 1:
        return
    codes, (_, channels, *size) = attribute(module, str(stored.target)), x.meta["val"].shape
    kernel = list(codes.shape[2:])
    if (
        stride != kernel
        or kernel == [1, 1]
        or groups != 1
        or any(padding if isinstance(padding, list) else [padding])
        or any(not isinstance(n, int) or n % k for n, k in zip(size, kernel, strict=True))
        or any(user.target in _FUSED for user in node.users)
        or x.target is not DEQUANTIZE
    ):
        return
    owner, _, name = str(stored.target).rpartition(".")
    setattr(module.get_submodule(owner), name, codes.flatten(1))
    (high, wide), (kh, kw) = size, kernel
    whole = node.meta["val"]
    with module.graph.inserting_before(node):
        call = module.graph.call_function
        cut = call(aten.reshape.default, (x.args[0], [-1, channels, high // kh, kh, wide // kw, kw]))
        patches = call(aten.permute.default, (cut, [0, 2, 4, 1, 3, 5]))
        patches = call(aten.reshape.default, (patches, [-1, high // kh, wide // kw, channels * kh * kw]))
        patches = call(DEQUANTIZE, (patches, *x.args[1:]))
    patches.meta["val"] = whole.new_empty((*whole.shape[:1], *whole.shape[2:], channels * kh * kw))
    with module.graph.inserting_after(node):
        channels_first = module.graph.call_function(aten.permute.default, (node, [0, 3, 1, 2]))
    channels_first.meta["val"] = whole
    node.replace_all_uses_with(channels_first, delete_user_cb=lambda user: user is not channels_first)
    node.target, node.args = aten.linear.default, (patches, weight, bias)
    node.meta["val"] = whole.permute(0, 2, 3, 1)


def attention_as_products(graph: fx.Graph) -> None:
    """Each attention whose mask is added, or that has none, as two products and a softmax, in place."""
    for node in filter(has_added_mask, graph.find_nodes(op="call_function", target=ATTENTION)):
        query, factor = node.args[0], node.kwargs["scale"]
        if query.target is DEQUANTIZE:
            with graph.inserting_before(node):
                codes, step, *rest = query.args
                query, factor = graph.call_function(DEQUANTIZE, (codes, step * factor, *rest)), 1.0
        as_products(node, query, factor)


def _flat(graph: fx.Graph, node: fx.Node) -> None:
    source, shape = node.args[0], node.meta["val"].shape
    if len(shape) < 3 or sum(not isinstance(size, int) for size in shape) > 1:
        return
    coded = source.target is DEQUANTIZE  # reason: biases are integers only where the layer reads what was codes before
    with graph.inserting_before(node):
        whole = source.args[0] if coded else source
        rows = graph.call_function(aten.reshape.default, (whole, [-1, source.meta["val"].shape[-1]]))
        rows = graph.call_function(DEQUANTIZE, (rows, *source.args[1:])) if coded else rows
    node.args = (rows, *node.args[1:])
    with graph.inserting_after(node):
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        whole = graph.call_function(aten.reshape.default, (node, sizes))
    whole.meta["val"], node.meta["val"] = node.meta["val"], node.meta["val"].flatten(0, -2)
    node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
