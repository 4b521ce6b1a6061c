"""Pooling, resampling and sliding windows: channels pass, the spatial dimensions are constants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Const
from sbs_fx.passes.channels.facts import MOVES, Facts, keeps, state
from sbs_fx.passes.channels.inference import Dims, Inference, rule

aten = torch.ops.aten

# Operators that pick values, those that integer kernels pick too, and those that give their places as well.
state(
    MOVES,
    *(aten.max_pool1d, aten.max_pool3d, aten.upsample_nearest1d, aten.upsample_nearest3d),
    *(aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d),
    *(aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d),
    *(aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d),
)
state(replace(MOVES, codes="pick"), aten.max_pool2d, aten.upsample_nearest2d)
state(
    Facts(keeps(0)),
    *(aten.max_pool2d_with_indices, aten.max_pool3d_with_indices),
    *(aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d),
)

# Means, with weights that are not negative unless the divisor (argument 6) is.
state(Facts(keeps(0, 6), codes="mean"), aten.avg_pool2d)
state(Facts(keeps(0, 6)), aten.avg_pool3d)
state(Facts(keeps(0), codes="mean"), aten.adaptive_avg_pool2d)
state(
    Facts(keeps(0)),
    *(aten.avg_pool1d, aten.adaptive_avg_pool1d, aten._adaptive_avg_pool2d, aten.adaptive_avg_pool3d),
    *(aten.upsample_linear1d, aten.upsample_bilinear2d, aten._upsample_bilinear2d_aa, aten.upsample_trilinear3d),
)

# Bicubic interpolation overshoots; a sampler's argument 2 names the interpolation.
_BICUBIC = 2
state(Facts(), aten.upsample_bicubic2d, aten._upsample_bicubic2d_aa)
state(Facts(lambda call: call.keeps(0) and call[2] != _BICUBIC), aten.grid_sampler)


def _resampled(t: Inference, node: fx.Node, spatial: int, shape: tuple[int, ...]) -> Dims:
    x = t[node.args[0]]
    keep = len(x) - spatial
    for dim in x[keep:]:
        if d.axes(dim):
            t.pin(node, "pools or resamples along a channel axis", dim)
    return (*x[:keep], *(Const(s) for s in shape[keep:]))


@rule(
    aten.max_pool2d,
    aten.avg_pool2d,
    aten.adaptive_avg_pool2d,
    aten.adaptive_max_pool2d,
    aten._adaptive_avg_pool2d,
    aten.max_pool2d_with_indices,
    aten.upsample_nearest2d,
    aten.upsample_bilinear2d,
    aten.upsample_bicubic2d,
    aten._upsample_nearest_exact2d,
    aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa,
    aten.reflection_pad2d,
    aten.replication_pad2d,
)
def _planes(t: Inference, node: fx.Node) -> Any:
    return _each(t, node, 2)


@rule(
    aten.max_pool1d,
    aten.avg_pool1d,
    aten.adaptive_avg_pool1d,
    aten.adaptive_max_pool1d,
    aten.upsample_nearest1d,
    aten.upsample_linear1d,
    aten._upsample_nearest_exact1d,
    aten.reflection_pad1d,
    aten.replication_pad1d,
)
def _lines(t: Inference, node: fx.Node) -> Any:
    return _each(t, node, 1)


@rule(
    aten.max_pool3d,
    aten.max_pool3d_with_indices,
    aten.adaptive_max_pool3d,
    aten.avg_pool3d,
    aten.adaptive_avg_pool3d,
    aten.upsample_trilinear3d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact3d,
    aten.reflection_pad3d,
    aten.replication_pad3d,
)
def _volumes(t: Inference, node: fx.Node) -> Any:
    return _each(t, node, 3)


def _each(t: Inference, node: fx.Node, spatial: int) -> Any:
    """One set of types, or one per output (max pooling with indices)."""
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return _resampled(t, node, spatial, t.shape(node))
    return tuple(_resampled(t, node, spatial, tuple(t.size(s) for s in v.shape)) for v in value)


@rule(aten.grid_sampler)
def _grid_sampler(t: Inference, node: fx.Node) -> Any:
    places = t[node.args[1]]
    t.unify(node, t[node.args[0]][0], places[0])  # reason: attention heads may be folded into the batch
    t.pin(node, "places to sample at", *places[1:])
    return _each(t, node, len(t[node.args[0]]) - 2)


@rule(aten.affine_grid_generator, facts=Facts())
def _affine_grid(t: Inference, node: fx.Node) -> Dims:
    """Places only: the number of channels among the sizes plays no part."""
    t.pin(node, "coordinates of places", *t[node.args[0]][1:])
    return t.constant(node)


@rule(aten.max_unpool2d, aten.max_unpool3d, facts=MOVES)
def _unpool(t: Inference, node: fx.Node) -> Dims:
    """Values go to the places that a max pool took them from, each channel by itself."""
    x, places = t[node.args[0]], t[node.args[1]]
    spatial = 2 if node.target is aten.max_unpool2d.default else 3
    for a, b in zip(x, places, strict=True):
        t.unify(node, a, b)
    return _resampled(t, node, spatial, t.shape(node))


@rule(aten.im2col, facts=MOVES)
def _im2col(t: Inference, node: fx.Node) -> Dims:
    """(B, C, H, W) to (B, C x kh x kw, L)."""
    x, shape = t[node.args[0]], t.shape(node)
    kernel = node.args[1][0] * node.args[1][1]
    return (*x[:-3], d.product([d.resolve(x[-3]), Const(kernel)]), Const(shape[-1]))


@rule(aten.col2im, facts=Facts(keeps(0)))
def _col2im(t: Inference, node: fx.Node) -> Dims:
    x, shape = t[node.args[0]], t.shape(node)
    channels, positions = t.factor(node, x[-2], node.args[2][0] * node.args[2][1])
    t.pin(node, "kernel positions", positions)
    return (*x[:-2], channels, Const(shape[-2]), Const(shape[-1]))


@rule(aten.unfold.default, facts=MOVES)
def _unfold(t: Inference, node: fx.Node) -> Dims:
    """Windows of `size` along one dimension, appended as the last one."""
    x, shape = t[node.args[0]], t.shape(node)
    axis = node.args[1] % len(x)
    if d.axes(x[axis]):
        t.pin(node, "slides along a channel axis", x[axis])
    return (*x[:axis], Const(shape[axis]), *x[axis + 1 :], Const(shape[-1]))
