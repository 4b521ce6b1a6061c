"""Operators that put tensors together or take parts of them: concatenation, slices, lookups, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Const, Dim
from sbs_fx.passes.channels.facts import MOVES, Facts, keeps, state
from sbs_fx.passes.channels.inference import Dims, Inference, rule

aten = torch.ops.aten


def _others_agree(t: Inference, node: fx.Node, tensors: list[Dims], axis: int | None) -> Dims:
    for other in tensors[1:]:
        for i, (a, b) in enumerate(zip(tensors[0], other, strict=True)):
            if i != axis:
                t.unify(node, a, b)
    return tensors[0]


@rule(aten.cat, aten.concat, facts=Facts(keeps(0), moves=True, codes="join"))
def _cat(t: Inference, node: fx.Node) -> Dims:
    tensors = [t[a] for a in node.args[0] if t[a] and not (len(t[a]) == 1 and t[a][0].size == 0)]
    axis = node.args[1] % len(tensors[0])
    first = _others_agree(t, node, tensors, axis)
    return (*first[:axis], d.concatenate([d.resolve(x[axis]) for x in tensors]), *first[axis + 1 :])


@rule(aten.stack, facts=MOVES)
def _stack(t: Inference, node: fx.Node) -> Dims:
    tensors = [t[a] for a in node.args[0]]
    first = _others_agree(t, node, tensors, None)
    axis = node.args[1] % (len(first) + 1)
    return (*first[:axis], Const(len(tensors)), *first[axis:])


@rule(aten.split_with_sizes, facts=MOVES)
def _split_with_sizes(t: Inference, node: fx.Node) -> tuple[Dims, ...]:
    x, sizes = t[node.args[0]], node.args[1]
    axis, rest = node.args[2] % len(x), x[node.args[2]]
    parts: list[Dims] = []
    for i, size in enumerate(sizes):
        part, rest = t.split(node, rest, t.size(size))
        t.edit(node, 1, i, to=part)
        parts.append((*x[:axis], part, *x[axis + 1 :]))
    return tuple(parts)


@rule(aten.slice.Tensor, facts=MOVES)
def _slice(t: Inference, node: fx.Node) -> Dims:
    x, size = t[node.args[0]], t.shape(node)
    axis, step = node.args[1] % len(x), node.args[4]
    whole = d.resolve(x[axis])
    if size[axis] == whole.size or isinstance(whole, Const):
        return (*x[:axis], whole if size[axis] == whole.size else Const(size[axis], whole.why), *x[axis + 1 :])
    start = 0 if node.args[2] is None else t.size(node.args[2])
    start = start + whole.size if start < 0 else start
    if step == 1:
        before, rest = t.split(node, whole, start)
        middle, _ = t.split(node, rest, size[axis])
        if node.args[2] is not None:
            t.edit(node, 2, to=before)
        t.edit(node, 3, to=d.concatenate([before, middle]))
        return (*x[:axis], middle, *x[axis + 1 :])
    if start < step and whole.size % step == 0:
        # reason: every step-th coordinate of major x step is one position of the minor factor, which must stay
        major, minor = t.factor(node, whole, step)
        t.pin(node, "picks one position in each step", minor)
        if isinstance(node.args[3], int) and node.args[3] >= 0:
            t.edit(node, 3, to=whole)
        return (*x[:axis], major, *x[axis + 1 :])
    t.pin(node, "strided slice", whole)
    return (*x[:axis], Const(size[axis]), *x[axis + 1 :])


@rule(aten.slice_scatter, aten.select_scatter, facts=Facts(keeps(0, 1), moves=True))
def _scatter(t: Inference, node: fx.Node) -> Dims:
    """A functionalised write into a part: the part agrees with the source, the other dimensions agree."""
    x, source = t[node.args[0]], t[node.args[1]]
    if "select" in str(node.target):
        axis = node.args[2] % len(x)
        t.pin(node, "writes at a fixed index", x[axis])
        for a, b in zip((*x[:axis], *x[axis + 1 :]), source, strict=True):
            t.unify(node, a, b)
        return x
    axis = node.args[2] % len(x)
    for i, (a, b) in enumerate(zip(x, source, strict=True)):
        if i != axis:
            t.unify(node, a, b)
    whole, part = d.resolve(x[axis]), d.resolve(source[axis])
    start = 0 if node.args[3] is None else t.size(node.args[3])
    start = start + whole.size if start < 0 else start
    if node.args[5] != 1 or whole.size == part.size:
        if node.args[5] != 1:
            t.pin(node, "strided write", whole, part)
        else:
            t.unify(node, whole, part)
        return x
    before, rest = t.split(node, whole, start)
    middle, _ = t.split(node, rest, part.size)
    t.unify(node, middle, part)
    if node.args[3] is not None:
        t.edit(node, 3, to=before)
    t.edit(node, 4, to=d.concatenate([before, middle]))
    return x


@rule(aten.select.int, facts=MOVES)
def _select(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    axis = node.args[1] % len(x)
    t.pin(node, "selects a fixed index", x[axis])
    return (*x[:axis], *x[axis + 1 :])


@rule(aten.unbind.int, facts=MOVES)
def _unbind(t: Inference, node: fx.Node) -> tuple[Dims, ...]:
    x = t[node.args[0]]
    axis = node.args[1] % len(x)
    t.pin(node, "unbinds a fixed number of slices", x[axis])
    return ((*x[:axis], *x[axis + 1 :]),) * x[axis].size


@rule(aten.index.Tensor, aten._unsafe_index.Tensor, facts=MOVES)
def _index(t: Inference, node: fx.Node) -> Dims:
    """`table[index]`: indexed dimensions are pinned, the others pass. A mask indexes as many dimensions as it has."""
    x, indexed = t[node.args[0]], list[int]()
    place = 0
    for index in node.args[1]:
        if index is None:
            place += 1
            continue
        value = index.meta["val"]
        taken = range(place, place + (value.ndim if value.dtype == torch.bool else 1))
        t.pin(node, "indexed by a tensor", *(x[i] for i in taken), *t[index])
        indexed += taken
        place = taken.stop
    rest = [dim for i, dim in enumerate(x) if i not in indexed]
    contiguous = indexed == list(range(indexed[0], indexed[-1] + 1))
    shape = t.shape(node)
    place = indexed[0] if contiguous else 0
    new: list[Dim] = [Const(s) for s in shape[place : place + len(shape) - len(rest)]]
    return (*rest[:place], *new, *rest[place:])


@rule(aten.index_select, facts=MOVES)
def _index_select(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    axis = node.args[1] % len(x)
    t.pin(node, "indexed by a tensor", x[axis])
    index = t[node.args[2]]  # reason: dropping entries of the index drops just those coordinates of the result
    return (*x[:axis], index[0] if index else d.ONE, *x[axis + 1 :])


@rule(aten.embedding, facts=MOVES)
def _embedding(t: Inference, node: fx.Node) -> Dims:
    table = t[node.args[0]]
    t.pin(node, "indexed by a tensor", table[0])
    return (*t[node.args[1]], table[1])


state(Facts(keeps(0, 2)), aten.constant_pad_nd)  # the number that it pads with
state(Facts(keeps(0, 3)), aten.pad)


@rule(aten.constant_pad_nd, aten.pad)
def _pad(t: Inference, node: fx.Node) -> Dims:
    """Padding creates coordinates without parameters: fresh axes on both sides."""
    x, padding = list(t[node.args[0]]), node.args[1]
    constant = "constant_pad" in str(node.target) or node.args[2] == "constant"
    for i in range(len(padding) // 2):
        before, after, axis = padding[2 * i], padding[2 * i + 1], len(x) - 1 - i
        if not isinstance(x[axis], Const) and isinstance(before, int) and isinstance(after, int):
            if before == after == 0:
                continue
            if not constant or before < 0 or after < 0 or not d.axes(x[axis]):
                t.pin(node, "padded by reflection or cropped", x[axis])
            else:
                left, right = d.fresh(before) if before else Const(0), d.fresh(after) if after else Const(0)
                t.edit(node, 1, 2 * i, to=left)
                t.edit(node, 1, 2 * i + 1, to=right)
                x[axis] = d.concatenate([left, d.resolve(x[axis]), right])
                continue
        x[axis] = Const(t.shape(node)[axis])
    return tuple(x)


@rule(aten.glu, facts=Facts(keeps(0)))
def _glu(t: Inference, node: fx.Node) -> Dims:
    x, axis = t[node.args[0]], node.args[1] % len(t[node.args[0]])
    first, second = t.split(node, x[axis], d.resolve(x[axis]).size // 2)
    t.unify(node, first, second)
    return (*x[:axis], d.resolve(first), *x[axis + 1 :])


@rule(aten.meshgrid, facts=MOVES)
def _meshgrid(t: Inference, node: fx.Node) -> Any:
    for a in node.args[0]:
        t.pin(node, "positions matter", *t[a])
    return tuple(tuple(Const(t.size(s)) for s in v.shape) for v in node.meta["val"])
