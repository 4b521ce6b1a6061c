"""`evaluate`: top-1 accuracy of a graph, and what all of training needs to run one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sbs_fx.data.batches import check_labels, read_batches
from sbs_fx.plan.errors import DataError, InputError, SbsError


def evaluate(module: nn.Module, data: Iterable[Any], max_batches: int | None = None) -> float:
    """Top-1 accuracy in percent, in eval mode, without gradients; the module is left in the mode it was in.

    Args:
        module: images (batch, ...) -> logits (batch, classes); a traced, gated or static graph, or any module.
        data: yields (images, labels).

    Raises:
        DataError: no batch, labels missing or outside [0, classes), an iterable that raises.
        InputError: the module gives no logits.
    """
    device = device_of(module)
    right = total = 0
    with mode(module, training=False), torch.no_grad():
        for index, (images,), labels in read_batches(data, max_batches=max_batches):
            logits = logits_of(_run(module, images.to(device), index))
            labels = check_labels(labels, logits.shape[1], index).to(device)
            right += int((logits.argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total if total else math.nan


def _run(module: nn.Module, images: Tensor, index: int) -> Any:
    try:
        return module(images)
    except SbsError:
        raise
    except Exception as error:  # reason: whatever a module raises on what it does not take
        raise DataError(
            f"the model does not run on batch {index}, {images.dtype} of shape {tuple(images.shape)}: "
            f"{type(error).__name__}: {error}; give data as the model takes it"
        ) from error


def logits_of(output: Any) -> Tensor:
    """The first tensor of a model's output, (batch, classes). Raises InputError if it has another form."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        form = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the model gives {form}; accuracy and training need logits of shape (batch, classes)")
    return output


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter or buffer is; the CPU if there is none."""
    tensors: Iterator[Tensor] = (t for kind in (module.parameters(), module.buffers()) for t in kind)
    return next((t.device for t in tensors), torch.device("cpu"))


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module into a mode, and every sub-module back into its own afterwards."""
    before = {m: m.training for m in module.modules()}
    for m in before:
        m.training = training
    try:
        yield
    finally:
        for m, was in before.items():
            m.training = was
