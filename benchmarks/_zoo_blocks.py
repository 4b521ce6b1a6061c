"""Blocks that the networks of the zoo benchmark share."""

from __future__ import annotations

from _zoo_networks import images
from torch import nn

IMAGES = images(3, 32, 32)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def stem(width: int = 16) -> nn.Sequential:
    return nn.Sequential(conv(3, width, stride=2), conv(width, width, stride=2))


class Head(nn.Sequential):
    """Pool and classify."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
