"""The two actors of `ajpq`: one chooses a layer's sparsity, the other the bitwidth of each of its channels.

In: what is known of a layer and of its channels. Out: means of actions, from which an episode draws. Both see channels
through one importance criterion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HIDDEN = 32
LAYER_FEATURES = 9
CHANNEL_FEATURES = 3
TOP_EDGE = 0.5  # a score above is the most bits; each level below takes 1
_SPREAD = 0.5  # of the first scores per deviation of log importance


class LayerController(nn.Module):
    """Features of a layer (LAYER_FEATURES,) to the logit of its sparsity, a scalar."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.net = _net(LAYER_FEATURES, first)

    def forward(self, layer: Tensor) -> Tensor:
        return self.net(layer).squeeze(-1)


class ChannelController(nn.Module):
    """Features of a layer (LAYER_FEATURES,) and of its channels (channels, CHANNEL_FEATURES), the first of which is
    their standardised importance, to a score for each; `bits_of` turns scores into bits."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.net = _net(LAYER_FEATURES + CHANNEL_FEATURES, first)

    def forward(self, layer: Tensor, channels: Tensor) -> Tensor:
        both = torch.cat([layer.expand(len(channels), -1), channels], 1)
        return self.net(both).squeeze(-1) + _SPREAD * channels[:, 0]


def _net(inputs: int, first: float) -> nn.Sequential:
    """A small network whose output is `first`, whatever goes in, until it is trained."""
    net = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
    last = net[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, first)
    return net


def bits_of(scores: Tensor, levels: Sequence[int]) -> list[int]:
    """One of the levels, ascending, for each score."""
    edges = [TOP_EDGE - k for k in reversed(range(len(levels) - 1))]
    places = torch.bucketize(scores.detach(), torch.tensor(edges, dtype=scores.dtype), right=True)
    return [levels[i] for i in places.tolist()]


@dataclass(frozen=True)
class Drawn:
    """An action, and the part of a policy gradient's loss that it brings: d `score` is the gradient of log p."""

    value: Tensor
    score: Tensor


def draw(mean: Tensor, deviation: float, generator: torch.Generator, basis: Tensor | None = None) -> Drawn:
    """A normal action around `mean`, explored along the rows of a basis (directions, actions) alone; None: a scalar.

    With u = mean + deviation * sum_k e_k v_k, e_k standard normal and the v_k orthogonal, the density of u over their
    span has d log p / d mean = sum_k e_k v_k / (deviation |v_k|^2).
    """
    rows = torch.ones(1, 1) if basis is None else basis
    noise = torch.randn(len(rows), generator=generator)
    step = (noise[:, None] * rows).sum(0)
    slope = (noise[:, None] * rows / rows.square().sum(1, keepdim=True).clamp_min(1e-12)).sum(0)
    if basis is None:
        step, slope = step.squeeze(0), slope.squeeze(0)
    score = (mean * slope).sum() / deviation if deviation else 0.0 * mean.sum()
    return Drawn((mean + deviation * step).detach(), score)
