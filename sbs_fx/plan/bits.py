"""Bitwidths that a weight or an activation may have."""

from typing import Final

BITS: Final = (2, 3, 4, 5, 6, 8)
FLOAT_BITS: Final = 32


def place_bits(channels: int) -> int:
    """Width of the integers that say where each of so many channels belongs."""
    return 16 if channels <= 2**15 else 32
