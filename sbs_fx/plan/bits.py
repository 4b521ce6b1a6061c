"""Bitwidths that a weight or an activation may have."""

from typing import Final

FLOAT_BITS: Final = 32
