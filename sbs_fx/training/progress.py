"""`Progress`: what a training run says after each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """State after one step of training.

    Attributes:
        stage: "search", "fine-tune" or another name of what is trained.
        epoch: from 0. epochs: in all.
        step: steps done in this stage, from 1. steps: in all, None in the first epoch of data without a length.
        loss: of this step, penalty included. rate: the weights' learning rate.
        accuracy: of this step's batch in percent, None without labels.
        images: in this step's batch, over all processes.
        validation: top-1 accuracy in percent on held-out data, at the last step of an epoch if there is such data.
        measures: what a search adds; a fine-tuning leaves it empty:
            "bops", "size", "macs": shares of the float model at the current gates; "budget": {measure: limit};
            "pruned": share of prunable channels whose gate is closed; "multiplier": {measure: value};
            "weight_bits", "activation_bits": {bits: number of tensors}.

    >>> Progress("search", epoch=0, epochs=2, step=1, steps=9, loss=1.5, rate=0.1).measures
    {}
    """

    stage: str
    epoch: int
    epochs: int
    step: int
    steps: int | None
    loss: float
    rate: float
    accuracy: float | None = None
    images: int = 0
    validation: float | None = None
    measures: Mapping[str, Any] = field(default_factory=dict)


Observer = Callable[[Progress], None]
