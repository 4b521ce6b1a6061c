"""`explicit_attention`: attention as two products and a softmax, so that its probabilities are a tensor like others.

In: a traced graph. Out: a copy in which each scaled dot product attention is the queries times their scale, their
product with the keys, a softmax and its product with the values; or the graph itself where there is none to take apart.
What reads the probabilities is then a product of two tensors: it gets a gate, has a price at its bits and integer codes
in a static graph. Holds: outputs equal to rounding; names of all other nodes stay. Left whole: a mask that is not added
(booleans, causal), dropout, keys shared by queries' heads, and more than `MOST` probabilities an example, which one
operator never holds at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.passes.graph import with_tensors

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
MOST = 1 << 24


def explicit_attention(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Attention taken apart.

    Args:
        graph_module: traced; it stays as it is.

    Returns:
        Another graph of the same tensors, which gives the same to rounding, or the graph itself where there is no
        attention to take apart.

    >>> from torch.nn.functional import scaled_dot_product_attention
    >>> from sbs_fx.passes import explicit_attention, trace
    >>> class Attention(torch.nn.Module):
    ...     def forward(self, x):
    ...         return scaled_dot_product_attention(x, x, x)
    >>> graph = explicit_attention(trace(Attention(), torch.randn(2, 3, 4)))
    >>> len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int))
    1
    """
    if not any(map(_is_explicable, graph_module.graph.find_nodes(op="call_function", target=ATTENTION))):
        return graph_module
    result = with_tensors(graph_module, {})
    for node in result.graph.find_nodes(op="call_function", target=ATTENTION):
        if _is_explicable(node):
            as_products(node, node.args[0], node.kwargs["scale"])
    result.graph.lint()
    result.recompile()
    return result


def has_added_mask(node: fx.Node) -> bool:
    """Whether all that an attention does beside products and softmax is to add a mask, or not even that."""
    names = ("attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args[3:], strict=False)), **node.kwargs}
    mask = given.pop("attn_mask", None)
    given.pop("scale", None)
    added = mask is None or (isinstance(mask, fx.Node) and mask.meta["val"].dtype.is_floating_point)
    return added and not any(given.values())


def as_products(node: fx.Node, query: fx.Node, scale: float) -> None:
    """Put two products and a softmax in place of an attention. Its queries are `query` times `scale`."""
    key, value = node.args[1:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    with node.graph.inserting_before(node):
        if scale != 1.0:
            query = _call(node, "queries", aten.mul.Tensor, query, scale)
        keys = _call(node, "keys", aten.transpose.int, key, -1, -2)
        scores = _call(node, "scores", aten.matmul.default, query, keys)
        if mask is not None:
            scores = _call(node, "masked", aten.add.Tensor, scores, mask)
        probabilities = _call(node, "probabilities", aten.softmax.int, scores, -1)
        product = _call(node, "product", aten.matmul.default, probabilities, value)
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _is_explicable(node: fx.Node) -> bool:
    query, key = (node.args[i].meta["val"] for i in (0, 1))
    sizes = [*query.shape[1:-1], key.shape[-2]]  # reason: the first dimension is the batch
    known = all(isinstance(size, int) for size in sizes)
    return has_added_mask(node) and known and torch.Size(sizes).numel() <= MOST


def _call(node: fx.Node, name: str, target: Any, *args: Any) -> fx.Node:
    """A node of what the attention does, where it came from and with the value that it will have."""
    result = node.graph.create_node("call_function", target, args, name=f"{node.name}_{name}")
    result.meta = {key: kept for key, kept in node.meta.items() if key in ("stack_trace", "nn_module_stack")}
    values = fx.node.map_arg(args, lambda each: each.meta.get("val"))
    if all(isinstance(v, Tensor) for v, each in zip(values, args, strict=True) if isinstance(each, fx.Node)):
        result.meta["val"] = target(*values)
    return result
