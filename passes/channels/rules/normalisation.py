"""Normalisation, softmax and reductions: they compute a statistic, which must not see the channels that are gone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.facts import Facts, always, keeps, state
from sbs_fx.passes.channels.inference import Dims, Inference, rule

aten = torch.ops.aten


def _agree(t: Inference, node: fx.Node, dim: d.Dim, *positions: int) -> None:
    for position in positions:
        if t[node.args[position]]:
            t.unify(node, dim, t[node.args[position]][0])


@rule(aten.batch_norm, facts=Facts())
def _batch_norm(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    _agree(t, node, x[1], 1, 2, 3, 4)
    if node.args[5]:  # statistics of this very tensor, as weight standardisation uses them
        t.statistic(node, [0, *range(2, len(x))])
    return x


@rule(aten.instance_norm, facts=Facts())
def _instance_norm(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    _agree(t, node, x[1], 1, 2, 3, 4)
    return x


@rule(aten.layer_norm, aten.rms_norm, facts=Facts())
def _layer_norm(t: Inference, node: fx.Node) -> Dims:
    x, count = t[node.args[0]], len(node.args[1])
    for i, dim in enumerate(x[len(x) - count :]):
        t.edit(node, 1, i, to=dim)
        for parameter in node.args[2:4]:
            if t[parameter]:
                t.unify(node, dim, t[parameter][i])
    t.statistic(node, range(len(x) - count, len(x)))
    return x


@rule(aten.group_norm, facts=Facts())
def _group_norm(t: Inference, node: fx.Node) -> Dims:
    x, groups = t[node.args[0]], node.args[1]
    _agree(t, node, x[1], 2, 3)
    group, _ = t.factor(node, x[1], d.resolve(x[1]).size // groups)
    t.edit(node, 1, to=group)
    t.statistic(node, [1])
    return x


@rule(aten.softmax.int, aten._softmax, aten._safe_softmax, facts=Facts(always, neutral=-math.inf))
def _softmax(t: Inference, node: fx.Node) -> Dims:
    t.statistic(node, [node.args[1]])
    return t[node.args[0]]


@rule(aten.log_softmax.int, facts=Facts())
def _log_softmax(t: Inference, node: fx.Node) -> Dims:
    # reason: the logarithm of a softmax of -inf is -inf, and 0 times that, in whatever reads it, is NaN
    t.statistic(node, [node.args[1]])
    return t[node.args[0]]


def _reduced(t: Inference, node: fx.Node, positions: Any, keepdim: bool) -> Dims:
    x = t[node.args[0]]
    over = _positions(positions, len(x))
    return tuple(d.ONE if i in over else x[i] for i in range(len(x)) if keepdim or i not in over)


def _positions(positions: Any, rank: int) -> list[int]:
    if positions is None or positions == []:
        return list(range(rank))
    return [p % rank for p in ([positions] if isinstance(positions, int) else positions)]


def _reduction(t: Inference, node: fx.Node, positions: Any, keepdim: bool, *, neutral: float | None = None) -> Dims:
    t.statistic(node, _positions(positions, len(t[node.args[0]])), neutral=neutral)
    return _reduced(t, node, positions, keepdim)


@rule(aten.mean.dim, facts=Facts(keeps(0), codes="mean"))
def _mean(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, node.args[1], node.args[2])


@rule(aten.mean.default, facts=Facts(keeps(0)))
def _mean_all(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, None, False)


@rule(aten.sum.dim_IntList, facts=Facts(keeps(0), neutral=0.0))
def _sum(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, node.args[1], node.args[2])


@rule(aten.sum.default, facts=Facts(keeps(0), neutral=0.0))
def _sum_all(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, None, False)


@rule(aten.linalg_vector_norm, aten.norm.ScalarOpt_dim, facts=Facts(always))
def _vector_norm(t: Inference, node: fx.Node) -> Dims:
    order = 2 if node.args[1] is None else node.args[1]
    return _reduction(t, node, node.args[2], node.args[3], neutral=math.inf if order < 0 else 0.0)


@rule(aten.var.correction, aten.std.correction, facts=Facts(always))
def _variance(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, node.args[1], node.kwargs.get("keepdim", False))


@rule(aten.var.dim, aten.std.dim, facts=Facts(always))
def _variance_dim(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, node.args[1], node.args[3])


@rule(aten.var.default, aten.std.default, facts=Facts(always))
def _variance_of_all(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, None, False)


@rule(aten.var_mean.dim, aten.std_mean.dim, facts=Facts())
def _variance_and_mean_dim(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    dims = _reduction(t, node, node.args[1], node.args[3])
    return dims, dims


@rule(aten.var_mean.correction, aten.std_mean.correction, facts=Facts())
def _variance_and_mean(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    dims = _reduction(t, node, node.args[1], node.kwargs.get("keepdim", False))
    return dims, dims


@rule(aten.nansum, facts=Facts(keeps(0), neutral=0.0))
def _sum_of_numbers(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, node.args[1], node.args[2])


@rule(aten.count_nonzero, facts=Facts(always, neutral=0.0))
def _count(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, node.args[1], False)


# Without a dimension, or over one or several of them.
state(Facts(keeps(0), moves=True, neutral=-math.inf), aten.max.default)
state(Facts(keeps(0), moves=True, neutral=math.inf), aten.min.default)
state(Facts(keeps(0), neutral=1.0), aten.prod.default, aten.prod.dim_int)
state(Facts(always, neutral=0.0), aten.any.default, aten.any.dim, aten.any.dims)
state(Facts(always, neutral=1.0), aten.all.default, aten.all.dim, aten.all.dims)


@rule(
    *(aten.max.default, aten.min.default, aten.prod.default, aten.prod.dim_int),
    *(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims),
)
def _over_some_or_all(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, *(node.args[1:3] or (None, False)))


state(Facts(keeps(0), moves=True, neutral=-math.inf), aten.amax)
state(Facts(keeps(0), moves=True, neutral=math.inf), aten.amin)
state(Facts(neutral=-math.inf), aten.logsumexp)


@rule(aten.amax, aten.amin, aten.logsumexp)
def _extreme(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, node.args[1], node.args[2])


@rule(
    *(aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim),
    facts=Facts(keeps(0)),
)
def _extreme_with_index(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    x = t[node.args[0]]
    t.pin(node, "returns an index", x[node.args[1]])
    dims = _reduced(t, node, node.args[1], node.args[2])
    return dims, dims


@rule(aten.kthvalue.default, facts=Facts(keeps(0)))
def _kth_value(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    t.pin(node, "counts ranks", t[node.args[0]][node.args[2]])
    dims = _reduced(t, node, node.args[2], node.args[3])
    return dims, dims


@rule(aten.median.default, aten.nanmedian.default, facts=Facts(keeps(0), moves=True))
def _median(t: Inference, node: fx.Node) -> Dims:
    t.pin(node, "no number stays out of a median", *t[node.args[0]])
    return ()


state(Facts(always), aten.argmax, aten.argmin)
state(Facts(keeps(0)), aten.topk, aten.sort)


@rule(aten.argmax, aten.argmin, aten.topk, aten.sort)
def _index_of_extreme(t: Inference, node: fx.Node) -> Any:
    t.pin(node, "returns an index", *t[node.args[0]])
    value: torch.Tensor | Sequence[torch.Tensor] = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return t.constant(node)
    return tuple(tuple(d.Const(t.size(s)) for s in v.shape) for v in value)
