"""Folders of pictures, a folder a class, numbered alike in all splits and prepared as timm prepares them.

In: a folder, with folders for splits or without. Out: the pictures of one split with labels. Holds: a class has the
same number in each split; a file that cannot be read is named, never replaced by another; 16 bits are scaled, not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sbs_fx.plan.errors import DataError

SPELLINGS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation", "eval", "evaluation")}
_SYNSETS = 1000  # classes of ImageNet-1k, whose folders have the names of WordNet
_NAMED = 5  # files or classes that an error lists


def split_folders(folder: Path) -> dict[str, Path]:
    """Split -> its folder, of those that there are."""
    found = {
        split: next((folder / s for s in spellings if (folder / s).is_dir()), None)
        for split, spellings in SPELLINGS.items()
    }
    return {split: place for split, place in found.items() if place is not None}


class Pictures(torch.utils.data.Dataset[tuple[Any, int]]):
    """Pictures of one split by number: (what `transform` makes of the picture, label).

    Attributes:
        classes: names by number, of all splits together. missing: those without a picture in this split.
        skipped: files that were left out, as they cannot be read.
    """

    def __init__(self, folder: Path, split: str, num_classes: int | None = None, skip_unreadable: bool = False) -> None:
        places = split_folders(folder)
        if places and split not in places:
            raise DataError(
                f"{str(folder)!r} has no folder for the split {split!r}; expected one of {SPELLINGS[split]}"
            )
        root = places.get(split, folder)
        numbers = _numbers(folder, list(places.values()) or [folder], num_classes)
        self.samples = _found(root, numbers)
        if not self.samples:
            raise DataError(
                f"no images in {str(root)!r}; expected a folder a class with image files in it, or arrays such as "
                "train_images.npy"
            )
        self.transform: Callable[[Image.Image], Any] = np.asarray
        self.classes = tuple(sorted(numbers, key=numbers.__getitem__))
        there = {label for _, label in self.samples}
        self.missing = tuple(name for name in self.classes if numbers[name] not in there)
        self.skipped: tuple[str, ...] = ()
        if skip_unreadable:
            bad = {path for path, _ in self.samples if _problem(path) is not None}
            self.samples = [sample for sample in self.samples if sample[0] not in bad]
            self.skipped = tuple(sorted(bad))
            if not self.samples:
                raise DataError(f"none of the {len(bad)} pictures in {str(root)!r} can be read")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(read_picture(path)), label


def read_picture(path: str) -> Image.Image:
    """A picture of 8 bits a channel. Raises DataError that names the file."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I"):  # 16 bits, whatever the file says they are stored in
                return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path!r} is no picture that can be read ({type(error).__name__}: {error}); mend or remove it, or leave "
            "such files out with skip_unreadable=True (--skip-unreadable)"
        ) from error


def _problem(path: str) -> DataError | None:
    try:
        read_picture(path)
    except DataError as error:
        return error
    return None


def _numbers(folder: Path, places: Sequence[Path], num_classes: int | None) -> Mapping[str, int]:
    """Class name -> number, of all splits: in the order of names, or that of ImageNet where names are WordNet's."""
    from timm.data import ImageNetInfo
    from timm.utils.misc import natural_key

    names = {entry.name for place in places for entry in place.iterdir() if entry.is_dir()}
    names = {name for name in names if any(any(_images(place / name)) for place in places)}
    if not names:
        raise DataError(
            f"no images in class folders of {str(folder)!r}; expected a folder a class with image files in it, or "
            "arrays such as train_images.npy"
        )
    if num_classes == _SYNSETS:
        synsets = {name: i for i, name in enumerate(ImageNetInfo().label_names())}
        if names <= synsets.keys():
            return {name: synsets[name] for name in sorted(names)}
    if num_classes is not None and len(names) != num_classes:
        raise DataError(
            f"{str(folder)!r} has {len(names)} classes ({listed(sorted(names, key=natural_key))}) and the model has "
            f"{num_classes}; labels would mean other things. Give the data that the model was trained for, or a "
            f"model of these classes (on the command line --num-classes {len(names)} with --checkpoint FILE)"
        )
    return {name: i for i, name in enumerate(sorted(names, key=natural_key))}


def listed(names: Sequence[str]) -> str:
    """The first of them, and that there are more."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _found(root: Path, numbers: Mapping[str, int]) -> list[tuple[str, int]]:
    """Image files in the folders of classes, with the number of the class."""
    return [(str(path), label) for name, label in numbers.items() for path in sorted(_images(root / name))]


def _images(folder: Path) -> Iterator[Path]:
    """Image files below a folder, by extension; none where there is no folder."""
    from timm.data.readers.img_extensions import get_img_extensions

    known = tuple(get_img_extensions())
    return (path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())


def timm_transform(size: tuple[int, int], channels: int, augment: bool, **card: Any) -> Callable[[Image.Image], Tensor]:
    """How timm makes a tensor of a picture of a model: for evaluation, or for training."""
    from timm.data import create_transform

    transform: Callable[[Image.Image], Tensor] = create_transform(
        (channels, *size), is_training=augment, use_prefetcher=False, **card
    )
    return transform


class _Converted:
    """A transform that first brings a picture to the model's number of channels."""

    def __init__(self, mode: str, transform: Any) -> None:
        self.mode, self.transform = mode, transform

    def __call__(self, image: Any) -> Any:
        return self.transform(image.convert(self.mode))


def prepared_picture(channels: int, transform: Any) -> Callable[[Any], Any]:
    """A transform for pictures of any mode; it can be sent to the workers of a loader."""
    return _Converted("L" if channels == 1 else "RGB", transform)
