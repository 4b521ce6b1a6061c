"""`Reconstruction`: how layers are brought back to what they gave, in closed form and by gradient."""

from __future__ import annotations

from pydantic import Field

from sbs_fx.calibration.rounding import DAMPING
from sbs_fx.plan import Value
from sbs_fx.plan.errors import InputError


class Reconstruction(Value):
    """Settings of `reconstruct`.

    Attributes:
        images: read from the data; None: 1,024, but no more than 256 of 224 x 224 pixels. batch: images of one step.
        steps: of the gradient, in each block, behind the closed form; 0: none, or as many as the time asked for allows.
        damping: what draws a refitted weight to the given one, as a share of the mean second moment of its inputs.
        tolerance: a block is left as it is where its mean squared error is a smaller share of what the float network
            gives, squared. At 8 bits that is 1e-4 to 1e-3, of which so few images mend a tenth.
        weight_rate: of weights, in steps of their grid. range_rate, affine_rate: of ranges, and of biases and norms, as
            a share of their size. All fall to zero as a cosine.
        drop: share of activation values that a step leaves in float (QDrop, arXiv 2203.05740).
    """

    _error = InputError

    images: int | None = Field(default=None, ge=1)
    batch: int = Field(default=64, ge=1)
    steps: int = Field(default=0, ge=0)
    damping: float = Field(default=DAMPING, gt=0)
    tolerance: float = Field(default=2e-3, ge=0)
    weight_rate: float = Field(default=0.1, gt=0)
    range_rate: float = Field(default=0.005, gt=0)
    affine_rate: float = Field(default=0.002, gt=0)
    drop: float = Field(default=0.5, ge=0, lt=1)
