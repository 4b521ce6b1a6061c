"""Operators that rename, regroup, reorder or repeat dimensions; the values stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import ONE, Const, Dim
from sbs_fx.passes.channels.facts import MOVES
from sbs_fx.passes.channels.inference import Dims, Inference, rule
from sbs_fx.passes.channels.rules.pointwise import broadcast

aten = torch.ops.aten


def regroup(t: Inference, node: fx.Node, dims: Sequence[Dim], shape: Sequence[int]) -> Dims:
    """Types after a row-major reshape: cut the product of the inputs, from the minor end, into the wanted sizes.

    Done segment by segment between boundaries that both shapes share, so that a reshape of the spatial part that
    cannot be followed leaves the channels alone.
    """
    result: list[Dim] = []
    inputs, sizes = list(dims), list(shape)
    while sizes:
        taken, cut = [], [sizes.pop()]
        have, want = 1, cut[0]
        while have != want and (inputs if have < want else sizes):
            if have < want:
                taken.append(d.resolve(inputs.pop()))
                have *= taken[-1].size
            else:
                cut.append(sizes.pop())
                want *= cut[-1]
        rest = d.product(taken[::-1])
        for size in cut:
            rest, minor = t.factor(node, rest, size)
            result.append(minor)
    return tuple(reversed(result))


@rule(aten.view.default, aten.reshape, aten._unsafe_view, aten._reshape_alias, aten.view_copy.default, facts=MOVES)
def _view(t: Inference, node: fx.Node) -> Dims:
    result = regroup(t, node, t[node.args[0]], t.shape(node))
    for i, dim in enumerate(result):
        t.edit(node, 1, i, to=dim)
    return result


@rule(aten.flatten.using_ints, aten.squeeze, aten.unsqueeze, facts=MOVES)
def _implicit(t: Inference, node: fx.Node) -> Dims:
    """Reshapes without sizes among their arguments."""
    return regroup(t, node, t[node.args[0]], t.shape(node))


@rule(aten.unflatten.int, facts=MOVES)
def _unflatten(t: Inference, node: fx.Node) -> Dims:
    x, axis = t[node.args[0]], node.args[1] % len(t[node.args[0]])
    parts = regroup(t, node, [x[axis]], t.shape(node)[axis : axis + len(node.args[2])])
    for i, dim in enumerate(parts):
        t.edit(node, 2, i, to=dim)
    return (*x[:axis], *parts, *x[axis + 1 :])


@rule(aten.permute, facts=MOVES)
def _permute(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    return tuple(x[i] for i in node.args[1])


@rule(aten.transpose.int, aten.swapaxes, aten.swapdims, facts=MOVES)
def _transpose(t: Inference, node: fx.Node) -> Dims:
    x = list(t[node.args[0]])
    a, b = node.args[1], node.args[2]
    x[a], x[b] = x[b], x[a]
    return tuple(x)


@rule(aten.t, aten.numpy_T, aten.mT, aten.adjoint, facts=MOVES)
def _matrix_transpose(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    return (*x[:-2], *x[-2:][::-1])


@rule(aten.movedim, facts=MOVES)
def _movedim(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    source, target = ([p % len(x) for p in (a if isinstance(a, (list, tuple)) else [a])] for a in node.args[1:3])
    order = [i for i in range(len(x)) if i not in source]
    for place, origin in sorted(zip(target, source, strict=True)):
        order.insert(place, origin)
    return tuple(x[i] for i in order)


@rule(aten.expand, aten.broadcast_to, facts=MOVES)
def _expand(t: Inference, node: fx.Node) -> Dims:
    """Size-1 dimensions become fresh axes: the copies carry no parameters of their own."""
    x, sizes = t[node.args[0]], node.args[1]
    padded = (ONE,) * (len(sizes) - len(x)) + x
    result: list[Dim] = []
    for i, (dim, size) in enumerate(zip(padded, sizes, strict=True)):
        if dim.size == 1 and isinstance(size, int) and size > 1:
            dim = d.fresh(size)
        elif dim.size == 1 and not isinstance(size, int):
            dim = Const(t.size(size))
        if size != -1:
            t.edit(node, 1, i, to=dim)
        result.append(dim)
    return tuple(result)


@rule(aten.expand_as, aten.view_as, aten.reshape_as, facts=MOVES)
def _expand_as(t: Inference, node: fx.Node) -> Dims:
    x, other = t[node.args[0]], t[node.args[1]]
    return broadcast(t, node, x, other) if "expand" in str(node.target) else other


@rule(aten.repeat, aten.tile, facts=MOVES)
def _repeat(t: Inference, node: fx.Node) -> Dims:
    x, counts = t[node.args[0]], list(node.args[1])
    counts = [1] * (len(x) - len(counts)) + counts
    result: list[Dim] = []
    for i, (dim, count) in enumerate(zip((ONE,) * (len(counts) - len(x)) + x, counts, strict=True)):
        copies = d.fresh(count) if isinstance(count, int) else Const(t.size(count))
        if dim.size == 1 and len(counts) == len(node.args[1]):
            t.edit(node, 1, i, to=copies)
            result.append(copies)
        else:
            result.append(d.product([Const(t.size(count)), dim]))
    return tuple(result)


@rule(aten.repeat_interleave.self_int, facts=MOVES)
def _repeat_interleave(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    axis = node.args[2]
    if axis is None:
        t.pin(node, "flattens before repeating", *x)
        return t.constant(node)
    axis %= len(x)
    repeated = d.product([x[axis], Const(t.size(node.args[1]))])
    return (*x[:axis], repeated, *x[axis + 1 :])


@rule(aten.pixel_shuffle, facts=MOVES)
def _pixel_shuffle(t: Inference, node: fx.Node) -> Dims:
    x, shape = t[node.args[0]], t.shape(node)
    channels, positions = t.factor(node, x[-3], node.args[1] ** 2)
    t.pin(node, "positions inside a pixel", positions)
    return (*x[:-3], channels, Const(shape[-2]), Const(shape[-1]))


@rule(aten.pixel_unshuffle, facts=MOVES)
def _pixel_unshuffle(t: Inference, node: fx.Node) -> Dims:
    x, shape = t[node.args[0]], t.shape(node)
    return (*x[:-3], d.product([x[-3], Const(node.args[1] ** 2)]), Const(shape[-2]), Const(shape[-1]))


@rule(aten.channel_shuffle, facts=MOVES)
def _channel_shuffle(t: Inference, node: fx.Node) -> Dims:
    """G x K becomes K x G; the number of groups follows G."""
    x = t[node.args[0]]
    groups, width = t.factor(node, x[1], d.resolve(x[1]).size // node.args[1])
    t.edit(node, 1, to=groups)
    return (x[0], d.product([width, groups]), *x[2:])
