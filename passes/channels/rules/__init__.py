"""How each operator moves channels: one table, keyed by ATen operator, filled by the files of this folder."""

from sbs_fx.passes.channels.rules import (
    contraction,
    convolution,
    gathering,
    normalisation,
    pointwise,
    reshaping,
    spatial,
)

__all__ = ["contraction", "convolution", "gathering", "normalisation", "pointwise", "reshaping", "spatial"]
