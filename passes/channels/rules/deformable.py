"""Deformable convolution, an operator of torchvision: a convolution whose kernel reads at places that inputs shift."""

from __future__ import annotations

from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Const
from sbs_fx.passes.channels.facts import Facts
from sbs_fx.passes.channels.inference import Dims, Inference, Term, rule
from sbs_fx.passes.channels.rules.contraction import extent, sized

OFFSETS, MASK, BIAS, GROUPS, OFFSET_GROUPS = 2, 3, 4, 11, 12


# reason: by name, as torchvision takes seconds to import and whoever has the operator in a graph has imported it
@rule("torchvision::deform_conv2d", facts=Facts())
def _deformable(t: Inference, node: fx.Node) -> Dims:
    x, weight = t[node.args[0]], t[node.args[1]]
    t.pin(node, "shifts of kernel positions", *t[node.args[OFFSETS]][1:], *t[node.args[MASK]][1:])
    t.pin(node, "kernel positions and space", *weight[2:], *x[2:])
    channels, outputs = x[1], weight[0]
    if node.args[OFFSET_GROUPS] > 1:
        parts, _ = t.factor(node, channels, d.resolve(channels).size // node.args[OFFSET_GROUPS])
        t.pin(node, "channels that share their shifts", parts)
    if node.args[GROUPS] == 1:
        t.unify(node, channels, weight[1])
    else:
        group, inner = t.factor(node, channels, d.resolve(channels).size // node.args[GROUPS])
        group_of_weight, _ = t.factor(node, outputs, d.resolve(outputs).size // node.args[GROUPS])
        t.unify(node, inner, weight[1])
        t.unify(node, group, group_of_weight)
        t.edit(node, GROUPS, to=group)
    t.unify(node, outputs, t[node.args[BIAS]][0])
    if not t.is_masked(node.args[1]):
        t.statistic(node, [1], neutral=0.0)
    result = (x[0], d.resolve(outputs), *(Const(s) for s in t.shape(node)[2:]))
    t.layer(node, "conv", Term((*sized(node, result), extent(weight[1]), *map(extent, weight[2:])), ((0,), (1,))))
    return result
