"""Normalisation, softmax and reductions: they compute a statistic, which must not see the channels that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.inference import Dims, Inference, rule

aten = torch.ops.aten


def _agree(t: Inference, node: fx.Node, dim: d.Dim, *positions: int) -> None:
    for position in positions:
        if t[node.args[position]]:
            t.unify(node, dim, t[node.args[position]][0])


@rule(aten.batch_norm)
def _batch_norm(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    _agree(t, node, x[1], 1, 2, 3, 4)
    if node.args[5]:  # statistics of this very tensor, as weight standardisation uses them
        t.statistic(node, "moments", [0, *range(2, len(x))])
    return x


@rule(aten.instance_norm)
def _instance_norm(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    _agree(t, node, x[1], 1, 2, 3, 4)
    return x


@rule(aten.layer_norm, aten.rms_norm)
def _layer_norm(t: Inference, node: fx.Node) -> Dims:
    x, count = t[node.args[0]], len(node.args[1])
    for i, dim in enumerate(x[len(x) - count :]):
        t.edit(node, 1, i, to=dim)
        for parameter in node.args[2:4]:
            if t[parameter]:
                t.unify(node, dim, t[parameter][i])
    t.statistic(node, "moments", range(len(x) - count, len(x)))
    return x


@rule(aten.group_norm)
def _group_norm(t: Inference, node: fx.Node) -> Dims:
    x, groups = t[node.args[0]], node.args[1]
    _agree(t, node, x[1], 2, 3)
    group, _ = t.factor(node, x[1], d.resolve(x[1]).size // groups)
    t.edit(node, 1, to=group)
    t.statistic(node, "moments", [1])
    return x


@rule(aten.softmax.int, aten._softmax, aten._safe_softmax)
def _softmax(t: Inference, node: fx.Node) -> Dims:
    t.statistic(node, "lowest", [node.args[1]])
    return t[node.args[0]]


@rule(aten.log_softmax.int)
def _log_softmax(t: Inference, node: fx.Node) -> Dims:
    # reason: the logarithm of a softmax of -inf is -inf, and 0 times that, in whatever reads it, is NaN
    t.statistic(node, "moments", [node.args[1]])
    return t[node.args[0]]


def _reduced(t: Inference, node: fx.Node, positions: Any, keepdim: bool) -> Dims:
    x = t[node.args[0]]
    over = _positions(positions, len(x))
    return tuple(d.ONE if i in over else x[i] for i in range(len(x)) if keepdim or i not in over)


def _positions(positions: Any, rank: int) -> list[int]:
    if positions is None or positions == []:
        return list(range(rank))
    return [p % rank for p in ([positions] if isinstance(positions, int) else positions)]


def _reduction(t: Inference, node: fx.Node, kind: str, positions: Any, keepdim: bool) -> Dims:
    t.statistic(node, kind, _positions(positions, len(t[node.args[0]])))
    return _reduced(t, node, positions, keepdim)


@rule(aten.mean.dim)
def _mean(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, "moments", node.args[1], node.args[2])


@rule(aten.mean.default)
def _mean_all(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, "moments", None, False)


@rule(aten.sum.dim_IntList)
def _sum(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, "zero", node.args[1], node.args[2])


@rule(aten.sum.default)
def _sum_all(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, "zero", None, False)


@rule(aten.linalg_vector_norm, aten.norm.ScalarOpt_dim)
def _vector_norm(t: Inference, node: fx.Node) -> Dims:
    order = 2 if node.args[1] is None else node.args[1]
    return _reduction(t, node, "highest" if order < 0 else "zero", node.args[2], node.args[3])


@rule(aten.var.correction, aten.std.correction)
def _variance(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, "moments", node.args[1], node.kwargs.get("keepdim", False))


@rule(aten.var.dim, aten.std.dim)
def _variance_dim(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, "moments", node.args[1], node.args[3])


@rule(aten.var.default, aten.std.default)
def _variance_of_all(t: Inference, node: fx.Node) -> Dims:
    return _reduction(t, node, "moments", None, False)


@rule(aten.var_mean.dim, aten.std_mean.dim)
def _variance_and_mean_dim(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    dims = _reduction(t, node, "moments", node.args[1], node.args[3])
    return dims, dims


@rule(aten.var_mean.correction, aten.std_mean.correction)
def _variance_and_mean(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    dims = _reduction(t, node, "moments", node.args[1], node.kwargs.get("keepdim", False))
    return dims, dims


@rule(aten.amax, aten.amin, aten.logsumexp)
def _extreme(t: Inference, node: fx.Node) -> Dims:
    kind = "highest" if "amin" in str(node.target) else "lowest"
    return _reduction(t, node, kind, node.args[1], node.args[2])


@rule(aten.max.dim, aten.min.dim)
def _extreme_with_index(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    x = t[node.args[0]]
    t.pin(node, "returns an index", x[node.args[1]])
    dims = _reduced(t, node, node.args[1], node.args[2])
    return dims, dims


@rule(aten.argmax, aten.argmin, aten.topk, aten.sort)
def _index_of_extreme(t: Inference, node: fx.Node) -> Any:
    t.pin(node, "returns an index", *t[node.args[0]])
    value: torch.Tensor | Sequence[torch.Tensor] = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return t.constant(node)
    return tuple(tuple(d.Const(t.size(s)) for s in v.shape) for v in value)
