"""`TrainingStage`: what a training run trains. The base class is fine-tuning, where every decision is fixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.training.settings import Training


class TrainingStage:
    """A gated graph, and what happens around each step. A search overrides the hooks.

    Attributes:
        network: from `insert_gates`, calibrated; trained in place.
        name: of the stage, in progress, checkpoints and errors.

    >>> TrainingStage(result.gated).name
    'fine-tune'
    """

    def __init__(self, network: fx.GraphModule, name: str = "fine-tune") -> None:
        self.network, self.name = network, name

    def optimizers(self, settings: Training) -> list[torch.optim.Optimizer]:
        """Optimisers of parameters that are no weights and no ranges; their rates follow the same schedule."""
        return []

    def before_step(self, step: int, done: float) -> None:
        """Called before the forward pass of `step`; `done` is the share of the stage that is over."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss, after the forward pass."""
        return None

    def before_update(self, step: int) -> None:
        """Called when all gradients are there, before the optimisers use them."""

    def after_step(self, step: int) -> None:
        """Called after the optimisers."""

    def measures(self) -> dict[str, Any]:
        """For `Progress.measures`."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the network and the optimisers, as plain JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
