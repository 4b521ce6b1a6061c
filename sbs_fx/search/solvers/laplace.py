"""Pruning and rounding of weights that follow a Laplace density: errors and sizes in closed form.

In and out: plain numbers and arrays. f(w) = exp(-|w|/b)/(2b), and all is in units of b (threshold t stands for t b) or
of the second moment 2b^2 (errors), so that one table serves every layer.
Source: One-shot Pruning-Quantization (arXiv 2205.11141) fits this density to each layer and prunes and rounds by
Lagrange multipliers. Its equations were not at hand: all that follow are our derivation, and are tested as such.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sbs_fx.quantizer.grid import max_level

Array = NDArray[np.float64]

FARTHEST, _STEP = 8.0, 0.02  # thresholds that are tabulated: beyond it one weight in 3000 is left
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


@functools.lru_cache
def masked_errors(bits: int) -> tuple[Array, Array]:
    """Thresholds, ascending, and what pruning below each and rounding the rest to `bits` bits takes of the second
    moment, at the step of least error."""
    thresholds = np.arange(_STEP, FARTHEST, _STEP)
    return thresholds, pruning_error(thresholds) + _best_step(thresholds, max_level(bits, signed=True))[1]
