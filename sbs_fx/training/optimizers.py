"""Optimisers and rates: timm's, over the weights and the ranges of a gated graph.

In: a gated graph and settings. Out: optimisers, the weights they move, and a schedule that is a function of the step
number alone. Holds: a range never falls below a hundredth of its first value, and never to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, fx

from sbs_fx.plan.errors import InputError
from sbs_fx.quantizer.channel_gate import ChannelGate
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.training.settings import Training

_LEAST_SHARE = 0.01  # of its first value, that a range never falls below
_UNKNOWN_WARM_UP = 20  # steps, where the length of the data is not known beforehand


class Optimizers:
    """All optimisers of a training run as one.

    Attributes:
        weights: parameters that belong to no gate.
    """

    def __init__(
        self, network: fx.GraphModule, lr: float, settings: Training, more: Sequence[torch.optim.Optimizer]
    ) -> None:
        gates = [m for m in network.modules() if isinstance(m, (SuperBitQuantizer, ChannelGate))]
        apart = {id(p) for gate in gates for p in gate.parameters()}
        apart |= {id(p) for each in more for group in each.param_groups for p in group["params"]}
        self.settings = settings
        self.weights = [p for p in network.parameters() if p.requires_grad and id(p) not in apart]
        self.all: list[torch.optim.Optimizer] = []
        if self.weights:
            self.all.append(_of_weights(self.weights, lr, settings))
        ranges = [g.range for g in gates if isinstance(g, SuperBitQuantizer) and not g.is_float]
        self.ranges: list[tuple[Tensor, Tensor]] = []  # and what they were at first
        self.of_ranges: torch.optim.Optimizer | None = None
        if settings.range_lr and ranges:
            self.of_ranges = torch.optim.Adam([{"params": [r]} for r in ranges], eps=1e-12)
            self.all.append(self.of_ranges)
            self.ranges = [(r, r.detach().clone()) for r in ranges]
            self._set_range_rates()
        self.own = len(self.all)
        self.all.extend(more)
        self._schedules: list[Scheduler] = []

    @property
    def rate(self) -> float:
        """The weights' learning rate now."""
        return float(self.all[0].param_groups[0]["lr"]) if self.all else 0.0

    def _set_range_rates(self) -> None:
        """In proportion to each range: Adam's steps have the size of the rate, so all ranges then move alike."""
        if self.of_ranges is not None:
            for group, (_, first) in zip(self.of_ranges.param_groups, self.ranges, strict=True):
                group["lr"] = self.settings.range_lr * float(first.abs().mean())

    def plan(self, steps: int | None) -> None:
        """Set the length of the schedule; None: the rate stays at its height after a rise of twenty steps. The rates of
        a stage's own optimisers fall as a cosine whatever the settings say."""
        of_stage = self.settings.model_copy(update={"schedule": "cosine"})
        self._schedules = [
            _schedule(each, steps, self.settings if i < self.own else of_stage) for i, each in enumerate(self.all)
        ]

    def start(self, step: int) -> None:
        """Clear gradients and set the rates of `step`, from 0."""
        for each, schedule in zip(self.all, self._schedules, strict=True):
            each.zero_grad(set_to_none=True)
            schedule.step_update(step + 1)

    def update(self) -> None:
        """One step of all of them."""
        for each in self.all:
            each.step()
        with torch.no_grad():
            for value, first in self.ranges:
                value.copy_(torch.maximum(value, first * _LEAST_SHARE))

    def state(self) -> dict[str, Tensor]:
        """Everything that steps have left behind, as tensors by name."""
        found: dict[str, Tensor] = {}
        for i, each in enumerate(self.all):
            for k, slots in each.state_dict()["state"].items():
                found |= {f"{i}.{k}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        return found | {f"first.{i}": first for i, (_, first) in enumerate(self.ranges)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        slots: list[dict[int, dict[str, Any]]] = [{} for _ in self.all]
        for name, value in state.items():
            first, key, *slot = name.split(".")
            if first == "first":
                self.ranges[int(key)][1].copy_(value)
            else:
                slots[int(first)].setdefault(int(key), {})[".".join(slot)] = value
        self._set_range_rates()
        for each, found in zip(self.all, slots, strict=True):
            each.load_state_dict({"state": found, "param_groups": each.state_dict()["param_groups"]})


def _of_weights(weights: Sequence[torch.nn.Parameter], lr: float, settings: Training) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    try:
        return create_optimizer_v2(
            [group for group in groups if group["params"]], settings.optimizer, lr=lr, momentum=settings.momentum
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"optimizer {settings.optimizer!r}: {error}; expected one that timm knows") from error


def _schedule(optimizer: torch.optim.Optimizer, steps: int | None, settings: Training) -> Scheduler:
    if steps is None:
        warm_up = {"warmup_t": _UNKNOWN_WARM_UP, "warmup_lr_init": 0.0, "t_in_epochs": False}
        return MultiStepLRScheduler(optimizer, decay_t=[], **warm_up)
    warm_up = {"warmup_t": max(1, round(settings.warmup * steps)), "warmup_lr_init": 0.0, "t_in_epochs": False}
    if settings.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=steps + 1, **warm_up)
    milestones = settings.milestones if settings.schedule == "multistep" else ()
    return MultiStepLRScheduler(optimizer, decay_t=[round(m * steps) for m in milestones], decay_rate=0.1, **warm_up)
