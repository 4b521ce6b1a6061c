"""What training minimises: cross-entropy, maybe distillation, on images that may be mixed; and its sharpened gradient.

In: a batch as it was read. Out: a loss, and how many images are classified right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch._functorch import config as partitioning
from torch.func import functional_call
from torch.nn import functional as F

from sbs_fx.data.batches import Batch, check_labels
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.training.evaluation import device_of, logits_of, mode
from sbs_fx.training.processes import Processes
from sbs_fx.training.settings import Training


class Example(NamedTuple):
    """One process's part of a batch on its device.

    Attributes:
        number: of the batch. labels: (batch,), or None.
        targets: the labels, or (batch, classes) where images are mixed.
    """

    number: int
    images: Tensor
    labels: Tensor | None
    targets: Tensor | None


class Objective:
    """The loss of a network; the teacher, if there is one, must be in eval mode."""

    def __init__(self, network: nn.Module, teacher: nn.Module | None, settings: Training, processes: Processes) -> None:
        self.network, self.settings, self.processes = network, settings, processes
        self.device = device_of(network)
        self._forward = torch.compile(network) if settings.compiled else network
        self._teach = torch.compile(teacher) if settings.compiled and teacher is not None else teacher
        self._mixup: Mixup | None = None

    def place(self, batch: Batch) -> Example:
        """The batch on the device, mixed if the settings say so."""
        (images,), labels = batch.inputs, batch.labels
        images = images.to(self.device, non_blocking=True)
        if self.settings.channels_last and images.ndim == 4:
            images = images.to(memory_format=torch.channels_last)
        if labels is None and self._teach is None:
            check_labels(None, None, batch.number)
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        targets = labels
        if labels is not None and (self.settings.mixup or self.settings.cutmix):
            mix = self._mix(images)
            check_labels(labels, mix.num_classes, batch.number)
            images, labels = (t[: len(t) // 2 * 2] for t in (images, labels))  # reason: timm mixes pairs
            images, targets = mix(images.clone(), labels)
        images, labels, targets = self.processes.share(batch.number, images, labels, targets)
        return Example(batch.number, images, labels, targets)

    def _mix(self, images: Tensor) -> Mixup:
        if self._mixup is None:
            # reason: on copies, since buffers hold what gates decide by, and a run that goes on has just taken them up
            buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
            with torch.no_grad(), mode(self.network, training=False):
                classes = logits_of(functional_call(self.network, buffers, (images[:2],))).shape[1]
            s = self.settings
            self._mixup = Mixup(s.mixup, s.cutmix, label_smoothing=s.label_smoothing, num_classes=classes)
        return self._mixup

    def __call__(self, example: Example) -> tuple[Tensor, Tensor | None]:
        """The loss, and how many images are classified right (None without labels)."""
        # reason: while compiling; else two float32 copies of each activation are kept that are cheap to compute again
        with self._autocast(), partitioning.patch(ban_recompute_used_far_apart=False):
            logits = logits_of(self._forward(example.images)).float()
        loss, right = logits.new_zeros(()), None
        if example.labels is not None and example.targets is not None:
            if self.device.type == "cpu":  # reason: elsewhere the look would wait for the device, which checks itself
                check_labels(example.labels, logits.shape[1], example.number)
            smoothing = 0.0 if example.targets.is_floating_point() else self.settings.label_smoothing
            loss = F.cross_entropy(logits, example.targets, label_smoothing=smoothing)
            right = (logits.detach().argmax(1) == example.labels).sum()
        weight = self.settings.distillation if example.labels is not None else 1.0
        if self._teach is not None and weight:
            with torch.no_grad(), self._autocast():
                soft_targets = F.log_softmax(logits_of(self._teach(example.images)).float(), dim=1)
            divergence = F.kl_div(F.log_softmax(logits, dim=1), soft_targets, reduction="batchmean", log_target=True)
            loss = loss + weight * divergence
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
