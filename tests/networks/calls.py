"""Calls of single operators, for the tests of their facts: those whose result is never negative, and those that differ
by a hair's breadth and are.

A call is a function of x, of either sign, and its absolute value p, both (2, 4, 6, 6); it is traced with proxies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Case = Callable[[Tensor, Tensor], Tensor]


def whole(x: Tensor) -> Tensor:
    """Whole numbers that index nothing out of (2, 4, 6, 6)."""
    return aten.to.dtype(aten.gt.Scalar(x, 0), torch.int64)


def line(x: Tensor) -> Tensor:
    """(4, 6, 6), the form that operators on lines take, with four in the batch."""
    return aten.select.int(x, 0, 0)


def matrix(x: Tensor) -> Tensor:
    return aten.select.int(line(x), 0, 0)


def vector(x: Tensor) -> Tensor:
    return aten.select.int(matrix(x), 0, 0)


def created(x: Any, target: Any, *args: Any) -> Any:
    """A call without tensors, which tracing would make a constant."""
    return x.tracer.create_proxy("call_function", target, args, {})


def first(results: Any) -> Tensor:
    return results[0]


def grid(x: Tensor) -> Tensor:
    """Places to sample at, (2, 4, 6, 2)."""
    return aten.slice.Tensor(aten.tanh.default(x), 3, 0, 2)


# Results that are never negative, though x is.
CLAIMED: list[Case] = [
    # of any tensor
    lambda x, p: aten.relu.default(x),
    lambda x, p: aten.relu6.default(x),
    lambda x, p: aten.sigmoid.default(x),
    lambda x, p: aten.hardsigmoid.default(x),
    lambda x, p: aten.abs.default(x),
    lambda x, p: aten.square.default(x),
    lambda x, p: aten.exp.default(x),
    lambda x, p: aten.exp2.default(x),
    lambda x, p: aten.cosh.default(x),
    lambda x, p: aten.acos.default(aten.tanh.default(x)),
    lambda x, p: aten.erfc.default(x),
    lambda x, p: aten.sqrt.default(p),
    lambda x, p: aten.rsqrt.default(p),
    lambda x, p: aten.acosh.default(aten.add.Tensor(p, 1)),
    lambda x, p: aten.softplus.default(x),
    lambda x, p: aten.softmax.int(x, 1),
    lambda x, p: aten._softmax.default(x, 1, False),
    lambda x, p: aten._safe_softmax.default(x, 1),
    lambda x, p: aten.linalg_vector_norm.default(x, 2, [1]),
    lambda x, p: aten.norm.ScalarOpt_dim(x, 1, [1]),
    lambda x, p: aten.var.correction(x, [1], correction=1),
    lambda x, p: aten.var.dim(x, [1]),
    lambda x, p: aten.std.default(x),
    lambda x, p: aten.std.correction(x, [1]),
    lambda x, p: aten.std.dim(x, [1]),
    lambda x, p: aten.var.default(x),
    lambda x, p: aten.argmax.default(x),
    lambda x, p: aten.argmin.default(x),
    lambda x, p: aten.one_hot.default(whole(x)),
    # created
    lambda x, p: created(x, aten.zeros.default, [2]),
    lambda x, p: created(x, aten.ones.default, [2]),
    lambda x, p: aten.zeros_like.default(x),
    lambda x, p: aten.ones_like.default(x),
    lambda x, p: aten.new_zeros.default(x, [2]),
    lambda x, p: aten.new_ones.default(x, [2]),
    lambda x, p: created(x, aten.full.default, [2], 0.5),
    lambda x, p: aten.full_like.default(x, 0.5),
    lambda x, p: aten.zero.default(x),
    lambda x, p: aten.new_full.default(x, [2], 0.5),
    lambda x, p: created(x, aten.rand.default, [9]),
    lambda x, p: aten.rand_like.default(x),
    lambda x, p: aten.bernoulli.default(aten.sigmoid.default(x)),
    lambda x, p: created(x, aten.randperm.default, 9),
    lambda x, p: created(x, aten.arange.default, 9),
    lambda x, p: created(x, aten.arange.start, 1, 9),
    lambda x, p: created(x, aten.arange.start_step, 9, 1, -2),
    lambda x, p: created(x, aten.linspace.default, 1, 0, 9),
    lambda x, p: created(x, aten.eye.default, 3),
    lambda x, p: created(x, aten.scalar_tensor.default, 0.5),
    lambda x, p: created(x, aten.tril_indices.default, 3, 3),
    lambda x, p: created(x, aten.triu_indices.default, 3, 3),
    # of two tensors or a tensor and a number
    lambda x, p: aten.add.Tensor(p, p),
    lambda x, p: aten.add.Tensor(p, 2, alpha=0.5),
    lambda x, p: aten.add.Scalar(p, 2),
    lambda x, p: aten.mul.Tensor(p, p),
    lambda x, p: aten.mul.Tensor(x, x),
    lambda x, p: aten.mul.Scalar(p, 2),
    lambda x, p: aten.div.Tensor(p, 2),
    lambda x, p: aten.div.Tensor_mode(p, p, rounding_mode="floor"),
    lambda x, p: aten.true_divide.Tensor(p, p),
    lambda x, p: aten.floor_divide.default(p, 0.3),
    lambda x, p: aten.addcmul.default(p, p, p, value=0.5),
    lambda x, p: aten.addcdiv.default(p, p, p, value=0.5),
    lambda x, p: aten.remainder.Scalar(x, 0.7),
    lambda x, p: aten.fmod.Scalar(p, -0.7),
    lambda x, p: aten.atan2.default(p, x),
    lambda x, p: aten.pow.Tensor_Scalar(x, 2),
    lambda x, p: aten.pow.Tensor_Scalar(x, -4.0),
    lambda x, p: aten.pow.Tensor_Scalar(p, 0.7),
    lambda x, p: aten.pow.Tensor_Tensor(p, x),
    lambda x, p: aten.pow.Scalar(2, x),
    lambda x, p: aten.maximum.default(x, p),
    lambda x, p: aten.max.other(p, x),
    lambda x, p: aten.fmax.default(x, p),
    lambda x, p: aten.minimum.default(p, p),
    lambda x, p: aten.min.other(p, p),
    lambda x, p: aten.fmin.default(p, p),
    lambda x, p: aten.clamp.default(x, 0, 1),
    lambda x, p: aten.clamp.default(p, None, 1),
    lambda x, p: aten.clamp.default(p, -1, 1),
    lambda x, p: aten.clamp.default(x, min=0.5),
    lambda x, p: aten.clamp.Tensor(x, p),
    lambda x, p: aten.clamp.Tensor(p, x, p),
    lambda x, p: aten.clip.default(x, 0),
    lambda x, p: aten.clamp_min.default(x, 0),
    lambda x, p: aten.clamp_min.Tensor(p, x),
    lambda x, p: aten.clamp_max.default(p, 0.5),
    lambda x, p: aten.clamp_max.Tensor(p, p),
    lambda x, p: aten.hardtanh.default(x, 0, 6),
    lambda x, p: aten.where.self(aten.gt.Scalar(x, 0), p, p),
    lambda x, p: aten.masked_fill.Scalar(p, aten.gt.Scalar(x, 0), 0.5),
    lambda x, p: aten.copy.default(x, p),
    lambda x, p: aten.fill.Scalar(x, 0.5),
    # functions that keep the sign
    *(
        (lambda x, p, f=f: f(p))  # type: ignore[misc]
        for f in (
            *(aten.silu.default, aten.mish.default, aten.hardswish.default, aten.gelu.default, aten.celu.default),
            *(aten.selu.default, aten.leaky_relu.default, aten.elu.default, aten.tanh.default, aten.sinh.default),
            *(aten.asinh.default, aten.atan.default, aten.erf.default, aten.expm1.default, aten.log1p.default),
            *(aten.ceil.default, aten.floor.default, aten.round.default, aten.trunc.default, aten.frac.default),
            *(aten.sign.default, aten.sgn.default, aten.reciprocal.default, aten.hardshrink.default),
            *(aten.softshrink.default, aten.nan_to_num.default, aten.clone.default, aten.contiguous.default),
            *(aten.tril.default, aten.triu.default, aten.mT.default, aten.adjoint.default, aten.positive.default),
            *(aten.mean.default, aten.sum.default),
        )
    ),
    lambda x, p: aten.asin.default(aten.sigmoid.default(x)),
    lambda x, p: aten.atanh.default(aten.sigmoid.default(x)),
    lambda x, p: aten.prelu.default(p, created(x, aten.full.default, [1], -0.3)),
    lambda x, p: aten.threshold.default(p, -1, 0.5),
    lambda x, p: aten.t.default(matrix(p)),
    lambda x, p: aten.numpy_T.default(matrix(p)),
    lambda x, p: aten.dropout.default(p, 0.5, False),
    lambda x, p: aten.feature_dropout.default(p, 0.5, False),
    lambda x, p: first(aten.native_dropout.default(p, 0.5, False)),
    lambda x, p: aten.to.dtype(p, torch.float64),
    lambda x, p: aten._to_copy.default(p, dtype=torch.float64),
    lambda x, p: aten.type_as.default(p, x),
    # reductions
    lambda x, p: aten.sum.dim_IntList(p, [1]),
    lambda x, p: aten.mean.dim(p, [1]),
    lambda x, p: aten.amax.default(p, [1]),
    lambda x, p: aten.amin.default(p, [1]),
    lambda x, p: aten.nansum.default(p, [1]),
    lambda x, p: aten.count_nonzero.dim_IntList(x, [1]),
    lambda x, p: aten.prod.dim_int(p, 1),
    lambda x, p: aten.prod.default(p),
    lambda x, p: aten.any.dim(x, 1),
    lambda x, p: aten.all.dims(x, [1, 2]),
    lambda x, p: aten.max.default(p),
    lambda x, p: aten.min.default(p),
    lambda x, p: aten.median.default(p),
    lambda x, p: aten.nanmedian.default(p),
    lambda x, p: first(aten.kthvalue.default(p, 2, 1)),
    lambda x, p: first(aten.cummax.default(p, 1)),
    lambda x, p: first(aten.cummin.default(p, 1)),
    lambda x, p: first(aten.max.dim(p, 1)),
    lambda x, p: first(aten.min.dim(p, 1)),
    lambda x, p: first(aten.topk.default(p, 2, 1)),
    lambda x, p: first(aten.sort.default(p, 1)),
    lambda x, p: aten.cumsum.default(p, 1),
    lambda x, p: aten.cumprod.default(p, 1),
    # products
    lambda x, p: aten.matmul.default(p, p),
    lambda x, p: aten.bmm.default(line(p), line(p)),
    lambda x, p: aten.mm.default(matrix(p), matrix(p)),
    lambda x, p: aten.mv.default(matrix(p), vector(p)),
    lambda x, p: aten.dot.default(vector(p), vector(p)),
    lambda x, p: aten.addmm.default(matrix(p), matrix(p), matrix(p), alpha=0.5),
    lambda x, p: aten.baddbmm.default(line(p), line(p), line(p)),
    lambda x, p: aten.einsum.default("abij,abjk->abik", [p, p]),
    lambda x, p: first(
        aten.rnn_relu.input(line(x), line(x)[:1], [matrix(x)] * 2, False, 1, 0.0, False, False, False)
    ),
    lambda x, p: aten.rnn_relu_cell.default(matrix(x), matrix(x), matrix(x), matrix(x)),
    lambda x, p: aten.scaled_dot_product_attention.default(x, x, p),
    # parts and wholes
    lambda x, p: aten.cat.default([p, p], 1),
    lambda x, p: aten.concat.default([p, p], 1),
    lambda x, p: aten.stack.default([p, p], 1),
    lambda x, p: first(aten.split_with_sizes.default(p, [1, 3], 1)),
    lambda x, p: first(aten.unbind.int(p, 1)),
    lambda x, p: first(aten.meshgrid.default([vector(p), vector(p)])),
    lambda x, p: aten.slice.Tensor(p, 1, 1, 3),
    lambda x, p: aten.select.int(p, 1, 1),
    lambda x, p: aten.slice_scatter.default(p, aten.slice.Tensor(p, 1, 0, 2), 1, 1, 3),
    lambda x, p: aten.select_scatter.default(p, aten.select.int(p, 1, 0), 1, 1),
    lambda x, p: aten.index.Tensor(p, [None, whole(vector(x))]),
    lambda x, p: aten._unsafe_index.Tensor(p, [None, whole(vector(x))]),
    lambda x, p: aten.index_select.default(p, 1, whole(vector(x))),
    lambda x, p: aten.index_copy.default(p, 3, created(p, aten.arange.default, 6), p),
    lambda x, p: aten.index_add.default(p, 3, created(p, aten.arange.default, 6), p, alpha=2),
    lambda x, p: aten.index_fill.int_Scalar(p, 1, whole(vector(x)), 0.5),
    lambda x, p: aten.index_put.default(p, [whole(vector(x))], p[:1], True),
    lambda x, p: aten.scatter.src(p, 1, whole(x), p),
    lambda x, p: aten.scatter_add.default(p, 1, whole(x), p),
    lambda x, p: aten.scatter_reduce.two(p, 1, whole(x), p, "prod"),
    lambda x, p: aten.gather.default(p, 1, whole(x)),
    lambda x, p: aten.take_along_dim.default(p, whole(x), 1),
    lambda x, p: aten.embedding.default(matrix(p), whole(x)),
    lambda x, p: aten.flip.default(p, [1]),
    lambda x, p: aten.rot90.default(p, 1, [2, 3]),
    lambda x, p: aten.diagonal.default(p, 0, 2, 3),
    lambda x, p: aten.roll.default(p, [1], [1]),
    lambda x, p: aten.constant_pad_nd.default(p, [1, 1]),
    lambda x, p: aten.constant_pad_nd.default(p, [1, 1], 0.5),
    lambda x, p: aten.pad.default(p, [1, 1]),
    lambda x, p: aten.pad.default(p, [1, 1, 1, 1], "reflect"),
    lambda x, p: aten.glu.default(aten.cat.default([p, p], 1), 1),
    # reshaping
    lambda x, p: aten.view.default(p, [8, 36]),
    lambda x, p: aten.reshape.default(p, [8, 36]),
    lambda x, p: aten._unsafe_view.default(p, [8, 36]),
    lambda x, p: aten._reshape_alias.default(p, [8, 36], [36, 1]),
    lambda x, p: aten.view_copy.default(p, [8, 36]),
    lambda x, p: aten.flatten.using_ints(p),
    lambda x, p: aten.squeeze.default(p),
    lambda x, p: aten.unsqueeze.default(p, 1),
    lambda x, p: aten.unflatten.int(p, 1, [2, 2]),
    lambda x, p: aten.permute.default(p, [0, 2, 3, 1]),
    lambda x, p: aten.transpose.int(p, 1, 2),
    lambda x, p: aten.swapaxes.default(p, 1, 2),
    lambda x, p: aten.swapdims.default(p, 1, 2),
    lambda x, p: aten.movedim.int(p, 1, 2),
    lambda x, p: aten.expand.default(p, [3, -1, -1, -1, -1]),
    lambda x, p: aten.broadcast_to.default(p, [3, 2, 4, 6, 6]),
    lambda x, p: aten.expand_as.default(p, x),
    lambda x, p: aten.view_as.default(p, x),
    lambda x, p: aten.reshape_as.default(p, x),
    lambda x, p: aten.repeat.default(p, [1, 2, 1, 1]),
    lambda x, p: aten.tile.default(p, [1, 2, 1, 1]),
    lambda x, p: aten.repeat_interleave.self_int(p, 2, 1),
    lambda x, p: aten.pixel_shuffle.default(p, 2),
    lambda x, p: aten.pixel_unshuffle.default(p, 2),
    lambda x, p: aten.channel_shuffle.default(p, 2),
    # space
    lambda x, p: aten.max_pool1d.default(line(p), [2], [1], [1]),
    lambda x, p: aten.max_pool2d.default(p, [2, 2], [1, 1], [1, 1]),
    lambda x, p: aten.max_pool3d.default(p, [2, 2, 2], [1, 1, 1], [1, 1, 1]),
    lambda x, p: first(aten.max_pool2d_with_indices.default(p, [2, 2])),
    lambda x, p: first(aten.max_pool3d_with_indices.default(p, [1, 2, 2])),
    lambda x, p: first(aten.adaptive_max_pool3d.default(p, [2, 2, 2])),
    lambda x, p: aten.max_unpool2d.default(p, whole(x), [7, 7]),
    lambda x, p: aten.max_unpool3d.default(p, whole(x), [4, 7, 7], [1, 1, 1], [0, 0, 0]),
    lambda x, p: first(aten.adaptive_max_pool1d.default(line(p), [2])),
    lambda x, p: first(aten.adaptive_max_pool2d.default(p, [2, 2])),
    lambda x, p: aten.avg_pool1d.default(line(p), [2]),
    lambda x, p: aten.avg_pool2d.default(p, [3, 3], [1, 1], [1, 1]),
    lambda x, p: aten.avg_pool3d.default(p, [2, 2, 2]),
    lambda x, p: aten.adaptive_avg_pool1d.default(line(p), [4]),
    lambda x, p: aten.adaptive_avg_pool2d.default(p, [4, 4]),
    lambda x, p: aten._adaptive_avg_pool2d.default(p, [4, 4]),
    lambda x, p: aten.adaptive_avg_pool3d.default(p, [2, 4, 4]),
    lambda x, p: aten.upsample_nearest1d.default(line(p), [9]),
    lambda x, p: aten.upsample_nearest2d.vec(p, [9, 9], None),
    lambda x, p: aten.upsample_nearest2d.default(p, [9, 9]),
    lambda x, p: aten.upsample_nearest3d.default(aten.unsqueeze.default(p, 0), [4, 9, 9]),
    lambda x, p: aten._upsample_nearest_exact1d.default(line(p), [9]),
    lambda x, p: aten._upsample_nearest_exact2d.default(p, [9, 9]),
    lambda x, p: aten._upsample_nearest_exact3d.default(aten.unsqueeze.default(p, 0), [4, 9, 9]),
    lambda x, p: aten.upsample_linear1d.default(line(p), [9], True),
    lambda x, p: aten.upsample_bilinear2d.default(p, [9, 9], True),
    lambda x, p: aten._upsample_bilinear2d_aa.default(p, [4, 4], False),
    lambda x, p: aten.upsample_trilinear3d.default(aten.unsqueeze.default(p, 0), [7, 9, 9], False),
    lambda x, p: aten.grid_sampler.default(p, grid(x), 0, 0, False),
    lambda x, p: aten.reflection_pad1d.default(line(p), [1, 1]),
    lambda x, p: aten.reflection_pad2d.default(p, [1, 1, 1, 1]),
    lambda x, p: aten.reflection_pad3d.default(p, [1, 1, 1, 1, 1, 1]),
    lambda x, p: aten.replication_pad1d.default(line(p), [1, 1]),
    lambda x, p: aten.replication_pad2d.default(p, [1, 1, 1, 1]),
    lambda x, p: aten.replication_pad3d.default(p, [1, 1, 1, 1, 1, 1]),
    lambda x, p: aten.im2col.default(p, [2, 2], [1, 1], [1, 1], [2, 2]),
    lambda x, p: aten.col2im.default(line(p), [3, 2], [1, 1], [1, 1], [0, 0], [1, 1]),
    lambda x, p: aten.unfold.default(p, 2, 2, 1),
    # comparisons
    *(
        (lambda x, p, f=f: f(x, 0.1))  # type: ignore[misc]
        for f in (aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar)
    ),
    *(
        (lambda x, p, f=f: f(x, p))  # type: ignore[misc]
        for f in (aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default)
    ),
    lambda x, p: aten.logical_not.default(x),
]  # fmt: skip

# Results that go below zero, by a hair's breadth from what is claimed above.
NEGATIVE: list[Case] = [
    lambda x, p: aten.relu.default(x) - 1,
    lambda x, p: aten.add.Tensor(p, -0.5),
    lambda x, p: aten.add.Tensor(p, p, alpha=-2),
    lambda x, p: aten.add.Tensor(p, 2, alpha=-1),
    lambda x, p: aten.add.Scalar(p, 2, -1),
    lambda x, p: aten.sub.Tensor(p, 0.5),
    lambda x, p: aten.sub.Tensor(p, 2, alpha=3),
    lambda x, p: aten.rsub.Scalar(p, 0.5),
    lambda x, p: aten.mul.Tensor(p, -2),
    lambda x, p: aten.mul.Tensor(p, x),
    lambda x, p: aten.div.Tensor(p, -2),
    lambda x, p: aten.div.Tensor_mode(p, -2, rounding_mode="trunc"),
    lambda x, p: aten.addcmul.default(p, p, p, value=-2),
    lambda x, p: aten.addcdiv.default(p, p, p, value=-2),
    lambda x, p: aten.remainder.Scalar(p, -0.7),
    lambda x, p: aten.fmod.Scalar(x, 0.7),
    lambda x, p: aten.pow.Tensor_Scalar(x, 3),
    lambda x, p: aten.lerp.Scalar(x, p, 0.3),
    lambda x, p: aten.pow.Scalar(-2, aten.ceil.default(p)),
    lambda x, p: aten.maximum.default(x, aten.neg.default(p)),
    lambda x, p: aten.minimum.default(p, x),
    lambda x, p: aten.clamp.default(x, -1, 1),
    lambda x, p: aten.clamp.default(x, None, 1),
    lambda x, p: aten.clamp.default(p, None, -1),
    lambda x, p: aten.clamp.default(x, 0, -1),
    lambda x, p: aten.clamp.Tensor(p, None, x),
    lambda x, p: aten.clamp_min.Tensor(x, x),
    lambda x, p: aten.clamp_max.default(p, -1),
    lambda x, p: aten.hardtanh.default(x),
    lambda x, p: aten.where.self(aten.gt.Scalar(x, 0), p, x),
    lambda x, p: aten.where.ScalarOther(aten.gt.Scalar(x, 0), p, -1),
    lambda x, p: aten.masked_fill.Scalar(p, aten.gt.Scalar(x, 0), -1),
    lambda x, p: aten.softplus.default(x, -1),
    lambda x, p: aten.softplus.default(x, 1, -9),
    lambda x, p: aten.elu.default(p, 1, -1),
    lambda x, p: aten.threshold.default(p, 1, -1),
    lambda x, p: aten.to.dtype(aten.mul.Tensor(p, 200), torch.int8),
    lambda x, p: aten.log_softmax.int(p, 1),
    lambda x, p: aten.logsumexp.default(aten.mul.Tensor(p, -9), [1]),
    lambda x, p: aten.fmax.default(x, aten.neg.default(p)),
    lambda x, p: aten.scatter.value(p, 1, whole(x), -0.5),
    lambda x, p: aten.index_fill.int_Scalar(p, 1, whole(vector(x)), -0.5),
    lambda x, p: aten.index_put.default(p, [whole(vector(x))], x[:1]),
    lambda x, p: aten.logcumsumexp.default(aten.mul.Tensor(p, -9), 1),
    lambda x, p: aten.clip.default(x, -1),
    lambda x, p: aten.true_divide.Tensor(p, -2),
    lambda x, p: aten.asin.default(aten.tanh.default(x)),
    lambda x, p: aten.atanh.default(aten.tanh.default(x)),
    lambda x, p: aten.prelu.default(x, created(x, aten.full.default, [1], 0.3)),
    lambda x, p: aten.dot.default(vector(p), vector(aten.neg.default(p))),
    lambda x, p: aten.fill.Scalar(p, -0.5),
    lambda x, p: aten.full_like.default(p, -0.5),
    lambda x, p: aten.new_full.default(p, [2], -0.5),
    lambda x, p: created(x, aten.scalar_tensor.default, -0.5),
    lambda x, p: aten.silu.default(x),
    lambda x, p: aten.gelu.default(x),
    lambda x, p: aten.hardswish.default(x),
    lambda x, p: aten.log_sigmoid.default(x),
    lambda x, p: aten.sin.default(p * 9),
    lambda x, p: created(x, aten.full.default, [2], -0.5),
    lambda x, p: created(x, aten.arange.start, -3, 3),
    lambda x, p: created(x, aten.linspace.default, 1, -1, 9),
    lambda x, p: aten.addmm.default(matrix(p), matrix(p), matrix(p), alpha=-2),
    lambda x, p: aten.cat.default([p, x], 1),
    lambda x, p: aten.constant_pad_nd.default(p, [1, 1], -0.5),
    lambda x, p: aten.pad.default(p, [1, 1], "constant", -0.5),
    lambda x, p: aten.avg_pool2d.default(p, [2, 2], [2, 2], [0, 0], False, True, -4),
    lambda x, p: aten.upsample_bicubic2d.default(p, [15, 15], False),
    lambda x, p: aten._upsample_bicubic2d_aa.default(p, [9, 9], False),
    lambda x, p: aten.grid_sampler.default(p, grid(x), 2, 0, False),
    lambda x, p: aten.layer_norm.default(p, [6]),
    lambda x, p: first(aten.var_mean.correction(x)) - 9,
]  # fmt: skip
