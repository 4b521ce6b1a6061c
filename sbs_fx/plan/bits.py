"""Bitwidths that a weight or an activation may have."""

from typing import Final

BITS: Final = (2, 3, 4, 5, 6, 8)
FLOAT_BITS: Final = 32
