"""What training minimises: cross-entropy, maybe distillation, on images that may be mixed; and its sharpened gradient.

In: a batch as it was read. Out: a loss, and how many images are classified right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch._functorch import config as partitioning
from torch.func import functional_call
from torch.utils import _pytree as pytree

from sbs_fx.data.batches import Batch, Tensors, check_labels
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.plan.errors import DataError, InputError
from sbs_fx.training.evaluation import device_of, mode
from sbs_fx.training.processes import Processes
from sbs_fx.training.settings import Training
from sbs_fx.training.task import task_of


class Example(NamedTuple):
    """One process's part of a batch on its device.

    Attributes:
        number: of the batch. inputs: of the network. labels: classes (batch,), or None.
        targets: what the task reads: the labels, or (batch, classes) where images are mixed, or what else there is.
    """

    number: int
    inputs: Tensors
    labels: Tensor | None
    targets: Any

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.inputs[0])


class Objective:
    """The loss of a network; the teacher, if there is one, must be in eval mode."""

    def __init__(self, network: nn.Module, teacher: nn.Module | None, settings: Training, processes: Processes) -> None:
        self.network, self.settings, self.processes = network, settings, processes
        self.device = device_of(network)
        self._forward = torch.compile(network) if settings.compiled else network
        self._teach = torch.compile(teacher) if settings.compiled and teacher is not None else teacher
        self._mixup: Mixup | None = None
        self.task = task_of(network)

    def place(self, batch: Batch) -> Example:
        """The batch on the device, mixed if the settings say so."""
        inputs = tuple(self._placed(x) for x in batch.inputs)
        targets = self.task.readable(batch.targets, len(inputs[0]))
        if targets is None and self._teach is None and self.task.name == "classification":
            check_labels(None, None, batch.number)
        targets = pytree.tree_map_only(Tensor, lambda x: x.to(self.device, non_blocking=True), targets)
        categorical = self.task.name == "classification" and self.task.loss is None
        labels = targets if categorical and targets is not None and targets.ndim == 1 else None
        if labels is not None and (self.settings.mixup or self.settings.cutmix):
            inputs, labels, targets = self._mixed(batch.number, inputs, labels)
        inputs, labels, targets = self.processes.share(batch.number, inputs, labels, targets)
        return Example(batch.number, inputs, labels, targets)

    def _placed(self, x: Tensor) -> Tensor:
        x = x.to(self.device, non_blocking=True)
        channels_last = self.settings.channels_last and x.ndim == 4
        return x.to(memory_format=torch.channels_last) if channels_last else x

    def _mixed(self, number: int, inputs: Tensors, labels: Tensor) -> tuple[Tensors, Tensor, Tensor]:
        """Images, labels and targets (batch, classes). Raises InputError for several inputs."""
        if len(inputs) > 1:
            raise InputError(f"mixup and cutmix mix one tensor of images, the model takes {len(inputs)}; set both to 0")
        (images,) = inputs
        mix = self._mix(images)
        check_labels(labels, mix.num_classes, number)
        images, labels = (t[: len(t) // 2 * 2] for t in (images, labels))  # reason: timm mixes pairs
        images, targets = mix(images.clone(), labels)
        return (images,), labels, targets

    def _mix(self, images: Tensor) -> Mixup:
        if self._mixup is None:
            # reason: on copies, since buffers hold what gates decide by, and a run that goes on has just taken them up
            buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
            with torch.no_grad(), mode(self.network, training=False):
                (logits,) = self.task.tensors(functional_call(self.network, buffers, (images[:2],)))
                classes = logits.shape[1]
            s = self.settings
            self._mixup = Mixup(s.mixup, s.cutmix, label_smoothing=s.label_smoothing, num_classes=classes)
        return self._mixup

    def __call__(self, example: Example) -> tuple[Tensor, Tensor | None]:
        """The loss, and how many images are classified right (None without labels)."""
        # reason: while compiling; else two float32 copies of each activation are kept that are cheap to compute again
        with self._autocast(), partitioning.patch(ban_recompute_used_far_apart=False):
            output = self._forward(*example.inputs)
        outputs = self.task.tensors(output)
        loss, right, targets = outputs[0].new_zeros(()), None, example.targets
        if example.labels is not None:
            if self.device.type == "cpu":  # reason: elsewhere the look would wait for the device, which checks itself
                check_labels(example.labels, outputs[0].shape[1], example.number)
            right = (outputs[0].detach().argmax(1) == example.labels).sum()
        fits = self.task.fits(output, targets)
        if not fits and targets is not None and self.task.is_categorical:
            raise DataError(
                f"targets of batch {example.number} have shape {tuple(targets.shape)} where {self.task.name} gives "
                f"{tuple(outputs[0].shape)}; expected a class each, or a value for each class. Name another task, or "
                "give images alone to learn from the float model"
            )
        if fits:
            loss = self.task.loss_of(output, targets, self.settings.label_smoothing, example.number)
        weight = self.settings.distillation if fits else 1.0
        if self._teach is not None and weight:
            with torch.no_grad(), self._autocast():
                reference = self.task.reference(self._teach(*example.inputs))
            loss = loss + weight * self.task.divergence(output, reference)
        elif not fits:
            raise DataError(
                f"batch {example.number} has no targets that the task {self.task.name!r} reads, and there is no "
                "teacher; give labels, name another task, or distil from the float model"
            )
        return loss, right

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        bf16 = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()


def sharpen(network: nn.Module, weights: Sequence[nn.Parameter], radius: float, loss: Callable[[], Tensor]) -> None:
    """Put the gradients of the worst point within `radius` of the weights in the place of those that are there
    (sharpness-aware minimisation, arXiv 2010.01412, equations 2 and 3)."""
    moved: list[Tensor] = [p for p in weights if p.grad is not None]
    gradients = [p.grad for p in moved]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients if g is not None]))
    moves = [g * (radius / (norm + 1e-12)) for g in gradients if g is not None]
    norms = {m: m.momentum for m in network.modules() if isinstance(m, BatchNorm)}
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
        torch._foreach_add_(moved, moves)
    for module in norms:
        module.momentum = 0.0  # reason: statistics are counted once a step
    for parameter in network.parameters():
        parameter.grad = None
    try:
        loss().backward()
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, before)
        for module, momentum in norms.items():
            module.momentum = momentum
