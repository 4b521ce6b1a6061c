"""Grids: which integer levels a bitwidth has.

In: bits, and whether there are levels on both sides of zero, and where. Out: lowest and highest code and what a range
is divided by. Holds: zero is a level of every grid.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Sides = tuple[float, float]  # where x is cut off, in units of the range: (-1, 1), (0, 1) or in between


class Level(NamedTuple):
    """Integer grid of one bitwidth: values are code * range / divisor, codes from low to high."""

    low: int
    high: int
    divisor: float


class Grid(NamedTuple):
    """What a quantiser rounds to, but for its bits."""

    range: Tensor
    below: float | None


def max_level(bits: int, signed: bool) -> int:
    """Outermost integer level of a bitwidth: 1, 7, 127 signed and 3, 15, 255 unsigned for 2, 4, 8 bits."""
    return (1 << bits - signed) - 1


def level(bits: int, signed: bool, below: float | None = None) -> Level:
    """The grid of a bitwidth; of 0 bits, zero alone. `below`: the share of an affine grid that lies under zero."""
    if bits == 0:
        return Level(0, 0, 1.0)
    steps, high = 2**bits - 1, max_level(bits, signed)
    if below is not None:
        low = round(below * steps)
        return Level(-low, steps - low, steps / 2)
    return Level(-high, high, steps / 2) if signed else Level(0, high, steps)
