"""Models that keep what they computed for the shape of their last input, such as a detector its grids.

In: a module, tensors of a call, which of their dimensions are the batch. Out: a context in which the batch of a kept
shape is no number. Holds: the shapes are there again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Dims = Sequence[Mapping[int, str]]  # of each tensor: place -> name of a dimension that may change
BATCH = "batch"


def resized(tensors: Sequence[Tensor], dims: Dims, batch: int) -> list[Tensor]:
    """Copies with another batch, rows again from the first on: some modules write what they are given."""
    return [
        x[torch.arange(batch, device=x.device) % len(x)] if of_tensor.get(0) == BATCH else x.clone()
        for x, of_tensor in zip(tensors, dims, strict=True)
    ]


class _AnyBatch:
    """Stands for the batch in a shape that is kept, and is equal to any."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def of_any_batch(module: nn.Module, batch: int) -> Iterator[None]:
    """Inside, shapes that sub-modules keep as attributes are equal to those of any batch, so that what was computed for
    them is used again. Right where that does not depend on the batch, which is to be checked."""
    kept: list[tuple[nn.Module, str, Any]] = []
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Size) and value[:1] == (batch,):
                kept.append((part, name, value))
                part.__dict__[name] = (_AnyBatch(), *value[1:])
    try:
        yield
    finally:
        for part, name, value in kept:
            part.__dict__[name] = value
