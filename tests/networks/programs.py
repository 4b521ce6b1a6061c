"""Random networks of another spirit than `models`: programs over a pool of values, not blocks in a row.

In: a number of steps and a seed. Out: a network with one to three inputs (images, sequences, vectors) and one to three
outputs. Each step takes any values computed so far: recurrent cells, einsum, transposed convolutions, gates, shuffles,
layers that are used again, values that several steps read. Holds: the same numbers make the same network, and a program
of fewer steps is the beginning of a longer one, so that the smallest that fails is found by counting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks.models import randomise

SIDE, STEPS_IN_TIME = 6, 3
Values = list[Tensor]


@dataclass
class Step:
    """What a step reads and makes: kind and channels of its result."""

    call: Callable[..., Tensor]
    sources: tuple[int, ...]
    kind: str
    channels: int


class Program(nn.Module):
    """Kinds of values: "image" (batch, C, 6, 6), "sequence" (batch, 3, C), "vector" (batch, C)."""

    def __init__(self, steps: int, seed: int) -> None:
        super().__init__()
        self.random = Random(seed)
        self.layers = nn.ModuleList()
        kinds = ["image", *self.random.sample(["image", "sequence", "vector"], self.random.choice((0, 0, 1, 2)))]
        self.inputs = [(kind, 3 if kind == "image" else 5) for kind in kinds]
        self.steps: list[Step] = []
        self.values = list(self.inputs)
        for _ in range(steps):
            self.random.choice(OPERATORS)(self)
        made = range(len(self.inputs), len(self.values))
        more = self.random.sample(made, min(len(made), self.random.choice((0, 0, 1, 2))))
        ends = sorted({len(self.values) - 1, *more})
        self.heads = [self._head(end) for end in ends]
        randomise(self, seed)
        self.eval()

    # what a step is made of

    def module(self, layer: nn.Module) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def width(self) -> int:
        return self.random.choice((4, 6, 8))

    def pick(self, kind: str) -> tuple[int, int]:
        """A value of this kind, the last ones more often: place and channels."""
        places = [i for i, (k, _) in enumerate(self.values) if k == kind]
        if not places:
            place, channels = self.pick(next(k for k, _ in reversed(self.values)))
            return self._converted(place, channels, kind)
        place = self.random.choice(places[-3:])
        return place, self.values[place][1]

    def emit(self, call: Callable[..., Tensor], sources: tuple[int, ...], kind: str, channels: int) -> tuple[int, int]:
        self.steps.append(Step(call, sources, kind, channels))
        self.values.append((kind, channels))
        return len(self.values) - 1, channels

    def _converted(self, place: int, channels: int, kind: str) -> tuple[int, int]:
        source = self.values[place][0]
        if source == "image" and kind == "vector":
            return self.emit(lambda x: x.mean((2, 3)), (place,), kind, channels)
        if source == "image":
            return self.emit(lambda x: x.flatten(2).transpose(1, 2)[:, :STEPS_IN_TIME], (place,), kind, channels)
        if source == "sequence" and kind == "vector":
            return self.emit(lambda x: x.mean(1), (place,), kind, channels)
        if source == "sequence":
            place, channels = self._converted(place, channels, "vector")
        if kind == "sequence":
            return self.emit(lambda x: x.unsqueeze(1).expand(-1, STEPS_IN_TIME, -1), (place,), kind, channels)
        return self.emit(lambda x: x[:, :, None, None].expand(-1, -1, SIDE, SIDE), (place,), kind, channels)

    def fitted(self, place: int, kind: str, channels: int) -> int:
        """A value with so many channels: the same, or behind a layer."""
        has = self.values[place][1]
        if has == channels:
            return place
        index = self.module(nn.Conv2d(has, channels, 1) if kind == "image" else nn.Linear(has, channels))
        return self.emit(lambda x: self.layers[index](x), (place,), kind, channels)[0]

    def _head(self, place: int) -> tuple[int, int]:
        kind, channels = self.values[place]
        if kind != "vector":
            place, channels = self._converted(place, channels, "vector")
        return place, self.module(nn.Linear(channels, 3))

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values: Values = list(inputs)
        for step in self.steps:
            values.append(step.call(*(values[place] for place in step.sources)))
        outputs = tuple(self.layers[layer](values[place]) for place, layer in self.heads)
        return outputs[0] if len(outputs) == 1 else outputs

    def example(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        before, behind = {"sequence": (STEPS_IN_TIME,)}, {"image": (SIDE, SIDE)}
        return tuple(
            torch.randn(batch, *before.get(kind, ()), n, *behind.get(kind, ()), generator=generator)
            for kind, n in self.inputs
        )


# -- operators: each adds one step or a few ----------------------------------------------------------------------------


def convolution(p: Program) -> None:
    place, channels = p.pick("image")
    groups = p.random.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
    out = p.width() if groups == 1 else channels * p.random.choice((1, 2))
    layer = p.module(nn.Conv2d(channels, out, 3, padding=1, groups=groups, bias=p.random.random() < 0.5))
    p.emit(lambda x: p.layers[layer](x), (place,), "image", out)


def transposed(p: Program) -> None:
    place, channels = p.pick("image")
    groups, out = p.random.choice([g for g in (1, 1, 2) if channels % g == 0]), p.width()
    down = p.module(nn.Conv2d(channels, out, 2, stride=2, groups=groups))
    up = p.module(nn.ConvTranspose2d(out, out, 2, stride=2, groups=p.random.choice((1, 2))))
    p.emit(lambda x: p.layers[up](F.relu(p.layers[down](x))), (place,), "image", out)


def norm(p: Program) -> None:
    place, channels = p.pick("image")
    layer = p.module(nn.BatchNorm2d(channels))
    p.emit(lambda x: F.relu(p.layers[layer](x)), (place,), "image", channels)


def again(p: Program) -> None:
    """One layer on two values that fit it, added."""
    (a, channels), (b, _) = p.pick("image"), p.pick("image")
    layer = p.module(nn.Conv2d(channels, channels, 3, padding=1))
    b = p.fitted(b, "image", channels)
    p.emit(lambda x, y: p.layers[layer](x) + F.silu(p.layers[layer](y)), (a, b), "image", channels)


def gate(p: Program) -> None:
    kind = p.random.choice(("image", "sequence", "vector"))
    (a, channels), (b, others) = p.pick(kind), p.pick(kind)
    layer = p.module(nn.Conv2d(others, channels, 1) if kind == "image" else nn.Linear(others, channels))
    p.emit(lambda x, y: x * torch.sigmoid(p.layers[layer](y)), (a, b), kind, channels)


def halves(p: Program) -> None:
    """A gated linear unit: one half times the other."""
    place, channels = p.pick("image")
    layer, out = p.module(nn.Conv2d(channels, 8, 1)), 4

    def call(x: Tensor) -> Tensor:
        a, b = p.layers[layer](x).chunk(2, 1)
        return torch.tanh(a) * b

    p.emit(call, (place,), "image", out)


def shuffle(p: Program) -> None:
    place, _ = p.pick("image")
    place = p.fitted(place, "image", 8)
    groups = p.random.choice((2, 4))
    p.emit(lambda x: x.unflatten(1, (groups, 8 // groups)).transpose(1, 2).flatten(1, 2), (place,), "image", 8)


def joined(p: Program) -> None:
    kind = p.random.choice(("image", "vector"))
    (a, channels), (b, others) = p.pick(kind), p.pick(kind)
    p.emit(lambda x, y: torch.cat([x, y], 1), (a, b), kind, channels + others)


def added(p: Program) -> None:
    kind = p.random.choice(("image", "sequence", "vector"))
    (a, channels), (b, _) = p.pick(kind), p.pick(kind)
    b = p.fitted(b, kind, channels)
    p.emit(lambda x, y: x + y, (a, b), kind, channels)


def mixed(p: Program) -> None:
    """einsum over channels with a weight of its own."""
    kind = p.random.choice(("image", "sequence"))
    place, channels = p.pick(kind)
    out = p.width()
    weight = p.module(_Weight(out, channels))
    pattern = "bchw,oc->bohw" if kind == "image" else "btc,oc->bto"
    p.emit(lambda x: torch.einsum(pattern, x, p.layers[weight].weight), (place,), kind, out)


def attention(p: Program) -> None:
    (a, channels), (b, others) = p.pick("sequence"), p.pick("sequence")
    out = p.width()
    q, k, v = (p.module(nn.Linear(n, out)) for n in (channels, others, others))

    def call(x: Tensor, y: Tensor) -> Tensor:
        scores = torch.einsum("btc,bsc->bts", p.layers[q](x), p.layers[k](y)) / out**0.5
        return torch.einsum("bts,bsc->btc", scores.softmax(-1), p.layers[v](y))

    p.emit(call, (a, b), "sequence", out)


def outer(p: Program) -> None:
    a, b = p.pick("vector")[0], p.pick("vector")[0]
    a, b = p.fitted(a, "vector", 4), p.fitted(b, "vector", 3)
    p.emit(lambda x, y: torch.einsum("bi,bj->bij", x, y).flatten(1), (a, b), "vector", 12)


def linear(p: Program) -> None:
    kind = p.random.choice(("sequence", "vector"))
    place, channels = p.pick(kind)
    layer, out = p.module(nn.Linear(channels, n := p.width())), n
    p.emit(lambda x: F.gelu(p.layers[layer](x)), (place,), kind, out)


def layer_norm(p: Program) -> None:
    place, channels = p.pick("sequence")
    layer = p.module(nn.LayerNorm(channels))
    p.emit(lambda x: p.layers[layer](x), (place,), "sequence", channels)


def lstm(p: Program) -> None:
    place, channels = p.pick("sequence")
    hidden, both = p.width(), p.random.random() < 0.5
    layer = p.module(nn.LSTM(channels, hidden, batch_first=True, bidirectional=both))
    p.emit(lambda x: p.layers[layer](x)[0], (place,), "sequence", hidden * (1 + both))


def gru(p: Program) -> None:
    place, channels = p.pick("sequence")
    hidden = p.width()
    layer = p.module(nn.GRU(channels, hidden, batch_first=True))
    p.emit(lambda x: p.layers[layer](x)[0], (place,), "sequence", hidden)


def cell(p: Program) -> None:
    """A recurrent cell by hand, whose layer is used at every step in time."""
    place, channels = p.pick("sequence")
    hidden = p.width()
    inner, back = p.module(nn.Linear(channels, hidden)), p.module(nn.Linear(hidden, hidden))

    def call(x: Tensor) -> Tensor:
        state = torch.tanh(p.layers[inner](x[:, 0]))
        for i in range(1, STEPS_IN_TIME):
            state = torch.tanh(p.layers[inner](x[:, i]) + p.layers[back](state))
        return state

    p.emit(call, (place,), "vector", hidden)


def spread(p: Program) -> None:
    """A vector scales an image's channels."""
    (a, channels), (b, _) = p.pick("image"), p.pick("vector")
    b = p.fitted(b, "vector", channels)
    p.emit(lambda x, y: x * torch.sigmoid(y)[:, :, None, None], (a, b), "image", channels)


class _Weight(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


OPERATORS: tuple[Callable[[Program], None], ...] = (
    convolution, convolution, transposed, norm, again, gate, halves, shuffle, joined, added, mixed, attention, outer,
    linear, layer_norm, lstm, gru, cell, spread,
)  # fmt: skip
