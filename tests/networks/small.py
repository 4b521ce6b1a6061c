"""Small networks and batches by hand, shared by the tests of several folders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sbs_fx.data.datasets import open_data

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 4) for _ in range(count)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(512, 10),
    )


def digits(split: str = "train", count: int | None = None, **options: Any) -> Any:
    data = open_data("digits", split=split, batch_size=64, image_size=8, channels=1, mean=[0.3], std=[0.37], **options)
    if count is not None:
        data.images, data.labels = data.images[:count], data.labels[:count]  # type: ignore[attr-defined]
    return data


class Residual(nn.Module):
    """A pool, an add of two convolutions, one of a convolution and what it read, a mean and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 1)
        self.inner, self.head = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        x = torch.relu(self.left(x) + self.right(x))
        return self.head(torch.relu(x + self.inner(x)).mean((2, 3)))


class Normed(nn.Module):
    """A layer, its batch norm with scales of both signs and one of zero, and a layer that quantises what comes out."""

    def __init__(self, layer: nn.Module, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.head = layer, norm, head
        norm.weight.data.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(norm.weight.shape) < 0.5, -1.0, 1.0))
        norm.weight.data[0] = 0.0
        norm.bias.data.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(x)).relu())


LAYERS: dict[str, Callable[[], Normed]] = {
    "conv": lambda: Normed(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "no bias": lambda: Normed(nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "same": lambda: Normed(nn.Conv2d(8, 12, 3, padding="same"), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "grouped": lambda: Normed(nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "depthwise": lambda: Normed(nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1)),
    "transposed": lambda: Normed(nn.ConvTranspose2d(8, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "grouped transposed": lambda: Normed(
        nn.ConvTranspose2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)
    ),
    "linear": lambda: Normed(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 2)),
    "conv1d": lambda: Normed(nn.Conv1d(8, 12, 3), nn.BatchNorm1d(12), nn.Conv1d(12, 2, 1)),
    "conv3d": lambda: Normed(nn.Conv3d(8, 12, 3), nn.BatchNorm3d(12), nn.Conv3d(12, 2, 1)),
}
