"""Operators of torchvision that read a feature map inside boxes: channels pass, each box is a sample of its own.

The position-sensitive ones read each cell of a box from channels of its own: the input is `C x height x width`.
"""

from __future__ import annotations

from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Const
from sbs_fx.passes.channels.facts import Facts, keeps
from sbs_fx.passes.channels.inference import Dims, Inference, rule

HEIGHT, WIDTH = 3, 4


def _boxed(t: Inference, node: fx.Node, is_position_sensitive: bool) -> Dims:
    x, boxes = t[node.args[0]], t[node.args[1]]
    t.pin(node, "corners of boxes, and space", *boxes[1:], *x[2:])
    channels, cells = x[1], (node.args[HEIGHT], node.args[WIDTH])
    if is_position_sensitive:
        channels, cell = t.factor(node, channels, cells[0] * cells[1])
        t.pin(node, "cells of a box", cell)
    return (boxes[0], d.resolve(channels), *map(Const, cells))


# reason: by name, as torchvision takes seconds to import and whoever has the operator in a graph has imported it
@rule("torchvision::roi_align", facts=Facts(keeps(0)))
def _aligned(t: Inference, node: fx.Node) -> Dims:
    return _boxed(t, node, False)


@rule("torchvision::roi_pool", facts=Facts())  # reason: its second result holds places, -1 for a box without any
def _largest(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    return (_boxed(t, node, False),) * 2


@rule("torchvision::ps_roi_align", "torchvision::ps_roi_pool", facts=Facts(keeps(0)))
def _position_sensitive(t: Inference, node: fx.Node) -> tuple[Dims, Dims]:
    return (_boxed(t, node, True),) * 2
