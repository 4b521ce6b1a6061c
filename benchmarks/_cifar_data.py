"""CIFAR-100 on one device: uint8 images there once, crops and flips computed there.

In: a folder of arrays, or one that torchvision downloads into. Out: batches with `set_epoch`, normalised with the
training set's mean and deviation; the training split is shuffled, cropped from the 4-pixel padded image and flipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
PAD = 4


class CifarBatches:
    """(images float32 (batch, 3, 32, 32), labels int64 (batch,)); the passes follow from `seed` and their number."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, train: bool) -> None:
        self.images, self.labels, self.batch_size, self.train = images, labels, batch_size, train
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
        self.scale, self.shift = 1 / (255 * std), mean / std
        self.seed = self.epoch = 0

    def __len__(self) -> int:
        count = len(self.labels)
        return count // self.batch_size if self.train else -(-count // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        count = len(self.labels)
        order = torch.randperm(count, generator=generator) if self.train else torch.arange(count)
        for chosen in order.split(self.batch_size)[: len(self)]:
            chosen = chosen.to(self.images.device)
            images = self.images[chosen]
            if self.train:
                images = _augment(images, generator)
            yield images * self.scale - self.shift, self.labels[chosen]


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    count, device = len(images), images.device
    top, left = (torch.randint(2 * PAD + 1, (count, 1), generator=generator).to(device) for _ in range(2))
    flipped = (torch.rand(count, 1, generator=generator) < 0.5).to(device)
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    span = torch.arange(32, device=device)
    columns = left + torch.where(flipped, span.flip(0), span)
    rows = (top + span)[:, None, :, None]
    each = torch.arange(count, device=device)[:, None, None, None]
    return padded[each, torch.arange(3, device=device)[None, :, None, None], rows, columns[:, None, None, :]]


def batches(folder: Path | None, split: str, batch_size: int, device: torch.device) -> CifarBatches | None:
    """One split; None if it is not there and cannot be downloaded."""
    if folder is not None and (folder / f"{split}_images.npy").is_file():
        images, labels = (np.load(folder / f"{split}_{kind}.npy") for kind in ("images", "labels"))
    else:
        from torchvision.datasets import CIFAR100

        try:
            found = CIFAR100(str(folder or Path("out/data")), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            print(f"CIFAR-100 cannot be downloaded: {error}")
            return None
        images, labels = found.data, np.asarray(found.targets)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
    size = batch_size if split == "train" else 500
    return CifarBatches(pixels, torch.from_numpy(labels.astype(np.int64)).to(device), size, split == "train")
