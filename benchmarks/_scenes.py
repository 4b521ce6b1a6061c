"""Pictures with a few handwritten digits on them, and two networks that find them.

In: scikit-learn's digits, a seed, maybe pictures to stand behind them. Out: batches of (images, masks) and of (images,
boxes); a U-Net that segments, a detector of centres (after arXiv 1904.07850) with its loss and its boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, STRIDE, CLASSES, MOST = 64, 4, 10, 4


class Scenes:
    """Batches of `count` scenes, the same each time: images (batch, 3, SIZE, SIZE) with mean about 0 and deviation 1,
    and masks (batch, SIZE, SIZE), 0 where no digit is, or a dict of boxes and labels an image."""

    def __init__(
        self, split: str, count: int, batch: int = 50, boxes: bool = False, behind: Tensor | None = None
    ) -> None:
        self.batch, self.boxes = batch, boxes
        digits, half = load_digits(), 1300
        part = slice(0, half) if split == "train" else slice(half, None)
        shapes, labels = torch.from_numpy(digits.images[part]).float() / 16, digits.target[part]
        random = np.random.default_rng(0 if split == "train" else 1)
        drawn = [_scene(shapes, labels, random, behind) for _ in range(count)]
        self.images = torch.stack([image for image, _, _ in drawn])
        self.masks = torch.stack([mask for _, mask, _ in drawn])
        self.targets = [target for _, _, target in drawn]

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        for start in range(0, len(self.images), self.batch):
            part = slice(start, start + self.batch)
            yield self.images[part], self.targets[part] if self.boxes else self.masks[part]


def _scene(shapes: Tensor, labels: Any, random: Any, behind: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    if behind is None:  # soft noise of two scales
        parts = [torch.from_numpy(random.normal(size=(1, 3, n, n))).float() for n in (4, 16)]
        image = sum(F.interpolate(p, size=(SIZE, SIZE), mode="bilinear")[0] for p in parts) * 0.5
    else:
        image = behind[random.integers(len(behind))].clone()
    mask = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    boxes, classes = [], []
    for _ in range(random.integers(1, MOST + 1)):
        which, side = random.integers(len(shapes)), int(random.integers(14, 27))
        shape = F.interpolate(shapes[which][None, None], size=(side, side), mode="bilinear")[0, 0]
        top, left = (int(random.integers(SIZE - side + 1)) for _ in range(2))
        inside = (slice(top, top + side), slice(left, left + side))
        if bool(mask[inside].any()):
            continue
        colour = torch.from_numpy(random.normal(size=3)).float()
        colour = 2.5 * colour / colour.norm()
        image[(slice(None), *inside)] += (colour[:, None, None] - image[(slice(None), *inside)]) * shape
        ink = shape > 0.4
        mask[inside][ink] = int(labels[which]) + 1
        rows, columns = (ink.any(k).nonzero()[:, 0] for k in (1, 0))
        corners = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        boxes.append([float(c) for c in corners])
        classes.append(int(labels[which]))
    return image, mask, {"boxes": torch.tensor(boxes), "labels": torch.tensor(classes)}


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layers = []
    for i, n in enumerate((inputs, outputs)):
        layers += [nn.Conv2d(n, outputs, 3, stride if i == 0 else 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Segmenter(nn.Module):
    """Images -> logits (batch, 1 + CLASSES, SIZE, SIZE)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(
            _block(i, o, 1 + (k > 0)) for k, (i, o) in enumerate(zip([3, *widths], widths, strict=False))
        )
        self.up = nn.ModuleList(_block(a + b, a) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Conv2d(width, 1 + CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        levels = []
        for block in self.down:
            images = block(images)
            levels.append(images)
        x = levels.pop()
        for block in reversed(self.up):
            x = block(torch.cat([levels.pop(), F.interpolate(x, scale_factor=2.0)], 1))
        return self.head(x)


class Detector(nn.Module):
    """Images -> a dict of "heat" (batch, CLASSES, ...) and "sides" (batch, 4, ...): logits of a centre being there, and
    how far the box's sides are from it in strides."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(_block(3, width), _block(width, 2 * width, 2), _block(2 * width, 4 * width, 2))
        self.deep, self.wide = _block(4 * width, 8 * width, 2), _block(12 * width, 4 * width)
        self.heat, self.sides = nn.Conv2d(4 * width, CLASSES, 1), nn.Conv2d(4 * width, 4, 1)
        nn.init.constant_(self.heat.bias, -4.0)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.body(images)
        x = self.wide(torch.cat([x, F.interpolate(self.deep(x), scale_factor=2.0)], 1))
        return {"heat": self.heat(x), "sides": self.sides(x).exp()}


def detection_loss(outputs: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """Focal loss of centres, distance of sides, an object."""
    heat, sides = outputs
    goal, total, count = torch.zeros_like(heat), heat.new_zeros(()), 0
    place = torch.arange(heat.shape[-1], device=heat.device)
    for i, target in enumerate(targets):
        for box, label in zip(target["boxes"] / STRIDE, target["labels"], strict=True):
            x, y = ((box[:2] + box[2:]) / 2).long().clamp(0, heat.shape[-1] - 1)
            spread = ((box[2:] - box[:2]) / 6).clamp_min(0.3)
            bump = torch.exp(-0.5 * (((place - x) / spread[0]) ** 2 + ((place - y)[:, None] / spread[1]) ** 2))
            goal[i, label] = torch.maximum(goal[i, label], bump)
            centre = torch.stack([x, y]).to(box) + 0.5
            total = total + F.l1_loss(sides[i, :, y, x], torch.cat([centre - box[:2], box[2:] - centre]).clamp_min(0.1))
            count += 1
    p = heat.sigmoid().clamp(1e-4, 1 - 1e-4)
    there = goal == 1
    focal = torch.where(there, -((1 - p) ** 2) * p.log(), -((1 - goal) ** 4) * p**2 * (1 - p).log()).sum()
    return (focal + total) / max(1, count)


def boxes_of(output: dict[str, Tensor], most: int = 20) -> list[dict[str, Tensor]]:
    """The greatest centres that no neighbour exceeds."""
    heat = output["heat"].sigmoid()
    heat = torch.where(F.max_pool2d(heat, 3, 1, 1) == heat, heat, 0)
    images = []
    for scores, sides in zip(heat, output["sides"], strict=True):
        best, where = scores.flatten().topk(most)
        label, y, x = np.unravel_index(where.cpu().numpy(), scores.shape)
        near = sides[:, y, x].T
        centre = torch.stack([torch.from_numpy(x), torch.from_numpy(y)], 1).to(near) + 0.5
        corners = torch.cat([centre - near[:, :2], centre + near[:, 2:]], 1) * STRIDE
        images.append({"boxes": corners, "scores": best, "labels": torch.from_numpy(label)})
    return images
