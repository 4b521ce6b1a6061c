"""The CIFAR residual network of the published tables: 6n + 2 layers, widths 16-32-64.

Shortcuts are 1x1 convolutions, or every second pixel zero-padded by a quarter of the new width on both sides.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sbs_fx.data.datasets import Batches, open_data

CIFAR10 = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, padded: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        self.padding = outputs // 4 if padded and stride > 1 else 0
        if stride > 1 and not padded:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class CifarResNet(nn.Module):
    """Images (batch, 3, 32, 32) to logits (batch, classes). `depth` is 6n + 2."""

    def __init__(self, depth: int = 20, classes: int = 100, *, padded_shortcuts: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, outputs in enumerate((16, 32, 64), start=1):
            blocks = [
                Block(width if i == 0 else outputs, outputs, 2 if i == 0 and stage > 1 else 1, padded_shortcuts)
                for i in range((depth - 2) // 6)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            width = outputs
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def padded_resnet20(weights: Path) -> CifarResNet:
    """The CIFAR-10 ResNet-20 with parameter-free shortcuts, from safetensors, in eval mode."""
    net = CifarResNet(20, classes=10, padded_shortcuts=True)
    net.load_state_dict({k.replace("linear.", "fc."): v for k, v in load_file(weights).items()})
    return net.eval()


def cifar10(folder: Path, split: str, batch_size: int, **options: Any) -> Batches:
    """One split of CIFAR-10 (arrays in `folder`), normalised as that network takes it."""
    return open_data(str(folder), split=split, batch_size=batch_size, image_size=32, channels=3, **CIFAR10, **options)


def cifar10_parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark on that network."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=int, default=10_000, help="of the test set")
    parser.add_argument("--out", type=Path, required=True)
    return parser
