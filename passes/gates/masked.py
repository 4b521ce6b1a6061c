"""Masked forms of operators that compute a statistic over channel axes.

In: a tensor and a 0/1 mask per masked dimension. Out: what the operator would give if the masked-out coordinates did
not exist; their own positions in the output are arbitrary. With every mask open the original operator is called, so
an open graph stays bitwise the traced one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.dialects import masked_operator

aten = torch.ops.aten
Recipe = tuple[Any, ...]


def recipe(dim: Dim, order: dict[Axis, int]) -> Recipe:
    """A type as plain data, to sit among a node's arguments; its axes are numbered in `order`, which grows."""
    dim = d.resolve(dim)
    if isinstance(dim, d.Const):
        return ("const", dim.size)
    if isinstance(dim, Axis):
        return ("axis", order.setdefault(dim, len(order)))
    parts = dim.items if isinstance(dim, d.Sum) else dim.factors
    return ("sum" if isinstance(dim, d.Sum) else "prod", *(recipe(p, order) for p in parts))


@masked_operator
def dim_mask(recipe: Recipe, *masks: Tensor) -> Tensor:
    """The mask of a whole dimension, shape (size,), from the masks of its axes."""
    kind, *rest = recipe
    if kind == "const":
        return masks[0].new_ones(rest[0])
    if kind == "axis":
        return masks[rest[0]]
    parts = [dim_mask(r, *masks) for r in rest]
    if kind == "sum":
        return torch.cat(parts)
    result = parts[0]
    for part in parts[1:]:
        result = (result[:, None] * part[None, :]).flatten()
    return result


def along(vector: Tensor, dim: int, x: Tensor) -> Tensor:
    """A vector of shape (n,) viewed so that it broadcasts along dimension `dim` of x.

    Types have a stand-in for the number of images, larger than it: where images times channels are one dimension, the
    vector says the same of each image.
    """
    if len(vector) > x.shape[dim]:
        vector = vector[: x.shape[dim]]
    return vector.view([-1 if i == dim else 1 for i in range(x.ndim)])


def is_open(mask: Tensor) -> bool:
    """Whether a fixed mask keeps everything. What it would act on is then passed on as the same object: even a product
    with ones is no parameter any more, and `matmul` takes another path, with other rounding, where a gradient is due.
    """
    return not mask.requires_grad and bool(mask.all())


@masked_operator
def silence(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """x with the masked-out coordinates of `dim` set to zero; x itself if there are none."""
    if is_open(mask):
        return x
    return x * along(mask, dim, x).to(x.dtype)


@masked_operator
def exclude(x: Tensor, mask: Tensor, dim: int, value: float) -> Tensor:
    """x with the masked-out coordinates of `dim` set to `value` (-inf before a softmax or a maximum)."""
    if is_open(mask):
        return x
    return x.masked_fill(along(mask, dim, x) == 0, value)


@masked_operator
def moments(target: Callable[..., Any], dims: Sequence[int], masks: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """Run a mean, variance or normalisation over the live coordinates of its first argument only."""
    x = args[0]
    if all(is_open(m) for m in masks):
        return target(*args, **kwargs)
    live = torch.ones([1] * x.ndim, dtype=x.dtype, device=x.device)
    for dim, mask in zip(dims, masks, strict=True):
        live = live * along(mask, dim, x).to(x.dtype)
    # reason: what these steps would keep for the backward pass is several times their input, an operator's own nothing
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(_MOMENTS[target], live, *args, **options, **kwargs)


def _mean(live: Tensor, x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean over live coordinates with kept dimensions, and their number."""
    dims = [i % x.ndim for i in dims]
    count = live.sum(list(dims), keepdim=True) * math.prod(x.shape[i] for i in dims if live.shape[i] == 1)
    count = count.clamp_min(1)
    return (x * live).sum(dims, keepdim=True) / count, count


def _variance(live: Tensor, x: Tensor, dims: Sequence[int], correction: float) -> tuple[Tensor, Tensor]:
    mean, count = _mean(live, x, dims)
    squares = ((x - mean).square() * live).sum([i % x.ndim for i in dims], keepdim=True)
    return squares / (count - correction), mean


def _squeeze(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return x if keepdim else x.squeeze(tuple(i % x.ndim for i in dims))


def _dims(x: Tensor, dims: Any) -> list[int]:
    return list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)


def _mean_dim(live: Tensor, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    over = _dims(x, dims)
    return _squeeze(_mean(live, x, over)[0], over, keepdim)


def _var(live: Tensor, x: Tensor, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    over = _dims(x, dims)
    return _squeeze(_variance(live, x, over, 1 if correction is None else correction)[0], over, keepdim)


def _var_unbiased(live: Tensor, x: Tensor, dims: Any, unbiased: bool = True, keepdim: bool = False) -> Tensor:
    return _var(live, x, dims, correction=int(unbiased), keepdim=keepdim)


def _std(live: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _var(live, *args, **kwargs).sqrt()


def _std_unbiased(live: Tensor, *args: Any) -> Tensor:
    return _var_unbiased(live, *args).sqrt()


def _var_mean(
    live: Tensor, x: Tensor, dims: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return _var(live, x, dims, correction=correction, keepdim=keepdim), _mean_dim(live, x, dims, keepdim)


def _std_mean(live: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    variance, mean = _var_mean(live, x, *args, **kwargs)
    return variance.sqrt(), mean


def _var_all(live: Tensor, x: Tensor, unbiased: bool = True) -> Tensor:
    return _var(live, x, None, correction=int(unbiased))


def _std_all(live: Tensor, x: Tensor, unbiased: bool = True) -> Tensor:
    return _var_all(live, x, unbiased).sqrt()


def _var_mean_unbiased(
    live: Tensor, x: Tensor, dims: Any, unbiased: bool = True, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return _var_mean(live, x, dims, correction=int(unbiased), keepdim=keepdim)


def _std_mean_unbiased(live: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    variance, mean = _var_mean_unbiased(live, *args)
    return variance.sqrt(), mean


def _log_softmax(live: Tensor, x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    return x - x.masked_fill(live == 0, float("-inf")).logsumexp(dim, keepdim=True)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    live: Tensor,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    _cudnn: bool = True,
) -> Tensor:
    variance, mean = _variance(live, x, range(-len(shape), 0), 0)
    return _affine((x - mean) * torch.rsqrt(variance + eps), weight, bias)


def _rms_norm(live: Tensor, x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x * torch.rsqrt(_mean(live, x.square(), range(-len(shape), 0))[0] + eps), weight, None)


def _group_norm(
    live: Tensor, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, _cudnn: bool = True
) -> Tensor:
    grouped = x.unflatten(1, (groups, -1))
    live = live.unflatten(1, (groups, -1))
    variance, mean = _variance(live, grouped, range(2, grouped.ndim), 0)
    normal = ((grouped - mean) * torch.rsqrt(variance + eps)).flatten(1, 2)
    return _affine(normal, *(None if p is None else along(p, 1, x) for p in (weight, bias)))


def _batch_norm(
    live: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    _mean_: Any,
    _var_: Any,
    _training: bool,
    _momentum: float,
    eps: float,
    _cudnn: bool,
) -> Tensor:
    variance, mean = _variance(live, x, [0, *range(2, x.ndim)], 0)
    normal = (x - mean) * torch.rsqrt(variance + eps)
    return _affine(normal, *(None if p is None else along(p, 1, x) for p in (weight, bias)))


_MOMENTS: dict[Any, Callable[..., Any]] = {
    aten.mean.dim: _mean_dim,
    aten.mean.default: _mean_dim,
    aten.var.correction: _var,
    aten.var.dim: _var_unbiased,
    aten.std.correction: _std,
    aten.std.dim: _std_unbiased,
    aten.var_mean.correction: _var_mean,
    aten.std_mean.correction: _std_mean,
    aten.var.default: _var_all,
    aten.std.default: _std_all,
    aten.var_mean.dim: _var_mean_unbiased,
    aten.std_mean.dim: _std_mean_unbiased,
    aten.log_softmax.int: _log_softmax,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.batch_norm.default: _batch_norm,
}
