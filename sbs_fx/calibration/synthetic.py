"""Synthetic input for a network without data: standard normal, within what normalised images can be.

In: example inputs, mean and deviation that a model says its images are normalised with. Out: batches.
Holds: the same inputs give the same batches; whole numbers are taken from the example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

_NUMBERS = 2 * 3 * 224 * 224  # in a batch; at most 64 images
_BATCHES = 2
_KEY = "sbs_fx_image_bounds"

Bounds = tuple[Tensor, Tensor]  # least and largest value of each channel, both (channels,)


def set_bounds(graph: fx.GraphModule, inputs: Sequence[Tensor], metadata: Mapping[str, Any]) -> None:
    """Say what images a graph takes: pixels from 0 to 1, less `mean`, by `std`; its copies say the same. Nothing is
    said of a graph that takes anything but one batch of images of that many channels."""
    mean, std = (torch.tensor(metadata.get(key, ()), dtype=torch.float32) for key in ("mean", "std"))
    if len(inputs) == 1 and inputs[0].ndim > 1 and len(mean) == len(std) == inputs[0].shape[1]:
        graph.meta[_KEY] = -mean / std, (1 - mean) / std


def bounds_of(graph: fx.GraphModule) -> Bounds | None:
    """What was said of a graph."""
    return graph.meta.get(_KEY)


def synthetic(
    inputs: Sequence[Tensor], max_batches: int, least: int, bounds: Bounds | None
) -> Iterator[tuple[Tensor, ...]]:
    """Normal input from a generator of its own; whole numbers are taken from the example, again and again."""
    generator = torch.Generator().manual_seed(0)
    largest = max(x[:1].numel() for x in inputs)
    batch = max(least, min(64, _NUMBERS // max(1, largest)))
    enough = -(-_BATCHES * _NUMBERS // max(1, batch * largest))  # of very large images, one has it all
    for _ in range(min(max_batches, _BATCHES, enough)):
        rows = torch.arange(batch) % len(inputs[0])
        yield tuple(
            _within(torch.randn(batch, *x.shape[1:], generator=generator), bounds).to(x.device, x.dtype)
            if x.is_floating_point()
            else x[rows.to(x.device)]
            for x in inputs
        )


def _within(x: Tensor, bounds: Bounds | None) -> Tensor:
    if bounds is None:
        return x
    low, high = (bound.view(-1, *[1] * (x.ndim - 2)) for bound in bounds)
    return torch.minimum(torch.maximum(x, low), high)
