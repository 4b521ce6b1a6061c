"""What a block of a random network is: the state it reads and writes, and the table of kinds.

A network is a chain of blocks, each of which reads one tensor and writes one. The tensor is either an image
(B, C, H, W) or tokens (B, prefix + H * W, C). A block class is built from the `State` it reads and from options, and
leaves in `out` the state it writes. Invariants that keep every chain of blocks valid: C is a multiple of 4 between 4
and `MAX_WIDTH`; H and W are at least 2; a block that cannot do what its options say in the state it is given (a stride
on a 2 x 2 image) does the nearest thing it can; what happens to one sample does not depend on the other samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Space = Literal["image", "tokens"]
Choice = bool | int | str

MAX_WIDTH = 24


@dataclass(frozen=True)
class State:
    """Shape of one sample between two blocks; `prefix` counts class tokens in front of the H * W image tokens."""

    space: Space
    channels: int
    height: int
    width: int
    prefix: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.height * self.width

    @property
    def smallest_side(self) -> int:
        return min(self.height, self.width)

    def but(self, channels: int | None = None, height: int | None = None, width: int | None = None) -> State:
        """The same state with another width or another image size."""
        return replace(
            self,
            channels=self.channels if channels is None else channels,
            height=self.height if height is None else height,
            width=self.width if width is None else width,
        )


class Block(nn.Module):
    """Base of all blocks: writes what it reads unless a subclass sets `out`."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.out = state


@dataclass(frozen=True)
class Kind:
    """One kind of block: the space it works in, its class, and the choices of each option, the simplest first."""

    name: str
    space: Space
    make: Callable[..., Block]
    options: dict[str, tuple[Choice, ...]]


BLOCKS: dict[str, Kind] = {}
"""Every kind by name; the block files fill it when they are imported."""

_B = TypeVar("_B", bound=type[Block])


def block(name: str, space: Space, **options: tuple[Choice, ...]) -> Callable[[_B], _B]:
    """Class decorator that enters a block in the table; `options` are keyword arguments of its constructor."""

    def enter(cls: _B) -> _B:
        if name in BLOCKS:
            raise ValueError(f"two kinds of block are named {name!r}; rename one of them")
        BLOCKS[name] = Kind(name, space, cls, options)
        return cls

    return enter


# Layers that several blocks use


def pointwise(channels: int, out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1, bias=bias)


def conv_norm_act(channels: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU: (B, channels, H, W) -> (B, out, ceil(H / stride), ...)."""
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


class ToTokens(Block):
    """(B, C, H, W) -> (B, H * W, C)."""

    def __init__(self, state: State) -> None:
        super().__init__(replace(state, space="tokens"))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class ToImage(Block):
    """(B, prefix + H * W, C) -> (B, C, H, W); class tokens are dropped."""

    def __init__(self, state: State) -> None:
        super().__init__(replace(state, space="image", prefix=0))
        self.prefix = state.prefix

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.prefix :].transpose(1, 2)
        return x.reshape(x.shape[0], self.out.channels, self.out.height, self.out.width)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """Norm of each channel over the image, divided by its mean over channels (ConvNeXt V2, equation 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x + self.scale * (x * (norm / (norm.mean(dim=1, keepdim=True) + 1e-6))) + self.bias


class GatedGroupNorm(nn.Module):
    """x * sigmoid(v x) divided by the standard deviation of a group of channels (EvoNorm S0, table 2)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.v = nn.Parameter(torch.ones(channels))
        self.scale = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        grouped = x.reshape(b, self.groups, c // self.groups, h, w)
        deviation = (grouped.var(dim=(2, 3, 4), unbiased=False, keepdim=True) + 1e-3).sqrt()
        deviation = deviation.expand(grouped.shape).reshape(x.shape)
        gated = x * torch.sigmoid(x * self.v.view(1, -1, 1, 1))
        return gated / deviation * self.scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def image_norm(name: str, channels: int) -> nn.Module:
    """A normalisation of (B, C, H, W) by name."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: nn.BatchNorm2d(channels, eps=1e-3),
        "group": lambda: nn.GroupNorm(4, channels),
        "one_group": lambda: nn.GroupNorm(1, channels),
        "instance": lambda: nn.GroupNorm(channels, channels, eps=1e-2),
        "layer": lambda: ChannelLayerNorm(channels),
        "response": lambda: ResponseNorm(channels),
        "evo": lambda: GatedGroupNorm(channels, 4),
        "evo_one": lambda: GatedGroupNorm(channels, 1),
    }
    return makers[name]()


def activation(name: str, channels: int) -> nn.Module:
    """An activation by name; "prelu" has a slope per channel (dimension 1)."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "relu6": lambda: nn.ReLU6(inplace=True),
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "hardswish": nn.Hardswish,
        "sigmoid": nn.Sigmoid,
        "exp": Exp,
        "prelu": lambda: nn.PReLU(channels),
        "floor": Floor,
    }
    return makers[name]()


class Floor(nn.Module):
    """A clamp with one bound."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


class Exp(nn.Module):
    """exp(-x^2), which is 1 at 0: a silenced coordinate becomes the largest one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-x * x)


def standardise(weight: Tensor, by: str) -> Tensor:
    """Weight with zero mean and unit variance over everything but its first dimension, times fan_in ** -0.5."""
    fan_in = weight[0].numel()
    if by == "batch_norm":
        flat = F.batch_norm(weight.reshape(1, weight.shape[0], -1), None, None, training=True, momentum=0.0, eps=1e-5)
        return flat.reshape(weight.shape) * fan_in**-0.5
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    var = weight.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
    return (weight - mean) * torch.rsqrt(var * fan_in + 1e-5)
