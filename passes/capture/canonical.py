"""One spelling per operator, so that rules and rewrites meet a single form.

Holds: values are unchanged. Positional arguments are complete (defaults filled in), `chunk` and `split` name their
sizes (parts are unequal once channels go), a view that may need a copy is a `reshape`, attention has an explicit scale.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_RENAMED = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}
_BOOKKEEPING = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_IDENTITIES = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}


def canonicalise(graph_module: fx.GraphModule) -> None:
    """Bring every operator of a functional graph into its canonical form, in place."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node._erased:
            continue
        if node.target == "_guards_fn" or node.target in _BOOKKEEPING:
            graph.erase_node(node)
        elif node.op == "call_function" and node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _plain_reshape(node)
            node.target = _RENAMED.get(node.target, node.target)
            _fill_defaults(node)
            _plain_product(node)
            _plain_batch_norm(node)
            _plain_max_pool(node)
            _count_from_the_start(node)
            _states_as_given(node)
            _name_sizes(node)
            _explicit_scale(node)


def _plain_reshape(node: fx.Node) -> None:
    """A reshape that copied at the traced batch size is a reshape again: at batch 1 the module may not copy either,
    and another memory layout means another rounding."""
    copied = node.args[0] if node.target is aten._unsafe_view.default else None
    if not isinstance(copied, fx.Node) or copied.target is not aten.clone.default or len(copied.users) > 1:
        return
    if copied.kwargs.get("memory_format") is torch.contiguous_format:
        node.update_arg(0, copied.args[0])
        node.graph.erase_node(copied)


def _fill_defaults(node: fx.Node) -> None:
    """Positional arguments complete, keyword-only arguments as given."""
    args: list[Any] = list(node.args)
    kwargs = dict(node.kwargs)
    for argument in node.target._schema.arguments[len(args) :]:
        if argument.kwarg_only:
            continue
        args.append(kwargs.pop(argument.name, argument.default_value))
    kwargs.pop("output_size", None)  # reason: a hint of repeat_interleave that would have to follow the channels
    node.args, node.kwargs = tuple(args), kwargs


def _plain_product(node: fx.Node) -> None:
    """A linear whose weight is a vector is the product that torch makes of it."""
    if node.target is aten.linear.default and node.args[1].meta["val"].ndim == 1 and node.args[2] is None:  # type: ignore[union-attr]
        node.target, node.args = aten.matmul.default, node.args[:2]


def _plain_batch_norm(node: fx.Node) -> None:
    """The functional forms that return (output, mean, rstd) become `batch_norm`, whose mode is one argument."""
    if node.target is aten._native_batch_norm_legit_no_training.default:
        x, weight, bias, mean, var, momentum, eps = node.args
        training = False
    elif node.target is aten._native_batch_norm_legit.no_stats:
        x, weight, bias, training, momentum, eps = node.args
        mean = var = None
    else:
        return
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users if user.users):
        return
    node.target = aten.batch_norm.default
    node.args = (x, weight, bias, mean, var, training, momentum, eps, True)
    node.meta["val"] = node.meta["val"][0]
    for user in list(node.users):
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)


def _plain_max_pool(node: fx.Node) -> None:
    """A max pool whose indices nobody reads is one without, for which there are integer kernels."""
    if node.target is not aten.max_pool2d_with_indices.default:
        return
    users = list(node.users)
    if all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in users):
        node.target, node.meta["val"] = aten.max_pool2d.default, node.meta["val"][0]
        for user in users:
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)


def _count_from_the_start(node: fx.Node) -> None:
    """Negative bounds of a slice would mean other places once channels go."""
    if node.target not in (aten.slice.Tensor, aten.slice_scatter.default):
        return
    axis = 1 if node.target is aten.slice.Tensor else 2
    size = node.args[0].meta["val"].shape[node.args[axis]]  # type: ignore[union-attr, index]
    if isinstance(size, int):
        for position in (axis + 1, axis + 2):
            bound = node.args[position]
            if isinstance(bound, int) and bound < 0:
                node.update_arg(position, max(bound + size, 0))


def _states_as_given(node: fx.Node) -> None:
    """The last states of a recurrent layer have the shapes of the first ones (reason: torch 2.11 notes another)."""
    if node.target not in _RECURRENT:
        return
    given: Any = node.args[1]
    states = [state.meta["val"] for state in (given if isinstance(given, (list, tuple)) else [given])]
    node.meta["val"] = (node.meta["val"][0], *states)
    for user in node.users:
        if user.target is operator.getitem:
            user.meta["val"] = node.meta["val"][user.args[1]]  # type: ignore[index]


_RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
_SPLITS = {
    aten.chunk.default,
    aten.unsafe_chunk.default,
    aten.split.Tensor,
    aten.unsafe_split.Tensor,
    aten.split.sizes,
    aten.split_copy.Tensor,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}

# Operators that `canonicalise` puts others for, so that they need no rule.
REWRITTEN = {*_RENAMED, *_BOOKKEEPING, *_IDENTITIES, *_SPLITS, aten.narrow.default}


def _name_sizes(node: fx.Node) -> None:
    """`chunk(x, n)`, `split(x, size)` and their like become `split_with_sizes(x, [..])`, `narrow` a slice."""
    if node.target is aten.narrow.default and all(isinstance(a, int) for a in node.args[1:]):
        x, axis, start, length = node.args
        size = x.meta["val"].shape[axis]  # type: ignore[union-attr]
        if isinstance(size, int):
            start = start % size  # type: ignore[operator]
            node.target, node.args = aten.slice.Tensor, (x, axis, start, start + length, 1)  # type: ignore[operator]
        return
    if node.target not in _SPLITS:
        return
    axis = node.args[2]
    sizes = [part.shape[axis] for part in node.meta["val"]]
    if all(isinstance(size, int) for size in sizes):
        node.target = aten.split_with_sizes.default
        node.args = (node.args[0], sizes, axis)


def _explicit_scale(node: fx.Node) -> None:
    if node.target is not aten.scaled_dot_product_attention.default or node.kwargs.get("scale") is not None:
        return
    width = node.args[0].meta["val"].shape[-1]
    node.kwargs = {**node.kwargs, "scale": 1.0 / math.sqrt(int(width))}
