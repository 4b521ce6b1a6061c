"""`Config`: settings of `compress` and of everything that it calls."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sbs_fx.calibration.reconstruction import Refinement
from sbs_fx.export.latency import Latency
from sbs_fx.search import Ajpq, Opq, Search, TwoStage
from sbs_fx.training import Training


class Config(BaseModel):
    """Settings of `compress`; every field has a sensible default.

    Attributes:
        weight_bits, activation_bits: 2, 4 or 8; None lets the method choose. These and the next three are for "uniform"
            and "opq"; the others have settings of their own.
        importance: norm that ranks the channels of a group.
        round_to: kept channels are a multiple of this; None: 16, half of that where the group is small ("uniform" under
            budgets of MACs or latency: there too), and under a latency budget what was measured; 1: any number.
        minor_groups: also prune the smaller factor of product axes (heads, group widths).
        keep_outputs: False lets the output features of a headless model shrink.
        ranges: how activation and weight ranges are chosen: "mse", "percentile" or "minmax".
        integer_joins: adds, products, concatenations and pools of convolutional blocks work on 8-bit codes too, as
            integer kernels want it; False leaves them in float.
        exact: all scales are powers of two, so that every backend computes the same bits; costs accuracy below 8 bits.
        calibration_batches: batches of `data` that calibration reads.
        epochs, learning_rate: fine-tuning with the gates fixed; 0 epochs: none.
        search: settings of a method that trains; opq, two_stage, ajpq: of these methods.
        refinement: of what "two_stage" has found, where nothing is fine-tuned.
        latency: how time is measured if the budget limits it.
        training: how search and fine-tuning train.
        seed: of everything random.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bits: Literal[2, 4, 8] | None = None
    activation_bits: Literal[2, 4, 8] | None = None
    importance: Literal["l1", "l2"] = "l2"
    round_to: int | None = Field(default=None, ge=1)
    minor_groups: bool = False
    keep_outputs: bool = True
    ranges: Literal["mse", "percentile", "minmax"] = "mse"
    integer_joins: bool = True
    exact: bool = False
    calibration_batches: int = Field(default=8, ge=1)
    epochs: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=0.01, gt=0)
    search: Search = Search()
    opq: Opq = Opq()
    two_stage: TwoStage = TwoStage()
    ajpq: Ajpq = Ajpq()
    refinement: Refinement = Refinement()
    latency: Latency = Latency()
    training: Training = Training()
    seed: int = 0
