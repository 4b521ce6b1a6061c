"""Operators for which places along a dimension matter: reversals, running totals, reads and writes by index.

Along other dimensions channels pass; along their own they stay, or go with the places that a tensor names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Const
from sbs_fx.passes.channels.facts import MOVES, Facts, keeps, state
from sbs_fx.passes.channels.inference import Dims, Inference, rule

aten = torch.ops.aten

# -- along a dimension -------------------------------------------------------------------------------------------------


@rule(aten.flip, facts=MOVES)
def _flip(t: Inference, node: fx.Node) -> Dims:
    return _neighbours(t, node, node.args[1])


@rule(aten.roll, facts=MOVES)
def _roll(t: Inference, node: fx.Node) -> Dims:
    return _neighbours(t, node, node.args[2])


@rule(aten.cumsum, aten.cumprod, facts=Facts(keeps(0)))
def _cumulative(t: Inference, node: fx.Node) -> Dims:
    return _neighbours(t, node, [node.args[1]])


def _neighbours(t: Inference, node: fx.Node, positions: Any) -> Dims:
    """Reorders or accumulates along a dimension: over channels it runs at full width, in an adapter."""
    x = t[node.args[0]]
    live = [p % len(x) for p in positions if d.axes(x[p])]
    if len(live) == 1:
        t.adapter(node, live[0])
        t.statistic(node, live, neutral=0.0)
    else:
        t.pin(node, "reorders several channel dimensions", *(x[p] for p in live))
    return x


@rule(aten.logcumsumexp, facts=Facts())
def _log_cumulative(t: Inference, node: fx.Node) -> Dims:
    # reason: an adapter would fill in zeros, which are not neutral
    t.pin(node, "accumulates exponentials", t[node.args[0]][node.args[1]])
    return t[node.args[0]]


@rule(aten.cummax, aten.cummin, facts=Facts(keeps(0)))
def _running_extreme(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    t.pin(node, "returns an index", t[node.args[0]][node.args[1]])
    return t[node.args[0]], t[node.args[0]]


@rule(aten.rot90, facts=MOVES)
def _rotate(t: Inference, node: fx.Node) -> Dims:
    x = list(t[node.args[0]])
    a, b = list[Any](node.args[2])
    t.pin(node, "turns a plane", x[a], x[b])
    if node.args[1] % 2:
        x[a], x[b] = x[b], x[a]
    return tuple(d.resolve(dim) for dim in x)


@rule(aten.diagonal, facts=MOVES)
def _diagonal(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    plane = [p % len(x) for p in node.args[2:4]]
    t.pin(node, "reads a diagonal", *(x[p] for p in plane))
    return (*(dim for i, dim in enumerate(x) if i not in plane), Const(t.shape(node)[-1]))


# -- by index, elsewhere coordinate by coordinate ----------------------------------------------------------------------


def _coordinatewise(t: Inference, node: fx.Node, axis: int, *tensors: Dims) -> None:
    """Along `axis` places are numbers, which must stay; along the others tensors agree, or one is read in part."""
    for i, dims in enumerate(zip(*tensors, strict=True)):
        if i == axis:
            t.pin(node, "indexed by a tensor", *dims)
        elif len({dim.size for dim in dims}) > 1:
            t.pin(node, "indexes a part", *dims)
        else:
            for other in dims[1:]:
                t.unify(node, dims[0], other)


@rule(aten.gather, facts=MOVES)
def _gather(t: Inference, node: fx.Node) -> Dims:
    x, index = t[node.args[0]], t[node.args[2]]
    _coordinatewise(t, node, node.args[1] % len(x), x, index)
    return tuple(d.resolve(dim) for dim in index)


@rule(aten.take_along_dim, facts=MOVES)
def _take_along(t: Inference, node: fx.Node) -> Dims:
    t.pin(node, "indexed by a tensor", *t[node.args[0]], *t[node.args[1]])
    return t.constant(node)


# Where numbers are written or added up, the result has no other sign than they.
state(Facts(keeps(0, 3)), aten.scatter, aten.scatter_add, aten.scatter_reduce, aten.index_fill)


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def _scatter(t: Inference, node: fx.Node) -> Dims:
    x, written = t[node.args[0]], [t[a] for a in node.args[2:4] if t[a]]
    _coordinatewise(t, node, node.args[1] % len(x), x, *written)
    return x


@rule(aten.index_fill)
def _index_fill(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    t.pin(node, "indexed by a tensor", x[node.args[1]], *t[node.args[2]])
    return x


state(Facts(keeps(0, 3), moves=True), aten.index_copy)
state(Facts(keeps(0, 3, "alpha")), aten.index_add)


@rule(aten.index_copy, aten.index_add)
def _index_copy(t: Inference, node: fx.Node) -> Dims:
    """Writes whole slices at places that a tensor names: slices and places go together, what is written to stays."""
    x, source, axis = t[node.args[0]], t[node.args[3]], node.args[1] % len(t[node.args[0]])
    for i, (a, b) in enumerate(zip(x, source, strict=True)):
        if i != axis:
            t.unify(node, a, b)
    t.unify(node, t[node.args[2]][0], source[axis])
    t.pin(node, "written to at places that a tensor names", x[axis])
    t.statistic(node, [axis], 3, neutral=0.0)
    return x


@rule(aten.index_put, facts=Facts(keeps(0, 2)))
def _index_put(t: Inference, node: fx.Node) -> Dims:
    """Writes where indices say; where a mask says, and one number, it is a choice element by element."""
    x, indices, values = t[node.args[0]], node.args[1], t[node.args[2]]
    first = indices[0]
    if len(indices) == 1 and first.meta["val"].dtype == torch.bool and all(dim.size == 1 for dim in values):
        for a, b in zip(x, t[first], strict=False):
            t.unify(node, a, b)
        return x
    plain = all(index is None or index.meta["val"].dtype != torch.bool for index in indices)
    t.pin(node, "indexed by a tensor", *(dim for index in indices for dim in t[index]))
    indexed = [i for i, index in enumerate(indices) if index is not None]
    if not plain or indexed != list(range(indexed[0], indexed[-1] + 1)):
        t.pin(node, "indexed by a mask or in several places", *x, *values)
        return x
    t.pin(node, "indexed by a tensor", *x[indexed[0] : indexed[-1] + 1])
    after = x[indexed[-1] + 1 :]
    rank = max(len(t[indices[i]]) for i in indexed)
    written = (*x[: indexed[0]], *(Const(0),) * rank, *after)
    for a, b in zip(reversed(written), reversed(values), strict=False):
        if a.size and b.size != 1:
            t.unify(node, a, b)
        else:
            t.pin(node, "written by index", b)
    return x
