"""Convolutions. Grouped: input G x I, weight (G x O, I, ...), output G x O; depthwise is I = 1.

None keeps signs, whatever its weight: kernels that transform their input round below zero.
"""

from __future__ import annotations

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Const, Dim
from sbs_fx.passes.channels.facts import Facts
from sbs_fx.passes.channels.inference import Dims, Inference, Term, rule
from sbs_fx.passes.channels.rules.contraction import extent, silence, sized

aten = torch.ops.aten


@rule(aten.conv1d, aten.conv2d, aten.conv3d, facts=Facts(neutral=0.0))
def _convolution(t: Inference, node: fx.Node) -> Dims:
    groups = t.size(node.args[6])
    x, weight = t[node.args[0]], t[node.args[1]]
    return _convolve(t, node, groups, 6, x[1], weight[0], weight[1], transposed=False)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d, facts=Facts(neutral=0.0))
def _transposed(t: Inference, node: fx.Node) -> Dims:
    groups = t.size(node.args[6])
    weight = t[node.args[1]]
    return _convolve(t, node, groups, 6, t[node.args[0]][1], weight[1], weight[0], transposed=True)


def _convolve(
    t: Inference,
    node: fx.Node,
    groups: int,
    position: int,
    channels: Dim,
    outputs: Dim,
    inputs: Dim,
    *,
    transposed: bool,
) -> Dims:
    x, weight = t[node.args[0]], t[node.args[1]]
    kernel = weight[2:]
    t.pin(node, "kernel positions", *kernel)
    if groups == 1:
        t.unify(node, channels, inputs)
        result, inner = outputs, inputs
    elif transposed:  # weight (G x I, O, ...)
        group, inner = t.factor(node, channels, d.resolve(channels).size // groups)
        group_of_weight, rows = t.factor(node, inputs, d.resolve(inputs).size // groups)
        t.unify(node, group, group_of_weight)
        t.unify(node, inner, rows)
        result = d.product([d.resolve(group), d.resolve(outputs)])
    else:
        group, inner = t.factor(node, channels, d.resolve(channels).size // groups)
        t.unify(node, inner, inputs)
        group_of_weight, rows = t.factor(node, outputs, d.resolve(outputs).size // groups)
        t.unify(node, group, group_of_weight)
        result = d.product([d.resolve(group), d.resolve(rows)])
    if groups > 1:
        t.edit(node, position, to=group)
    if t[node.args[2]]:
        t.unify(node, result, t[node.args[2]][0])
    dims = (x[0], result, *_spatial(t, node, x))
    adapted = t.adapters[node.name].dim if node.name in t.adapters else None
    # reason: an adapter runs at full width, whatever is kept
    loop = sized(node, tuple(Const(t.shape(node)[i]) if i == adapted else x for i, x in enumerate(dims)))
    if transposed:  # every input position meets the kernel once
        loop = [loop[0], loop[1], *zip(x[2:], node.args[0].meta["val"].shape[2:], strict=True)]
    term = Term((*loop, extent(inner), *(extent(k) for k in kernel)), ((0,), (1,)))
    t.layer(node, "conv", term, outputs=int(transposed))
    silence(t, node, 1)
    return dims


def _spatial(t: Inference, node: fx.Node, x: Dims) -> Dims:
    """A convolution along a channel axis mixes neighbours: run it at full width in an adapter."""
    shape = t.shape(node)
    result: list[Dim] = [Const(s) for s in shape[2:]]
    live = [i for i in range(2, len(x)) if d.axes(x[i])]
    kernel = node.args[1].meta["val"].shape[2:]
    for i in live:
        if kernel[i - 2] == 1 and shape[i] == x[i].size:
            result[i - 2] = d.resolve(x[i])
        elif len(live) == 1 and shape[i] == x[i].size:
            t.adapter(node, i)
            t.statistic(node, [i])
            result[i - 2] = d.resolve(x[i])
        else:
            t.pin(node, "convolves along a channel axis and changes its size", x[i])
    return tuple(result)
