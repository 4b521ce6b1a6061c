"""How each operator moves channels, and its facts: two tables, keyed by ATen operator, filled by the files of this
folder."""

from sbs_fx.passes.channels.rules import (
    boxes,
    contraction,
    convolution,
    deformable,
    elementwise,
    gathering,
    normalisation,
    ordering,
    pointwise,
    recurrent,
    reshaping,
    spatial,
)

__all__ = [
    "boxes",
    "contraction",
    "convolution",
    "deformable",
    "elementwise",
    "gathering",
    "normalisation",
    "ordering",
    "pointwise",
    "recurrent",
    "reshaping",
    "spatial",
]
