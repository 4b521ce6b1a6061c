"""`train`: the loop that search and fine-tuning share, and `fine_tune`.

In: a stage (a gated graph and what happens around each step), batches of (images, labels). Out: the same graph,
trained. Holds: everything random is seeded anew from the number of the step, so a run that goes on from a checkpoint
ends as one that was never stopped; the graph ends in eval mode, also after an error; the random state of torch, numpy
and python stays as it was.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, fx, nn

from sbs_fx.data.batches import Batch, read_batches, start_epoch
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.passes.graph import input_count
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import DataError, InputError, Interrupted, TrainingError
from sbs_fx.training.checkpoints import Checkpoints
from sbs_fx.training.evaluation import device_of, evaluate, mode
from sbs_fx.training.norms import estimate_norms
from sbs_fx.training.objective import Example, Objective, sharpen
from sbs_fx.training.optimizers import Optimizers
from sbs_fx.training.processes import Processes
from sbs_fx.training.progress import Observer, Progress
from sbs_fx.training.randomness import random_state_kept, seed_everything
from sbs_fx.training.settings import Training
from sbs_fx.training.stage import TrainingStage

_REPORT_EVERY = 20  # steps between looks at the losses on an accelerator, each of which waits for it


@boundary("fine_tune")
def fine_tune(
    gated: fx.GraphModule,
    data: Iterable[Any],
    *,
    epochs: int,
    lr: float,
    settings: Training | None = None,
    teacher: nn.Module | None = None,
    validation: Iterable[Any] | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    progress: Observer | None = None,
    stage: Callable[[fx.GraphModule], TrainingStage] = TrainingStage,
) -> None:
    """Train a gated graph with fixed gates, in place; see `train`.

    >>> fine_tune(result.gated, batches, epochs=1, lr=0.001)
    >>> result = sbs_fx.refresh(result)
    """
    train(
        stage(gated),
        data,
        epochs=epochs,
        lr=lr,
        settings=settings or Training(),
        teacher=teacher,
        validation=validation,
        seed=seed,
        checkpoints=checkpoints,
        progress=progress,
    )


def train(
    stage: TrainingStage,
    data: Iterable[Any],
    *,
    epochs: int,
    lr: float,
    settings: Training,
    teacher: nn.Module | None = None,
    validation: Iterable[Any] | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    progress: Observer | None = None,
) -> None:
    """Train the network of a stage, in place.

    The loss is that of the graph's task (for logits cross-entropy); with a teacher, the divergence from it is added
    (for logits KL(teacher || graph)), and takes its place where the data has no targets. Gradients go through rounding
    as if it were not there (`sbs_fx.quantizer.superbit`).

    Args:
        data: yields (images, labels), iterable once an epoch; `set_epoch(number)` is called on it if it has that.
        lr: highest learning rate of weights, biases and norms.
        teacher: the float model or graph; not changed.
        validation: held-out (images, labels), read at each epoch's end.
        seed: of everything random in the graph and the augmentation.
        checkpoints: where to save, and to go on from if the stage has been begun there.
        progress: called after each step.

    Raises:
        DataError: no batch, labels missing or out of range, an iterable that raises or ends after the first epoch, NaN
            or Inf in a batch.
        TrainingError: the loss is NaN or Inf, or memory is short; names step, batch and last checkpoint.
        InputError: a rate or a number of epochs that means nothing.
        Interrupted: SIGINT or SIGTERM; the step was finished and saved. Only if there are checkpoints.

    >>> train(TrainingStage(result.gated), batches, epochs=1, lr=0.001, settings=Training())
    """
    if epochs < 0 or not lr > 0 or not math.isfinite(lr):
        raise InputError(f"epochs {epochs}, lr {lr}; expected epochs of at least 0 and a finite rate above 0")
    if settings.patience is not None and validation is None:
        raise InputError(f"patience {settings.patience} needs validation data; give it, or leave patience out")
    try:
        with random_state_kept(device_of(stage.network)), mode(teacher, training=False), torch.enable_grad():
            _Loop(stage, data, epochs, lr, settings, teacher, validation, seed, checkpoints, progress).run()
    finally:
        stage.network.eval()
        stage.network.zero_grad(set_to_none=True)


class _Step(NamedTuple):
    """A step whose loss has not been looked at yet."""

    epoch: int
    step: int
    batch: int
    loss: Tensor
    right: Tensor | None
    images: int
    rate: float


class _Loop:
    def __init__(
        self,
        stage: TrainingStage,
        data: Iterable[Any],
        epochs: int,
        lr: float,
        settings: Training,
        teacher: nn.Module | None,
        validation: Iterable[Any] | None,
        seed: int,
        checkpoints: Checkpoints | None,
        progress: Observer | None,
    ) -> None:
        self.stage, self.network, self.data, self.epochs, self.settings = stage, stage.network, data, epochs, settings
        self.validation, self.seed = validation, seed
        self.checkpoints, self.progress = checkpoints, progress
        self.processes = Processes()
        self.device = device_of(self.network)
        if settings.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.processes.start_equal(self.network)
        self.objective = Objective(self.network, teacher, settings, self.processes)
        self.optimizers = Optimizers(self.network, lr, settings, stage.optimizers(settings))
        self.ema = ModelEmaV3(self.network, decay=settings.ema) if settings.ema else None
        self.length = len(data) if isinstance(data, Sized) else None  # batches in an epoch, once known
        self.step = self.first_epoch = self.skip = 0
        self.best, self.best_state, self.stale = -math.inf, dict[str, Tensor](), 0
        self.finished = False
        self.pending: list[_Step] = []

    def run(self) -> None:
        self._resume()
        self.optimizers.plan(None if self.length is None else max(1, self.epochs * self.length))
        with self._interruptible() as interrupted:
            for epoch in range(self.first_epoch, self.epochs):
                if self.finished:
                    break
                self._epoch(epoch, interrupted)
            if not self.finished:
                self._finish()
            if self.processes.any(interrupted.is_set()):
                self._interrupt()

    # -- one epoch, one step -------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int, interrupted: threading.Event) -> None:
        self._set_modes(epoch)
        start, last, count = self.step, self.length, self.skip
        try:
            for batch in self._batches(epoch):
                count = batch.number + 1
                self._train(epoch, batch)
                if count == last:
                    break
                stop = self.processes.any(interrupted.is_set())
                if stop or self.step % self.settings.checkpoint_every == 0:
                    self._report()
                    self._save(epoch, count)
                if stop:
                    self._interrupt()
        except DataError as error:
            if epoch and count == 0:
                raise DataError(
                    f"the data is empty in epoch {epoch}, after {start} steps before; it can be read only "
                    "once. Give a list or a loader"
                ) from error
            raise
        if last is None:
            self.optimizers.plan(self.epochs * count)
        self.length, self.skip = count, 0
        self._end_of_epoch(epoch)
        self._save(epoch + 1, 0)
        if self.processes.any(interrupted.is_set()) and not self.finished and epoch + 1 < self.epochs:
            self._interrupt()

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch that are still to come, each read and used under a seed of its own."""
        start_epoch(self.data, epoch)
        iterator = read_batches(self.data, inputs=input_count(self.network))
        index = 0
        while True:
            seed_everything(self.seed, epoch, index, 0)
            batch = next(iterator, None)
            if batch is None:
                return
            seed_everything(self.seed, epoch, index, 1)
            index += 1
            if index > self.skip:
                yield batch

    def _train(self, epoch: int, batch: Batch) -> None:
        example = self.objective.place(batch)
        steps = None if self.length is None else self.epochs * self.length
        self.optimizers.start(self.step)
        self.stage.before_step(self.step, 0.0 if steps is None else self.step / steps)
        try:
            loss, right = self._loss(example)
            loss.backward()
            if self.settings.sharpness:
                sharpen(self.network, self.optimizers.weights, self.settings.sharpness, lambda: self._loss(example)[0])
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory at step {self.step} with {example.images} images; the largest knobs are the batch "
                "size, precision='bf16', distillation=0 (no teacher) and ema=0",
                step=self.step,
                batch=batch.number,
                checkpoint=self._last_checkpoint(),
            ) from error
        self.processes.average_gradients(self.network.parameters())
        self.stage.before_update(self.step)
        # reason: looked at before the update on a CPU, where it costs nothing, so that weights are still sound
        mean = self.processes.mean(loss.detach())
        self.pending.append(_Step(epoch, self.step, batch.number, mean, right, example.images, self.optimizers.rate))
        if self.device.type == "cpu":
            self._check(example)
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.optimizers.weights, self.settings.clip)
        self.optimizers.update()
        self.stage.after_step(self.step)
        if self.ema is not None:
            self.ema.update(self.network)
        self.step += 1
        # reason: the last step of an epoch is told of with the accuracy on held-out data
        keep = int(self.validation is not None and batch.number + 1 == self.length)
        if self.device.type == "cpu" or self.step % _REPORT_EVERY == 0:
            self._report(keep=keep)

    def _loss(self, example: Example) -> tuple[Tensor, Tensor | None]:
        loss, right = self.objective(example)
        penalty = self.stage.penalty()
        return loss if penalty is None else loss + penalty, right

    def _set_modes(self, epoch: int) -> None:
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, BatchNorm) and epoch >= self.epochs - self.settings.frozen_norm_epochs:
                module.eval()

    # -- reports, ends and checkpoints ---------------------------------------------------------------------------------

    def _check(self, example: Example | None = None) -> None:
        """Refuse a loss that is not finite."""
        for at in self.pending:
            if not bool(torch.isfinite(at.loss)):
                if example is not None and not all(bool(torch.isfinite(x).all()) for x in example.inputs):
                    raise DataError(f"NaN or Inf in batch {at.batch} (step {at.step}); drop or mend that batch")
                raise self._unsound(f"the loss is {at.loss.item()}", at.step, at.batch)

    def _unsound(self, what: str, step: int, batch: int) -> TrainingError:
        kept = self._last_checkpoint()
        return TrainingError(
            f"{what} at step {step}, batch {batch} of its epoch; lower the learning rate, and check that the graph was "
            "calibrated" + (f". The last good state is in {kept!r}" if kept else ""),
            step=step,
            batch=batch,
            checkpoint=kept,
        )

    def _report(self, validation: float | None = None, keep: int = 0) -> None:
        """Tell of the steps that have not been told of, but for the last `keep`."""
        if self.device.type != "cpu":
            self._check()
        told = self.pending[: len(self.pending) - keep]
        self.pending = self.pending[len(told) :]
        if self.progress is None or not self.processes.is_first:
            return
        steps = None if self.length is None else self.epochs * self.length
        for at in told:
            accuracy = None if at.right is None else 100 * float(at.right) / at.images
            last = at is told[-1]
            self.progress(
                Progress(
                    self.stage.name,
                    at.epoch,
                    self.epochs,
                    at.step + 1,
                    steps,
                    float(at.loss),
                    at.rate,
                    accuracy,
                    at.images * self.processes.count,
                    validation if last else None,
                    self.stage.measures() if last else {},
                )
            )

    def _end_of_epoch(self, epoch: int) -> None:
        accuracy = None
        if self.validation is not None:
            judged = self.network if self.ema is None else self.ema.module
            accuracy = evaluate(judged, self.validation)
            if self.settings.patience is not None:
                better = accuracy > self.best
                self.stale = 0 if better else self.stale + 1
                if better:
                    self.best = accuracy
                    self.best_state = {k: v.detach().clone() for k, v in judged.state_dict().items()}
        self._report(accuracy)
        if self.settings.patience is not None and (self.stale >= self.settings.patience or epoch + 1 == self.epochs):
            self.network.load_state_dict(self.best_state)
            self._finish(averaged=True)

    def _finish(self, averaged: bool = False) -> None:
        """The average takes the weights' place; batch-norm statistics are estimated anew."""
        self.finished = True
        if self.ema is not None and not averaged and self.step:
            self.network.load_state_dict(self.ema.module.state_dict())
        if self.settings.norm_batches and self.step:
            start_epoch(self.data, self.epochs)
            seed_everything(self.seed, self.epochs, 0, 0)
            estimate_norms(self.network, self.data, self.settings.norm_batches)
        self._save(self.epochs, 0)

    def _save(self, epoch: int, done: int) -> None:
        if self.checkpoints is None:
            return
        for name, parameter in self.network.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise self._unsound(f"{name!r} holds NaN or Inf", self.step, max(0, done - 1))
        parts = {"network": self.network.state_dict(), "optimizers": self.optimizers.state(), "best": self.best_state}
        if self.ema is not None:
            parts["ema"] = self.ema.module.state_dict()
        tensors = {f"{part}/{name}": value for part, of_part in parts.items() for name, value in of_part.items()}
        state: dict[str, Any] = {
            "epoch": epoch,
            "done": done,
            "step": self.step,
            "length": self.length,
            "finished": self.finished,
        }
        state |= {"best": self.best, "stale": self.stale, "stage": self.stage.state()}
        self.checkpoints.save(self.stage.name, tensors, state)

    def _resume(self) -> None:
        saved = self.checkpoints.load(self.stage.name) if self.checkpoints is not None else None
        if saved is None:
            return
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = value
        self.network.load_state_dict(parts["network"])
        self.optimizers.load_state(parts.get("optimizers", {}))
        if self.ema is not None:
            self.ema.module.load_state_dict(parts["ema"])
        state = saved.state
        self.first_epoch, self.skip, self.step = state["epoch"], state["done"], state["step"]
        self.length, self.finished = state["length"], state["finished"]
        self.best, self.stale, self.best_state = state["best"], state["stale"], parts.get("best", {})
        self.stage.load_state(state["stage"])

    def _last_checkpoint(self) -> str | None:
        return None if self.checkpoints is None else self.checkpoints.existing(self.stage.name)

    def _interrupt(self) -> None:
        assert self.checkpoints is not None
        raise Interrupted(
            f"stopped after step {self.step} of stage {self.stage.name!r}; everything is in "
            f"{self.checkpoints.directory!r}. The same command again goes on from there"
        )

    @contextmanager
    def _interruptible(self) -> Iterator[threading.Event]:
        """SIGINT and SIGTERM set the event, where there is somewhere to save; a second one acts at once."""
        event = threading.Event()
        if self.checkpoints is None or threading.current_thread() is not threading.main_thread():
            yield event
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, action in before.items():
                signal.signal(number, action)

        def handle(*_: Any) -> None:
            event.set()
            restore()

        for number in before:
            signal.signal(number, handle)
        try:
            yield event
        finally:
            restore()
