"""From values to a quantiser's range: the largest value, a percentile, or the least squared error.

In: a weight, or a running histogram of an activation; the grid it will be rounded to. Out: a *top*, the value that the
outermost level stands for, from which range = top * divisor / high (`grid.level`); of an affine grid, both ends.
Holds: the top of least error never has a larger error than the largest value as top; a histogram's memory is bounded,
and its counts stay exact while its range grows.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.quantizer.grid import level
from sbs_fx.quantizer.superbit import SuperBitQuantizer

BINS = 4096
SAMPLED = 1 << 17  # values of an activation that are counted in a batch; its ends are those of all
LEAST_TOP = 2.0**-30  # reason: a tensor of values this small is zero to every later layer
_CHUNK = 1 << 20  # values that are counted at a time
_BLOCK = 1 << 17  # values whose error is computed at a time, so that they stay in the cache
_SAMPLES = 1 << 18  # values of a weight that the search for a top looks at, but at least _CHANNEL_SAMPLES a channel
_CHANNEL_SAMPLES = 512

# Shares of the largest value that are tried as top, then those around the best of them.
_COARSE = tuple(0.85**k for k in range(29))
_FINE = tuple(0.85 ** (k / 4) for k in (-3, -2, -1, 1, 2, 3))
_SIDES = 14  # shares of either side of an affine grid, down to an eighth
_ROUNDS = 4  # of moving one end after the other
_HOPELESS = 4.0  # reason: past the best share the error only grows; this far past, nothing better is met

Grid = tuple[Tensor, Tensor, Tensor]  # low, high, divisor, each (channels,) or (1,)


def grid_of(gate: SuperBitQuantizer) -> Grid:
    """The grid a gate rounds to: that of its fixed bits; searching, that of its middle candidate below float."""
    searched = [bits for bits in gate.candidates if bits != FLOAT_BITS]
    bits = searched[len(searched) // 2] if gate.bits is None else gate.bits
    each = bits.tolist() if isinstance(bits, Tensor) else [bits]
    low, high, divisor = torch.tensor([level(b, gate.signed, gate.below) for b in each], device=gate.range.device).T
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
        values: (channels, n). largest: (channels,). weights: (n,) or (channels, n), how often each value counts; None:
            once.
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
    level stands for top (channels,); `weights` as in `best_top`."""
    scale = (top.clamp_min(LEAST_TOP) / grid[1].clamp_min(1))[:, None]
    low, high = (bound.expand(len(scale))[:, None] for bound in grid[:2])
    alike = len(grid[1]) == 1  # reason: numbers as bounds are four times as fast as tensors
    rows = max(1, _BLOCK // values.shape[1])
    errors = []
    own = values if weights is None or weights.ndim == 1 else weights  # reason: something to split
    for part, s, lo, hi, each in zip(*(t.split(rows) for t in (values, scale, low, high, own)), strict=True):
        code = (part / s).round_()
        code = code.clamp_(float(lo[0]), float(hi[0])) if alike else torch.minimum(torch.maximum(code, lo), hi)
        error = code.mul_(s).sub_(part).square_()
        if weights is None:
            errors.append(error.sum(1))
        else:
            errors.append(error.to(weights.dtype) @ weights if weights.ndim == 1 else error.mul_(each).sum(1))
    return torch.cat(errors)


class Histogram:
    """Running histogram of values by sign, in `BINS` bins of one width from 0 on either side, and zeros apart.

    A value beyond the last bin doubles the width, which merges neighbouring bins, until it fits.

    Args:
        most: values that are counted of one tensor, about; None: all.

    Attributes:
        low, high: of all values, and zero.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.counts = torch.zeros(2, BINS, dtype=torch.float64)  # of values above zero, and below it
        self.zeros, self.low, self.high, self.width = 0.0, 0.0, 0.0, 0.0

    @property
    def largest(self) -> float:
        return max(-self.low, self.high)

    def add(self, x: Tensor, weights: Tensor | None = None) -> bool:
        """Count the values of a tensor, each once or by its weight (of x's shape). False, and nothing counted, if there
        is a NaN or Inf among them."""
        if not x.numel():
            return True
        low, high = float(x.detach().amin()), float(x.detach().amax())  # reason: both at once are five times as slow
        if not math.isfinite(low) or not math.isfinite(high):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow()
        if weights is None:  # reason: in the order of memory nothing is copied
            x = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
        values = x.detach().reshape(-1)
        if self.most is not None and weights is None:
            # reason: places an even number apart may all be of one column of an image
            values = values[:: max(1, len(values) // self.most) | 1]
        parts = values.split(_CHUNK)
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
            merged = self.counts.view(2, -1, 2).sum(2)
            self.counts = torch.cat([merged, torch.zeros_like(merged)], 1)

    def _count(self, x: Tensor, weights: Tensor | None) -> None:
        x = x if x.element_size() >= 4 else x.float()
        zero = x == 0
        zeros = float(zero.sum() if weights is None else weights[zero].sum())
        self.zeros += zeros
        if self.width:
            place = x.abs().mul_(1 / self.width).to(torch.int32).clamp_max_(BINS - 1)
            if self.low < 0:
                place = place.add_(x < 0, alpha=BINS)
            self.counts += torch.bincount(place, weights, minlength=2 * BINS).to(self.counts).view(2, BINS)
            self.counts[0, 0] -= zeros

    def percentile(self, percent: float) -> float:
        """The value that `percent` of all absolute values do not exceed, to the width of a bin; 100: the largest."""
        below = self.zeros + self.counts.sum(0).cumsum(0)
        count = percent / 100 * float(below[-1])
        if percent >= 100 or not self.width:
            return self.largest
        place = int(torch.searchsorted(below, torch.tensor(count, dtype=torch.float64)))
        return min((min(place, BINS - 1) + 1) * self.width, self.largest)

    def set_range(self, gate: SuperBitQuantizer, method: str, percentile: float) -> None:
        """The range of a gate, and how much of an affine one lies below zero; as `calibrate` says."""
        if gate.below is None or not self.width:
            set_range(gate, self._top(gate, method, percentile))
        else:
            gate.set_ends(*self._ends(gate, method, percentile))

    def _top(self, gate: SuperBitQuantizer, method: str, percentile: float) -> Tensor:
        """Top of a grid that is symmetric or begins at zero, shape (1,)."""
        largest = torch.tensor([self.largest])
        if method == "percentile":
            return torch.tensor([self.percentile(percentile)])
        if method == "minmax" or not self.largest:
            return largest
        values, weights = self._values(self.counts.sum(0))
        low, high, divisor = (bound.cpu() for bound in grid_of(gate))
        return best_top(values[None], largest, (low, high, divisor), weights)

    def _ends(self, gate: SuperBitQuantizer, method: str, percentile: float) -> tuple[float, float]:
        """Ends of an affine grid. Of least error: among shares of either side, then one moved after the other."""
        if method == "percentile":
            top = self.percentile(percentile)
            return max(self.low, -top), min(self.high, top)
        if method == "minmax":
            return self.low, self.high
        values, weights = self._values(self.counts)
        steps = int(grid_of(gate)[1] - grid_of(gate)[0])
        best = self.low, self.high, math.inf

        def attempt(low: float, high: float) -> bool:
            nonlocal best
            scale = (high - low) / steps
            zero = round(-low / scale)
            code = (values / scale).round_().clamp_(-zero, steps - zero)
            error = float(code.mul_(scale).sub_(values).square_().double() @ weights)
            if better := error < best[2]:
                best = low, high, error
            return better

        for below, above in itertools.product(_COARSE[:_SIDES], repeat=2):
            attempt(self.low * below, self.high * above)
        for _ in range(_ROUNDS):
            moved = False
            for factor in _FINE:
                low, high, _ = best
                moved |= attempt(max(low * factor, self.low), high)
                low, high, _ = best
                moved |= attempt(low, min(high * factor, self.high))
            if not moved:
                break
        return best[:2]

    def _values(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Middles of the bins that hold anything, and zero, and how much they hold."""
        # reason: only bins that hold anything can err, and a short tail of them is all that most tensors have
        rows = counts.view(-1, BINS)
        used = [row.nonzero()[:, 0] for row in rows]
        middles = [((u + 0.5) * self.width).to(torch.float32).clamp_max(self.largest) for u in used]
        values = [torch.zeros(1), *(m if i == 0 else -m for i, m in enumerate(middles))]
        held = [torch.tensor([self.zeros], dtype=torch.float64), *(r[u] for r, u in zip(rows, used, strict=True))]
        return torch.cat(values), torch.cat(held)
