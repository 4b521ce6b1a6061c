"""Operators that multiply and sum over a shared dimension: linear, matmul, einsum, attention.

The contracted types agree. Where neither operand is a masked parameter, silenced coordinates need not be zero (a bias,
a sigmoid), so the contraction is recorded as a statistic, which ignores zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Dim
from sbs_fx.passes.channels.facts import Facts, keeps
from sbs_fx.passes.channels.inference import Dims, Inference, Term, rule
from sbs_fx.passes.channels.rules.pointwise import broadcast

aten = torch.ops.aten


def sized(node: fx.Node, dims: Dims) -> list[tuple[Dim, Any]]:
    """Types of an output beside its symbolic sizes: the outer loop of a multiply-accumulate."""
    return list(zip(dims, node.meta["val"].shape, strict=True))


def extent(dim: Dim, size: Any = None) -> tuple[Dim, Any]:
    """A contracted type beside its size, which must be given where it may be symbolic."""
    return dim, d.resolve(dim).size if size is None else size


def silence(t: Inference, node: fx.Node, *contracted: int, arg: int = 0, weight: int = 1) -> None:
    """Contracted coordinates must be zero on one side: masked parameters are, anything else need not be."""
    if not t.is_masked(node.args[weight]):
        t.statistic(node, contracted, arg)


@rule(aten.linear, facts=Facts(neutral=0.0))
def _linear(t: Inference, node: fx.Node) -> Dims:
    x, weight = t[node.args[0]], t[node.args[1]]
    t.unify(node, x[-1], weight[1])
    if t[node.args[2]]:
        t.unify(node, weight[0], t[node.args[2]][0])
    silence(t, node, -1)
    result = (*x[:-1], weight[0])
    t.layer(node, "linear", Term((*sized(node, result), extent(weight[1])), ((0,), (1,))))
    return result


def _matmul(t: Inference, node: fx.Node, a: int, b: int) -> Dims:
    x, y = t[node.args[a]], t[node.args[b]]
    if len(x) == 1 or len(y) == 1:
        inner = (x[-1], y[-1] if len(y) == 1 else y[-2])
        batch = x[:-1] if len(y) == 1 else (*y[:-2], y[-1])
    else:
        inner = (x[-1], y[-2])
        batch = (*broadcast(t, node, x[:-2] or (d.ONE,), y[:-2] or (d.ONE,)), x[-2], y[-1])
        batch = batch[len(batch) - len(node.meta["val"].shape) :]
    t.unify(node, *inner)
    silence(t, node, -1, arg=a, weight=b)
    t.layer(
        node,
        "matmul",
        Term((*sized(node, batch), extent(inner[0], node.args[a].meta["val"].shape[-1])), ((a,), (b,))),
        outputs=-1,
    )
    return batch


@rule(aten.matmul, aten.bmm, aten.mm, aten.mv, aten.dot, facts=Facts(keeps(0, 1), neutral=0.0))
def _matmul_rule(t: Inference, node: fx.Node) -> Dims:
    return _matmul(t, node, 0, 1)


@rule(aten.addmm, aten.baddbmm, facts=Facts(keeps(0, 1, 2, "beta", "alpha"), neutral=0.0))
def _addmm(t: Inference, node: fx.Node) -> Dims:
    return broadcast(t, node, t[node.args[0]], _matmul(t, node, 1, 2))


@rule(aten.einsum, facts=Facts(keeps(1), neutral=0.0))
def _einsum(t: Inference, node: fx.Node) -> Dims:
    """Letters are types: equal letters agree, letters missing from the output are contracted."""
    left, _, right = node.args[0].replace(" ", "").partition("->")
    operands = [t[a] for a in node.args[1]]
    letters: dict[str, Dim] = {}
    if "." in left or not right or len(operands) > 2:
        t.pin(
            node,
            "einsum with an ellipsis, implicit output or more than two operands",
            *(x for o in operands for x in o),
        )
        return t.constant(node)
    for term, dims in zip(left.split(","), operands, strict=True):
        for letter, dim in zip(term, dims, strict=True):
            if letter in letters:
                t.unify(node, letters[letter], dim)
            else:
                letters[letter] = dim
    contracted = [letter for letter in letters if letter not in right]
    for letter in contracted:
        holders = [(k, term.index(letter)) for k, term in enumerate(left.split(",")) if letter in term]
        if not any(t.is_masked(node.args[1][k]) for k, _ in holders):
            t.statistic(node, [holders[0][1]], 1, holders[0][0])
    result = tuple(letters[letter] for letter in right)
    if len(operands) == 2:
        size_of = {
            letter: size
            for term, source in zip(left.split(","), node.args[1], strict=True)
            for letter, size in zip(term, source.meta["val"].shape, strict=True)
        }
        sizes = (*sized(node, result), *(extent(letters[c], size_of[c]) for c in contracted))
        t.layer(node, "matmul", Term(sizes, ((1, 0), (1, 1))))
    return result


# reason: its result is a mean of the values, with weights of a softmax
@rule(aten.scaled_dot_product_attention, facts=Facts(keeps(2), neutral=0.0))
def _attention(t: Inference, node: fx.Node) -> Dims:
    """softmax(q k^T / sqrt(D)) v; `trace` has made the scale explicit, so that it stays when D shrinks."""
    q, k, v = (t[a] for a in node.args[:3])
    t.unify(node, q[-1], k[-1])
    t.unify(node, k[-2], v[-2])
    if d.axes(k[-2]):
        t.pin(node, "attention over a channel axis", k[-2])
    grouped = bool(node.kwargs.get("enable_gqa", False))
    for i in range(len(q) - 2):
        if grouped and i == len(q) - 3 and q[i].size != k[i].size:
            t.unify(node, k[i], v[i])
            heads, repeats = t.factor(node, q[i], q[i].size // k[i].size)
            t.unify(node, heads, k[i])
            # reason: with one key head per group the repeat count would have to stay an integer; prune groups only
            t.pin(node, "query heads per key head", repeats)
        else:
            broadcast(t, node, (q[i],), (k[i],), (v[i],))
    head = broadcast(t, node, q[:-2], k[:-2]) if not grouped else q[:-2]
    if t[node.args[3]]:
        broadcast(t, node, (*head, q[-2], k[-2]), t[node.args[3]])
    t.statistic(node, [-1])
    result = (*head, q[-2], v[-1])
    sizes = node.meta["val"].shape[:-1]
    outer = (*zip(result[:-1], sizes, strict=True), (k[-2], node.args[1].meta["val"].shape[-2]))
    t.layer(node, "attention", Term((*outer, extent(q[-1])), ((0,), (1,))), Term((*outer, extent(v[-1])), (None, (2,))))
    return result
