"""From values to a quantiser's range: the largest value, a percentile, or the least squared error.

In: a weight, or a running histogram of an activation's absolute values; the grid it will be rounded to. Out: a *top*,
the value that the outermost level stands for, from which range = top * divisor / high (`superbit.level`).
Holds: the top of least error never has a larger error than the largest value as top; a histogram's memory is bounded,
and its counts stay exact while its range grows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.quantizer.superbit import SuperBitQuantizer, level

BINS = 4096
LEAST_TOP = 2.0**-30  # reason: a tensor of values this small is zero to every later layer
_CHUNK = 1 << 20  # values that are counted at a time
_BLOCK = 1 << 17  # values whose error is computed at a time, so that they stay in the cache
_SAMPLES = 1 << 18  # values of a weight that the search for a top looks at, but at least _CHANNEL_SAMPLES a channel
_CHANNEL_SAMPLES = 512

# Shares of the largest value that are tried as top, then those around the best of them.
_COARSE = tuple(0.85**k for k in range(29))
_FINE = tuple(0.85 ** (k / 4) for k in (-3, -2, -1, 1, 2, 3))
_HOPELESS = 4.0  # reason: past the best share the error only grows; this far past, nothing better is met

Grid = tuple[Tensor, Tensor, Tensor]  # low, high, divisor, each (channels,) or (1,)


def grid_of(gate: SuperBitQuantizer) -> Grid:
    """The grid a gate rounds to: that of its fixed bits; searching, that of its middle candidate below float."""
    searched = [bits for bits in gate.candidates if bits != FLOAT_BITS]
    bits = searched[len(searched) // 2] if gate.bits is None else gate.bits
    each = bits.tolist() if isinstance(bits, Tensor) else [bits]
    low, high, divisor = torch.tensor([level(b, gate.signed) for b in each], device=gate.range.device).T
    return low, high, divisor


def set_range(gate: SuperBitQuantizer, top: Tensor) -> None:
    """Make the outermost level of a gate's grid stand for `top`, (channels,) or (1,). A top of zero becomes 1, so that
    a tensor of zeros is as good a zero as any."""
    _, high, divisor = grid_of(gate)  # high is 0 in a channel of 0 bits, whose range means nothing
    top = torch.where(top > 0, top.clamp_min(LEAST_TOP), torch.ones_like(top))
    with torch.no_grad():
        gate.range.copy_((top * (divisor / high.clamp_min(1))).view(gate.range.shape))


def weight_top(weight: Tensor, gate: SuperBitQuantizer, method: str) -> Tensor:
    """Tops of a weight, one a channel: the largest absolute value ("minmax") or, for every other method, least error.

    Of a large weight the error is minimised over values taken at even distances; the result is then compared with the
    largest value over all of them, channel by channel, and the better one is taken.
    """
    rows = weight.detach().to(torch.float32)
    if not weight.numel():
        return rows.new_zeros(1 if gate.channels is None else gate.channels)
    if gate.channels is None:
        rows = rows.reshape(1, -1)
    else:
        rows = rows.movedim(gate.channel_dim, 0).reshape(gate.channels, -1)
    low, high = rows.aminmax(dim=1)
    largest = torch.maximum(-low, high)
    if method == "minmax":
        return largest
    grid = grid_of(gate)
    count = rows.shape[1]
    samples = max(_CHANNEL_SAMPLES, _SAMPLES // len(rows))
    if count <= samples:
        return best_top(rows, largest, grid)
    chosen = torch.linspace(0, count - 1, samples, dtype=torch.float64, device=rows.device).round().long()
    top = best_top(rows[:, chosen], largest, grid)
    better = squared_error(rows, top, grid) <= squared_error(rows, largest, grid)
    return torch.where(better, top, largest)


def best_top(values: Tensor, largest: Tensor, grid: Grid, weights: Tensor | None = None) -> Tensor:
    """The top of least squared error among shares of `largest`, from 1 to 0.01.

    Args:
        values: (channels, n). largest: (channels,). weights: (n,), how often each value counts; None: once.
    """
    best, error = largest, squared_error(values, largest, grid, weights)
    for shares in (_COARSE[1:], _FINE):
        centre = largest if shares is not _FINE else best
        for share in shares:
            top = torch.minimum(centre * share, largest)
            new_error = squared_error(values, top, grid, weights)
            best, error = torch.where(new_error < error, top, best), torch.minimum(new_error, error)
            if shares is not _FINE and bool((new_error > _HOPELESS * error).all()):
                break
    return best


def squared_error(values: Tensor, top: Tensor, grid: Grid, weights: Tensor | None = None) -> Tensor:
    """Sum of squared rounding and clipping errors, shape (channels,), of values (channels, n) on a grid whose outermost
    level stands for top (channels,); (n,) `weights` as in `best_top`."""
    scale = (top.clamp_min(LEAST_TOP) / grid[1].clamp_min(1))[:, None]
    low, high = (bound.expand(len(scale))[:, None] for bound in grid[:2])
    alike = len(grid[1]) == 1  # reason: numbers as bounds are four times as fast as tensors
    rows = max(1, _BLOCK // values.shape[1])
    errors = []
    for part, s, lo, hi in zip(*(t.split(rows) for t in (values, scale, low, high)), strict=True):
        code = (part / s).round_()
        code = code.clamp_(float(lo[0]), float(hi[0])) if alike else torch.minimum(torch.maximum(code, lo), hi)
        error = code.mul_(s).sub_(part).square_()
        errors.append(error.sum(1) if weights is None else error.to(weights.dtype) @ weights)
    return torch.cat(errors)


class Histogram:
    """Running histogram of absolute values, in `BINS` bins of one width from 0 on, and zeros apart.

    A value beyond the last bin doubles the width, which merges neighbouring bins, until it fits. Grids are symmetric
    around zero or begin there, so the sign does not matter.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.zeros, self.largest, self.width = 0.0, 0.0, 0.0

    def add(self, x: Tensor, weights: Tensor | None = None) -> bool:
        """Count the values of a tensor, each once or by its weight (of x's shape). False, and nothing counted, if there
        is a NaN or Inf among them."""
        if not x.numel():
            return True
        low, high = (float(bound) for bound in x.detach().aminmax())
        largest = max(-low, high)
        if not math.isfinite(low) or not math.isfinite(high):
            return False
        self.largest = max(self.largest, largest)
        self._grow()
        parts = x.detach().reshape(-1).split(_CHUNK)
        counted = [None] * len(parts) if weights is None else weights.double().reshape(-1).split(_CHUNK)
        for part, weight in zip(parts, counted, strict=True):
            self._count(part, weight)
        return True

    def _grow(self) -> None:
        if not self.width and self.largest > LEAST_TOP:
            self.width = self.largest / BINS
        if not self.width:
            return  # reason: so far all values are as good as zero
        while self.width * BINS < self.largest:
            self.width *= 2
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])

    def _count(self, x: Tensor, weights: Tensor | None) -> None:
        x = x.abs() if x.element_size() >= 4 else x.float().abs()
        zero = x == 0
        zeros = float(zero.sum() if weights is None else weights[zero].sum())
        self.zeros += zeros
        if self.width:
            place = x.mul(1 / self.width).to(torch.int32).clamp_max_(BINS - 1)
            self.counts += torch.bincount(place, weights, minlength=BINS).to(self.counts)
            self.counts[0] -= zeros

    def percentile(self, percent: float) -> float:
        """The value that `percent` of all absolute values do not exceed, to the width of a bin; 100: the largest."""
        below = self.zeros + self.counts.cumsum(0)
        count = percent / 100 * float(below[-1])
        if percent >= 100 or not self.width:
            return self.largest
        place = int(torch.searchsorted(below, torch.tensor(count, dtype=torch.float64)))
        return min((min(place, BINS - 1) + 1) * self.width, self.largest)

    def top(self, gate: SuperBitQuantizer, method: str, percentile: float) -> Tensor:
        """Top for a gate, shape (1,)."""
        largest = torch.tensor([self.largest])
        if method == "percentile":
            return torch.tensor([self.percentile(percentile)])
        if method == "minmax" or not self.largest:
            return largest
        # reason: only bins that hold anything can err, and a short tail of them is all that most tensors have
        used = self.counts.nonzero()[:, 0]
        values = torch.cat([torch.zeros(1), ((used + 0.5) * self.width).to(torch.float32).clamp_max(self.largest)])
        weights = torch.cat([torch.tensor([self.zeros], dtype=torch.float64), self.counts[used]])
        low, high, divisor = (bound.cpu() for bound in grid_of(gate))
        return best_top(values[None], largest, (low, high, divisor), weights)
