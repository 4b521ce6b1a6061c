"""Pruning and rounding of weights that follow a Laplace density: errors and sizes in closed form.

In and out: plain numbers and arrays. f(w) = exp(-|w|/b)/(2b), and all is in units of b (threshold t stands for t b) or
of the second moment 2b^2 (errors), so that one table serves every layer.
Source: One-shot Pruning-Quantization (arXiv 2205.11141) fits this density to each layer and prunes and rounds by
Lagrange multipliers. Its equations were not at hand: all that follow are our derivation, and are tested as such.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # reason: not its parts, which take 37 MB: they load when they are read
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sbs_fx.quantizer.superbit import max_level

Array = NDArray[np.float64]

FARTHEST = 16.0  # threshold up to which choices are tabulated: one weight in 10 million is larger
_STEP, _KNOTS = 0.001, 400  # between tabulated thresholds; of the rounding error, which is smooth
_LOG_PRICE, _BISECTIONS = 100.0, 80
_GOLDEN = (5**0.5 - 1) / 2


def laplace_fit(weight: Tensor) -> float:
    """Second moment of the Laplace density of a tensor's mean magnitude b, 2b^2, over the tensor's own: 1 where the
    density fits, 0 if all is zero."""
    value = weight.detach().double()
    return float(2 * value.abs().mean().square() / value.square().mean().clamp_min(1e-300))


def pruned_share(threshold: ArrayLike) -> Array:
    """Share of weights with |w| <= t: 1 - exp(-t)."""
    return -np.expm1(-np.asarray(threshold, float))


def pruning_error(threshold: ArrayLike) -> Array:
    """Share of the second moment that pruning |w| <= t takes: E[w^2; |w| <= t] / 2 = 1 - (t^2/2 + t + 1) exp(-t)."""
    t = np.asarray(threshold, float)
    return 1 - (t * t / 2 + t + 1) * np.exp(-t)


def rounding_error(threshold: ArrayLike, step: ArrayLike, levels: int) -> Array:
    """Squared error of rounding what is above a threshold to multiples of a step, as a share of the second moment.

    Sum over the cells of the levels 1 to L (the last has no end; zero stands for what is pruned, and also for
    unpruned weights under half a step) of the integral of (x - k d)^2 exp(-x) / 2 over the part of it above t.

    Args:
        threshold, step: arrays that broadcast. levels: L, positive levels of the grid, such as 7 at 4 bits.
    """
    t, d = np.broadcast_arrays(np.asarray(threshold, float), np.asarray(step, float))
    total = np.zeros(t.shape)
    for k in range(levels + 1):
        low = np.maximum(t, (k - 0.5) * d if k else 0.0)
        high = np.maximum(low, (k + 0.5) * d) if k < levels else np.inf
        total += _moment(low, k * d) - (0.0 if k == levels else _moment(high, k * d))
    return total / 2


def _moment(start: ArrayLike, centre: ArrayLike) -> Array:
    """Integral of (x - c)^2 exp(-x) from `start` to infinity."""
    u = np.asarray(start) - np.asarray(centre)
    return np.exp(-np.asarray(start)) * (u * u + 2 * u + 2)


@functools.lru_cache
def least_rounding_error(levels: int) -> float:
    """Of an unpruned tensor, at the step of least error: what b-bit quantisation takes of its second moment."""
    return float(_best_step(np.zeros(1), levels)[1][0])


def _best_step(threshold: Array, levels: int) -> tuple[Array, Array]:
    """The step of least rounding error for each threshold by golden sections, and that error."""
    # reason: one cell per level from the threshold on is the most that can help, and the tail is worth log(levels)
    low, high = np.full_like(threshold, 1e-3 / levels), (threshold + 4 + 2 * np.log(levels + 1)) / levels
    for _ in range(40):
        a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        left = rounding_error(threshold, a, levels) < rounding_error(threshold, b, levels)
        low, high = np.where(left, low, a), np.where(left, b, high)
    step = (low + high) / 2
    return step, rounding_error(threshold, step, levels)


def sparse_bits(kept: ArrayLike, bits: int) -> Array:
    """Stored bits per weight where a share `kept` stays, codes of `bits` bits: all codes, or a bit for each weight,
    which stay, and the codes of those that do."""
    return np.minimum(bits, 1 + np.asarray(kept, float) * bits)


@dataclass(frozen=True)
class Choices:
    """The lower convex hull of what can be done to a Laplace tensor, from most to least bits.

    Arrays of one length: stored `size` in bits per weight, `error` as a share of the second moment, `threshold`, `bits`
    of a code; `price`[i] is the error that one bit less costs from choice i to i + 1, ascending.
    """

    size: Array
    error: Array
    threshold: Array
    bits: NDArray[np.int64]
    price: Array

    def at(self, price: float) -> int:
        """The choice that minimises error + price * size."""
        return int(np.searchsorted(self.price, price))


@functools.lru_cache
def choices(candidates: tuple[int, ...] = (2, 4, 8), form: Literal["any", "dense", "sparse"] = "any") -> Choices:
    """The hull over bitwidths of a code and thresholds, each at the step of least error; of dense or sparse ones alone
    if asked for."""
    threshold = np.zeros(1) if form == "dense" else np.arange(0, FARTHEST, _STEP)
    knots = np.linspace(0, FARTHEST, _KNOTS)
    size, error, bits = [], [], []
    for b in candidates:
        size.append(sparse_bits(1 - pruned_share(threshold), b))
        rounded = _best_step(knots, max_level(b, signed=True))[1]
        error.append(pruning_error(threshold) + scipy.interpolate.CubicSpline(knots, rounded)(threshold))
        bits.append(np.full(len(threshold), b))
    s, e = np.concatenate(size), np.concatenate(error)
    t, w = np.tile(threshold, len(candidates)), np.concatenate(bits)
    if form == "sparse":
        s, e, t, w = (values[s < w] for values in (s, e, t, w))
    order = np.lexsort((e, -s))
    hull: list[int] = []
    for i in order[::-1]:  # from the smallest to the largest
        if hull and e[i] >= e[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(s, e, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(int(i))
    index = np.array(hull[::-1])
    price = -np.diff(e[index]) / np.diff(s[index]) if len(index) > 1 else np.zeros(0)
    return Choices(s[index], e[index], t[index], w[index], price)


def _is_above(s: Array, e: Array, first: int, middle: int, last: int) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    return bool((e[middle] - e[first]) * (s[last] - s[first]) >= (e[last] - e[first]) * (s[middle] - s[first]))


def allocate(
    counts: Mapping[str, int], tables: Mapping[str, Choices], limit: float, worth: Mapping[str, float] | None = None
) -> tuple[dict[str, int], dict[str, int]] | None:
    """A choice per tensor, of least sum of worth * error, with the sum of count * size at most `limit`.

    At the optimum every tensor has d(worth * error) = -lambda d(count * size), so each takes the choice of price
    lambda * count / worth on its hull, and lambda is bisected. (Everett 1963: what minimises the Lagrangian is optimal
    for the size that it comes to.)

    Args:
        counts: weights per tensor. tables: hull per tensor. limit: bits.
        worth: what an error of 1, the whole second moment, costs; None: 1 for each, the scale-free 1/|W|^2.

    Returns:
        Position in each table, the first being the largest size, just within the limit and just beyond it (the same
        where the largest sizes are within); None if the least size is above it.
    """

    def worth_of(name: str) -> float:
        return 1.0 if worth is None else worth.get(name, 1.0)

    def at(log_price: float) -> tuple[dict[str, int], float]:
        price = math.exp(log_price)
        position = {n: table.at(price * counts[n] / max(worth_of(n), 1e-300)) for n, table in tables.items()}
        return position, sum(counts[n] * float(tables[n].size[i]) for n, i in position.items())

    low, high = -_LOG_PRICE, _LOG_PRICE
    position, size = at(low)
    if size <= limit:
        return position, position
    beyond = position
    best, size = at(high)
    if size > limit:
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        position, size = at(middle)
        if size <= limit:
            high, best = middle, position
        else:
            low, beyond = middle, position
    return best, beyond
