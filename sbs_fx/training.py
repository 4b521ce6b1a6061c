"""`evaluate` and `fine_tune`: accuracy of a graph, and training of a gated graph whose bits are decided.

In: a module or graph of one input, and batches of (images, labels). Out: a percentage; or the same graph with weights,
biases, norms and ranges trained. Holds: bits and kept channels never change; the graph ends in eval mode, also after an
error; torch's random state stays as it was; the same seed and data give the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sbs_fx.data import check_labels, read_batches
from sbs_fx.errors import DataError, InputError, SbsError
from sbs_fx.passes.insert_gates import BatchNorm
from sbs_fx.superbit import ChannelGate, SuperBitQuantizer

MAX_NORM = 5.0  # of the gradient of all weights together
WARM_UP = 0.05  # share of the steps in which the rate rises
_UNKNOWN_WARM_UP = 20  # steps, where the length of the data is not known beforehand
_LEAST_SHARE = 0.01  # of its first value, that a range never falls below


class Progress(NamedTuple):
    """State after a step of `fine_tune`. `steps` is the number in all, None in the first epoch of data without a
    length; `loss` is the step's own, `rate` the weights' learning rate."""

    epoch: int
    step: int
    steps: int | None
    loss: float
    rate: float


def evaluate(module: nn.Module, data: Iterable[Any], max_batches: int | None = None) -> float:
    """Top-1 accuracy in percent, in eval mode, without gradients; the module is left in the mode it was in.

    Args:
        module: images (batch, ...) -> logits (batch, classes); a traced, gated or static graph, or any module.
        data: yields (images, labels).

    Raises:
        DataError: no batch, labels missing or outside [0, classes), an iterable that raises.
        InputError: the module gives no logits.
    """
    device = _device(module)
    right = total = 0
    with _mode(module, training=False), torch.no_grad():
        for index, (images,), labels in read_batches(data, max_batches=max_batches):
            logits = _logits(module, images.to(device))
            labels = check_labels(labels, logits.shape[1], index).to(device)
            right += int((logits.argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total if total else math.nan


def fine_tune(
    gated: fx.GraphModule,
    data: Iterable[Any],
    *,
    epochs: int,
    lr: float,
    teacher: nn.Module | None = None,
    weight_decay: float = 1e-4,
    range_lr: float = 1e-3,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    frozen_norm_epochs: int = 0,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Train a gated graph with fixed gates, in place.

    The loss is cross-entropy; with a teacher, the divergence KL(teacher || graph) of the class probabilities is added,
    and takes its place where the data has no labels. The rate rises over the first twentieth of the steps and falls to
    zero as a cosine. Gradients go through rounding as if it were not there (`sbs_fx.superbit`).

    Args:
        gated: from `insert_gates`, bits applied and calibrated.
        data: yields (images, labels), iterable once an epoch.
        lr: highest learning rate of weights, biases and norms.
        teacher: the float model or graph; not changed.
        weight_decay: of parameters with two or more dimensions.
        range_lr: highest rate of the ranges, which Adam moves, relative to the size of each range; 0 keeps them.
        optimizer: "sgd" (momentum 0.9, Nesterov) or "adamw", of everything else.
        frozen_norm_epochs: in so many last epochs batch norms keep their statistics and use them, as they will when
            folded.
        seed: of dropout and whatever else is random in the graph; data has a seed of its own.
        progress: called after each step.

    Raises:
        DataError: no batch, labels missing or out of range, an iterable that raises or ends after the first epoch, NaN
            or Inf in a batch.
        SbsError: the loss is NaN or Inf; names step and batch.
        InputError: a rate or a number of epochs that means nothing.
    """
    if epochs < 0 or not lr > 0 or range_lr < 0 or not math.isfinite(lr + range_lr) or weight_decay < 0:
        raise InputError(
            f"epochs {epochs}, lr {lr}, range_lr {range_lr}, weight_decay {weight_decay}; expected epochs "
            "and decay of at least 0, and finite rates above 0 (range_lr may be 0)"
        )
    if optimizer not in ("sgd", "adamw"):
        raise InputError(f"optimizer {optimizer!r}; expected 'sgd' or 'adamw'")
    device = _device(gated)
    # reason: a fork seeds every device again afterwards, so only those in use are named
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(seed)
            loop = _Loop(gated, teacher, epochs, lr, weight_decay, range_lr, optimizer, progress)
            for epoch in range(epochs):
                gated.train()
                for module in gated.modules():
                    if isinstance(module, BatchNorm) and epoch >= epochs - frozen_norm_epochs:
                        module.eval()
                loop.epoch(epoch, data)
    finally:
        gated.eval()
        gated.zero_grad(set_to_none=True)


class _Loop:
    """Optimisers, schedule and the step count."""

    def __init__(
        self,
        gated: fx.GraphModule,
        teacher: nn.Module | None,
        epochs: int,
        lr: float,
        weight_decay: float,
        range_lr: float,
        optimizer: str,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.gated, self.teacher, self.epochs, self.progress = gated, teacher, epochs, progress
        self.device, self.step = _device(gated), 0
        self.length: int | None = None  # batches in an epoch, once known
        gates = [m for m in gated.modules() if isinstance(m, SuperBitQuantizer)]
        apart = {
            id(p) for m in gated.modules() if isinstance(m, (SuperBitQuantizer, ChannelGate)) for p in m.parameters()
        }
        self.weights = [p for p in gated.parameters() if p.requires_grad and id(p) not in apart]
        groups = [
            {"params": [p for p in self.weights if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = []
        groups = [group for group in groups if group["params"]]
        if groups:
            self.optimizers.append(
                torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
                if optimizer == "sgd"
                else torch.optim.AdamW(groups, lr=lr)
            )
        fixed = [gate.range for gate in gates if isinstance(gate.bits, Tensor) or gate.bits in gate.candidates]
        self.ranges = [(r, r.detach() * _LEAST_SHARE) for r in fixed] if range_lr else []
        if self.ranges:
            # reason: Adam's steps have the size of the rate, so a rate in proportion makes all ranges move alike
            self.optimizers.append(
                torch.optim.Adam(
                    [{"params": [r], "lr": range_lr * float(r.detach().abs().mean())} for r, _ in self.ranges]
                )
            )
        self.rates = [[group["lr"] for group in each.param_groups] for each in self.optimizers]

    def epoch(self, epoch: int, data: Iterable[Any]) -> None:
        start = self.step
        if isinstance(data, Sized):
            self.length = len(data)
        try:
            for index, (images,), labels in read_batches(data):
                share = self._share(epoch, self.step - start)
                loss = self._train(index, images.to(self.device), labels, share)
                if self.progress is not None:
                    steps = None if self.length is None else self.epochs * self.length
                    rate = self.optimizers[0].param_groups[0]["lr"] if self.optimizers else 0.0
                    self.progress(Progress(epoch, self.step, steps, loss, rate))
        except DataError as error:
            if epoch and self.step == start:
                raise DataError(
                    f"the data is empty in epoch {epoch}, after {start} steps before; it can be read only "
                    "once. Give a list or a loader"
                ) from error
            raise
        self.length = self.step - start

    def _share(self, epoch: int, step: int) -> float:
        """Factor of the learning rates: a linear rise, then half a cosine."""
        warm_up = _UNKNOWN_WARM_UP if self.length is None else max(1.0, WARM_UP * self.epochs * self.length)
        within = 0.0 if self.length is None else min(1.0, step / self.length)
        return min(1.0, (self.step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * (epoch + within) / self.epochs))

    def _train(self, index: int, images: Tensor, labels: Tensor | None, share: float) -> float:
        for each, rates in zip(self.optimizers, self.rates, strict=True):
            each.zero_grad(set_to_none=True)
            for group, rate in zip(each.param_groups, rates, strict=True):
                group["lr"] = rate * share
        loss = self._loss(index, images, labels)
        if not bool(torch.isfinite(loss)):
            if not bool(torch.isfinite(images).all()):
                raise DataError(f"NaN or Inf in batch {index} (step {self.step}); drop or mend that batch")
            raise SbsError(
                f"the loss is {loss.item()} at step {self.step}, batch {index} of its epoch; lower the "
                "learning rate, and check that the graph was calibrated"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, MAX_NORM)
        for each in self.optimizers:
            each.step()
        with torch.no_grad():
            for value, least in self.ranges:
                value.copy_(torch.maximum(value, least))
        self.step += 1
        return float(loss.detach())

    def _loss(self, index: int, images: Tensor, labels: Tensor | None) -> Tensor:
        logits = _logits(self.gated, images)
        loss = torch.zeros((), device=logits.device)
        if labels is not None or self.teacher is None:
            loss = F.cross_entropy(logits, check_labels(labels, logits.shape[1], index).to(logits.device))
        if self.teacher is not None:
            with torch.no_grad(), _mode(self.teacher, training=False):
                wanted = F.log_softmax(_logits(self.teacher, images), dim=1)
            loss = loss + F.kl_div(F.log_softmax(logits, dim=1), wanted, reduction="batchmean", log_target=True)
        return loss


def _logits(module: nn.Module, images: Tensor) -> Tensor:
    """The first output, (batch, classes)."""
    output = module(images)
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        form = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the model gives {form}; accuracy and training need logits of shape (batch, classes)")
    return output


def _device(module: nn.Module) -> torch.device:
    tensors: Iterator[Tensor] = (t for kind in (module.parameters(), module.buffers()) for t in kind)
    return next((t.device for t in tensors), torch.device("cpu"))


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module into a mode, and every sub-module back into its own afterwards."""
    before = {m: m.training for m in module.modules()}
    for m in before:
        m.training = training
    try:
        yield
    finally:
        for m, mode in before.items():
            m.training = mode
