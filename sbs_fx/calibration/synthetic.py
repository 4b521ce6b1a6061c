"""Synthetic input for a network without data: noise to observe it with, and pictures to refit its layers on.

In: example inputs, mean and deviation that a model says its images are normalised with. Out: batches of standard normal
values, within what normalised images can be; or pictures: "dead leaves" (discs that hide each other, radii as r^-3) and
noise whose amplitude falls as 1/f, whose edges and spectra are those of photographs (arXiv 2106.05963).
Holds: the same inputs give the same batches; whole numbers are taken from the example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_NUMBERS = 2 * 3 * 224 * 224  # in a batch; at most 64 images
_BATCHES = 2
_PICTURES, _DISCS, _LEAVES_SIDE = 64, 200, 112
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


def pictures(inputs: Sequence[Tensor], bounds: Bounds | None) -> tuple[Tensor, ...]:
    """One batch: by turns leaves and noise where the example is images (batch, channels, height, width), else normal
    values. Without bounds, images have mean 0 and deviation 1, more or less."""
    generator = torch.Generator().manual_seed(0)
    count = max(8, min(_PICTURES, _PICTURES * _NUMBERS // (2 * max(x[:1].numel() for x in inputs))))
    made = []
    for x in inputs:
        if not x.is_floating_point():
            made.append(x[(torch.arange(count) % len(x)).to(x.device)])
            continue
        if x.ndim != 4:
            values = torch.randn(count, *x.shape[1:], generator=generator)
        else:
            parts = _leaves(-(-count // 2), x.shape[1:], generator), _noise(count // 2, x.shape[1:], generator)
            values = torch.empty(count, *x.shape[1:])
            values[::2], values[1::2] = parts
            low, high = (b.view(-1, 1, 1) for b in bounds or (torch.tensor(-2.0), torch.tensor(2.0)))
            values = (low + (high - low) * values).contiguous(memory_format=torch.channels_last)
        made.append(values.to(x.device, x.dtype))
    return tuple(made)


def _leaves(count: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Values from 0 to 1, drawn at most 112 high and wide."""
    channels, *size = map(int, shape)
    height, width = (min(side, _LEAVES_SIDE) for side in size)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    largest = max(4.0, max(height, width) / 2)
    drawn = torch.rand(count, channels, 1, 1, generator=generator).repeat(1, 1, height, width)
    for picture in drawn:
        share = torch.rand(_DISCS, generator=generator)
        radii = (0.25 + (largest**-2 - 0.25) * share) ** -0.5  # from 2 on, its density as r^-3
        centres = torch.rand(2, _DISCS, generator=generator) * torch.tensor([[height], [width]])
        colours = torch.rand(_DISCS, channels, 1, generator=generator)
        for radius, row, column, colour in zip(radii, *centres, colours, strict=True):
            picture[:, (rows - row) ** 2 + (columns - column) ** 2 < radius**2] = colour
    return F.interpolate(drawn, size=size, mode="bilinear") if size != [height, width] else drawn


def _noise(count: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Values from 0 to 1, channels mixed at random."""
    channels, height, width = map(int, shape)
    frequency = torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2
    frequency[0, 0] = 1 / (height * width)
    white = torch.randn(count, channels, height, width, generator=generator)
    x = torch.fft.irfft2(torch.fft.rfft2(white) / frequency.sqrt(), s=(height, width))
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True).clamp_min(1e-6)
    mixing = 0.3 * torch.randn(count, channels, channels, generator=generator) + 1 / channels
    x = torch.einsum("nij,njhw->nihw", mixing, x)
    return (0.5 + 0.25 * x / x.std((1, 2, 3), keepdim=True).clamp_min(1e-6)).clamp(0, 1)


def _within(x: Tensor, bounds: Bounds | None) -> Tensor:
    if bounds is None:
        return x
    low, high = (bound.view(-1, *[1] * (x.ndim - 2)) for bound in bounds)
    return torch.minimum(torch.maximum(x, low), high)
