"""A layer as a product of matrices: y = W x + bias at some places of each image.

In: a convolution, plain or transposed, of any number of dimensions and groups, or a linear; what it reads and gives.
Out: its weight as rows (groups, outputs, columns), what it reads as columns (groups, columns, samples), what it gives
as (groups, outputs, samples). Holds: rows @ columns is what the layer gives at these places, without its bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sbs_fx.passes.folding import CONVOLUTIONS, TRANSPOSED
from sbs_fx.passes.static.fold import GROUPS

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """
    Attributes:
        groups: of channels that are multiplied apart from each other.
        shape: of the weight.
        stride, padding, dilation: of a convolution, one number a dimension; padding is (before, after). Empty: linear.
        stuffed: a transposed convolution, as the plain one it is of an input with zeros between its values: how far
            apart they are.
    """

    groups: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    stuffed: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: fx.Node, weight: Tensor) -> Product | None:
        """The product that a node is; None if it is none, or of a form that is not known."""
        shape = tuple(weight.shape)
        if layer.target is aten.linear.default:
            return cls(1, shape)
        if layer.target not in CONVOLUTIONS | TRANSPOSED:
            return None
        rank = len(shape) - 2
        if layer.args[0].meta["val"].ndim != rank + 2:  # type: ignore[union-attr]
            return None
        groups, args = int(layer.args[GROUPS]), layer.args  # type: ignore[arg-type]
        if layer.target in TRANSPOSED:
            stride, padding, more, _, dilation = (_each(a, rank) for a in (*args[3:6], 1, args[7]))
            reach = [d * (k - 1) - p for d, k, p in zip(dilation, shape[2:], padding, strict=True)]
            around = tuple((r, r + m) for r, m in zip(reach, more, strict=True))
            return cls(groups, shape, (1,) * rank, around, dilation, stride)
        stride, dilation = _each(args[3], rank), _each(args[5], rank)
        reach = [d * (k - 1) for d, k in zip(dilation, shape[2:], strict=True)]
        if isinstance(args[4], str):
            around = tuple((r // 2, r - r // 2) if args[4] == "same" else (0, 0) for r in reach)
        else:
            around = tuple((p, p) for p in _each(args[4], rank))
        return cls(groups, shape, stride, around, dilation)

    @property
    def is_linear(self) -> bool:
        return not self.stride

    @property
    def width(self) -> int:
        """How many columns there are in a group."""
        outputs = self.shape[1] if self.stuffed else self.shape[0] // self.groups
        return math.prod(self.shape) // max(1, self.groups * outputs)

    # -- weights -------------------------------------------------------------------------------------------------------

    def rows(self, weight: Tensor) -> Tensor:
        """(groups, outputs of a group, columns)."""
        if self.stuffed:
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flip(tuple(range(3, weight.ndim + 1)))
            return weight.flatten(3).flatten(2)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, rows: Tensor) -> Tensor:
        """The weight of given rows, of the layer's own shape."""
        if self.stuffed:
            rows = rows.unflatten(2, (-1, *self.shape[2:]))
            return rows.flip(tuple(range(3, rows.ndim))).transpose(1, 2).reshape(self.shape)
        return rows.reshape(self.shape)

    # -- samples -------------------------------------------------------------------------------------------------------

    def places(self, given: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """At most `count` random places of what the layer gives, the same for all images, as flat positions."""
        positions = math.prod(given.shape[1:-1] if self.is_linear else given.shape[2:])
        if positions <= count:
            return torch.arange(positions, device=given.device)
        return torch.randperm(positions, generator=generator)[:count].to(given.device)

    def outputs(self, given: Tensor, places: Tensor) -> Tensor:
        """What a layer gives, (groups, outputs of a group, samples), images first."""
        if self.is_linear:
            return _flat(given).index_select(1, places).flatten(0, 1).T[None]
        values = _taken(given, places).transpose(0, 1)
        return values.reshape(self.groups, -1, values.shape[1] * values.shape[2])

    def columns(self, read: Tensor, given: Sequence[int], places: Tensor) -> Tensor:
        """What a layer reads at places of what it gives, whose shape is `given`: (groups, columns, samples)."""
        if self.is_linear:
            return _flat(read).index_select(1, places).flatten(0, 1).T[None]
        if self.stuffed:
            read = _stuffed(read, self.stuffed)
        if any(side for sides in self.padding for side in sides):
            read = F.pad(read, [side for sides in reversed(self.padding) for side in sides])
        index = torch.zeros(len(places), 1, dtype=torch.long, device=places.device)
        at, sizes, kernel = places, list(given[2:]), self.shape[2:]
        for i in reversed(range(len(sizes))):
            step = math.prod(read.shape[3 + i :])
            place, at = at % sizes[i], at // sizes[i]
            taps = torch.arange(kernel[i], device=places.device) * (self.dilation[i] * step)
            index = (index[:, None, :] + taps[None, :, None]).flatten(1) + (place * self.stride[i] * step)[:, None]
        values = _taken(read, index.flatten()).unflatten(2, index.shape)  # (N, C, places, taps)
        return values.permute(1, 3, 0, 2).reshape(self.groups, -1, len(read) * len(places))


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * rank if len(values) == 1 else values)


def _flat(x: Tensor) -> Tensor:
    """(images, places, channels)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """(images, channels, places). Reason: taken from a matrix, it is four times as fast."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.movedim(1, -1).flatten(1, 2).index_select(1, places).mT
    return x.reshape(len(x) * x.shape[1], -1).index_select(1, places).unflatten(0, x.shape[:2])


def _stuffed(x: Tensor, stride: Sequence[int]) -> Tensor:
    """x with stride - 1 zeros between its values."""
    if all(s == 1 for s in stride):
        return x
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    result = x.new_zeros(*x.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, s) for s in stride))
    result[places] = x
    return result
