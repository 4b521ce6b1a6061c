"""Element-wise operators and creation: they move nothing, their operands agree dimension by dimension.

Everything that torch tags as pointwise comes here by that tag; only what lacks the tag has a rule by name. Their facts
are in `elementwise.py`, those of creation here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import ONE, Const, Dim
from sbs_fx.passes.channels.facts import Facts, always, keeps, state
from sbs_fx.passes.channels.inference import Dims, Inference, rule

aten = torch.ops.aten


def broadcast(t: Inference, node: fx.Node, *operands: Dims) -> Dims:
    """Types of a broadcast result, aligned from the right; operands of size 1 take no part in the agreement."""
    rank = max(len(o) for o in operands)
    result: list[Dim] = []
    for position in range(-rank, 0):
        present = [o[position] for o in operands if len(o) >= -position and o[position].size != 1]
        for other in present[1:]:
            t.unify(node, present[0], other)
        result.append(d.resolve(present[0]) if present else ONE)
    return tuple(result)


@rule("pointwise")
def _pointwise(t: Inference, node: fx.Node) -> Dims:
    operands = [t[a] for a in (*node.args, *node.kwargs.values()) if t[a]]
    return broadcast(t, node, *operands) if operands else t.constant(node)


@rule(
    aten.dropout,
    aten.feature_dropout,
    aten.alpha_dropout,
    aten.clone,
    aten.contiguous,
    aten.to,
    aten._to_copy,
    aten.type_as,
    aten.native_dropout,
    aten.relu6,
    aten.hardswish,
    aten.hardsigmoid,
    aten.celu,
    aten.selu,
    aten.silu,
    aten.mish,
    aten.rrelu,
    aten.log_sigmoid,
    aten.softplus,
    aten.positive,
    aten.real,
    aten.imag,
    aten.zero,
    aten.zeros_like,
    aten.ones_like,
    aten.empty_like,
    aten.full_like,
    aten.rand_like,
    aten.randn_like,
    aten.nan_to_num,
    aten.square,
    aten.bernoulli,
    aten.lerp,
    aten.clip,
)
def _same_as_first(t: Inference, node: fx.Node) -> Dims:
    return t[node.args[0]]


@rule(
    aten.where,
    aten.copy,
    aten.masked_fill,
    aten.addcmul,
    aten.addcdiv,
    aten.clamp,
    aten.minimum,
    aten.maximum,
    aten.fill,
    aten.floor_divide,  # reason: pointwise, though torch does not tag it so
)
def _agreeing(t: Inference, node: fx.Node) -> Dims:
    return _pointwise(t, node)


@rule(aten.prelu)
def _prelu(t: Inference, node: fx.Node) -> Dims:
    x, weight = t[node.args[0]], t[node.args[1]]
    if weight and weight[0].size > 1:
        t.unify(node, x[1], weight[0])
    return x


# Sizes come first, or after a tensor; where a number fills the result, it has the number's sign.
state(
    Facts(always),
    *(aten.zeros, aten.ones, aten.new_zeros, aten.new_ones, aten.zero, aten.zeros_like, aten.ones_like),
    *(aten.rand, aten.rand_like, aten.bernoulli),
)
state(Facts(keeps(1)), aten.full, aten.full_like)
state(Facts(keeps(2)), aten.new_full)
state(Facts(), aten.empty, aten.new_empty, aten.empty_like, aten.randn, aten.randn_like)


@rule(
    aten.zeros,
    aten.ones,
    aten.full,
    aten.empty,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
    aten.rand,
    aten.randn,
)
def _created(t: Inference, node: fx.Node) -> Dims:
    """Coordinates without parameters follow whatever they meet: fresh axes, not constants. A size that is read off a
    tensor has that dimension's type and needs no edit."""
    position = 1 if str(node.target).startswith("aten.new_") else 0
    result: list[Dim] = []
    for i, size in enumerate(node.args[position]):
        if isinstance(size, fx.Node) and size.target is aten.sym_size.int and t[size.args[0]]:
            result.append(t[size.args[0]][size.args[1]])
            continue
        dim = d.fresh(size) if isinstance(size, int) else Const(t.size(size))
        t.edit(node, position, i, to=dim)
        result.append(dim)
    return tuple(result)


state(
    Facts(always),
    *(aten.eye, aten.tril_indices, aten.triu_indices, aten.randperm, aten.sym_size, aten.one_hot),
    aten.arange.default,
)
state(Facts(keeps(0, 1)), aten.arange.start, aten.arange.start_step, aten.linspace)
state(Facts(keeps(0)), aten.scalar_tensor)


@rule(
    aten.arange,
    aten.linspace,
    aten.eye,
    aten.scalar_tensor,
    aten.tril_indices,
    aten.triu_indices,
    aten.randperm,
    aten.sym_size,
    aten.one_hot,
)
def _counting(t: Inference, node: fx.Node) -> Any:
    return t.constant(node)


@rule(aten.tril, aten.triu, facts=Facts(keeps(0)))
def _triangle(t: Inference, node: fx.Node) -> Dims:
    x = t[node.args[0]]
    t.pin(node, "positions matter", *x[-2:])
    return t.constant(node)
