"""Images with labels, by name.

In: a name such as "digits", "torch/cifar100", "hfds/..." or a folder. Out: batches.
Holds: what `open_data` gives can be iterated again and again; without shuffling each pass is the same, with it the
passes follow from the seed; everything that can be wrong with data surfaces as a `DataError` that names the batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sbs_fx.data.batches import check_labels
from sbs_fx.data.pictures import Pictures, prepared_picture, timm_transform
from sbs_fx.plan.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SPLITS = ("train", "test")
_HUBS = ("torch", "hfds", "hfids", "tfds", "wds")
_KNOWN = f"'digits', a folder, or a name that starts with {', '.join(f'{hub!r}' for hub in _HUBS)} and a slash"


def open_data(
    spec: str,
    *,
    split: str = "train",
    batch_size: int = 64,
    image_size: int | tuple[int, int] = 224,
    channels: int = 3,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    shuffle: bool = False,
    augment: bool = False,
    seed: int = 0,
    num_classes: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    interpolation: str = "bilinear",
    num_workers: int = 0,
    skip_unreadable: bool = False,
) -> Batches:
    """Labelled images by name, resized, cropped and normalised as timm does it for evaluation.

    | spec                        | gives                                                                             |
    |-----------------------------|-----------------------------------------------------------------------------------|
    | "digits"                    | scikit-learn's 1,797 scans of 8 x 8; one in five of each class is "test"          |
    | a folder of arrays          | {train,test}_images.npy, uint8 (N, H, W, C), and {train,test}_labels.npy, (N,)    |
    | a folder of images          | a folder a class, below train/ and test/ (or val/, validation/) if there are such |
    | "torch/...", "hfds/...", ...| timm's data sets by timm's names, kept in `data_dir`, downloaded if need be       |

    Args:
        split: "train" or "test".
        image_size: of the result, (height, width) or one number for both.
        channels: of the result: grey images are repeated, colour images averaged.
        mean, std: one number a channel, of values from 0 to 1.
        shuffle: a new order for each pass, all passes determined by `seed`.
        augment: random crops of the image padded by an eighth and, except for "digits", flips; timm's training
            transforms for image folders and timm's data sets.
        num_classes: of the model: labels are checked against it, and so is the number of classes of an image folder,
            whose numbers are those of ImageNet where there are 1,000 and the folders have WordNet's names.
        data_dir: where timm's data sets are; for a folder, what a relative `spec` is relative to.
        crop_pct, crop_mode, interpolation: as timm names them, of pictures and of arrays of another size.
        num_workers: processes that read pictures.
        skip_unreadable: leave files out that are no pictures, in place of an error that names the first.

    Returns:
        An iterable with a length, of (images float32 (batch, channels, height, width), labels int64 (batch,)).

    Raises:
        DataError: unknown name or split, a folder that is missing or has no images, labels out of range, a data set
            that timm cannot open (chained).
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r}; expected one of {SPLITS}")
    if batch_size < 1:
        raise DataError(f"batch_size {batch_size}; expected at least 1")
    size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    shape = _Shape(
        size,
        channels,
        _per_channel("mean", mean, channels),
        _per_channel("std", std, channels),
        {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation},
    )
    folder = Path(data_dir or ".", spec).expanduser()
    hub, slash, _ = spec.partition("/")
    is_hub = bool(slash) and hub.lower() in _HUBS and not folder.is_dir()
    if spec == "digits":
        images, labels = _digits(split)
    elif not is_hub and not folder.is_dir():
        raise DataError(f"no data is called {spec!r} and there is no folder {str(folder)!r}; expected {_KNOWN}")
    elif not is_hub and (folder / f"{split}_images.npy").is_file():
        images, labels = _arrays(folder, split)
    elif not is_hub and any(folder.glob("*_images.npy")):
        raise DataError(
            f"{str(folder)!r} has no {split}_images.npy; expected {split}_images.npy and "
            f"{split}_labels.npy beside what is there"
        )
    else:
        if channels not in (1, 3):
            raise DataError(f"{channels} channels; expected 1 or 3 for image files, or arrays in .npy files")
        dataset = (
            _hub_dataset(spec, split, data_dir) if is_hub else Pictures(folder, split, num_classes, skip_unreadable)
        )
        return LoaderBatches(dataset, shape, batch_size, shuffle, augment, seed, num_classes, num_workers)
    check_labels(torch.from_numpy(labels), num_classes, 0)
    return ArrayBatches(images, labels, shape, batch_size, shuffle, augment, seed, flip=spec != "digits")


class _Shape(NamedTuple):
    """What images become."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: Mapping[str, Any]

    def transform(self, augment: bool) -> Any:
        return timm_transform(self.size, self.channels, augment, mean=self.mean, std=self.std, **self.crop)


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number a channel; the average of three where one channel is asked for, one number for all as it is."""
    numbers = tuple(float(v) for v in values)
    if len(numbers) != channels and channels == 1 and numbers:
        numbers = (sum(numbers) / len(numbers),)
    elif len(numbers) == 1:
        numbers = numbers * channels
    if len(numbers) != channels or (name == "std" and min(numbers) <= 0):
        raise DataError(
            f"{name} {tuple(values)}; expected {channels} numbers, one a channel"
            f"{', all above 0' if name == 'std' else ''}"
        )
    return numbers


class Batches:
    """An iterable of (images, labels) that has a length and can be iterated again."""

    def __init__(self, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.passes = batch_size, seed, 0

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    @property
    def pictures(self) -> int:
        """How many there are."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """What a run that goes on must find again: how many pictures, in which batches and form."""
        shape = getattr(self, "shape", None)
        return f"{self.pictures} pictures by {self.batch_size}, order {self.seed}, as {shape}"

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of epoch `epoch`, from 0, whatever was read before."""
        self.passes = epoch

    def _next_generator(self) -> torch.Generator:
        """Random numbers of the next pass: the same for the same seed and the same number of passes before."""
        self.passes += 1
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.passes)


class ArrayBatches(Batches):
    """Batches of images held as one array.

    Args:
        images: (N, H, W, C), uint8 from 0 to 255 or float from 0 to 1; may be a memory map.
        labels: (N,), whole numbers.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        shape: _Shape,
        batch_size: int,
        shuffle: bool,
        augment: bool,
        seed: int,
        flip: bool = True,
    ) -> None:
        super().__init__(batch_size, seed)
        self.images, self.labels, self.shape = images, torch.from_numpy(labels.astype(np.int64)), shape
        self.shuffle, self.augment, self.flip = shuffle, augment, flip

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    @property
    def pictures(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = self._next_generator()
        count = len(self.labels)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for chosen in order.split(self.batch_size):
            rows = np.sort(chosen.numpy())  # reason: a memory map is read forwards
            images = self._prepare(torch.from_numpy(np.ascontiguousarray(self.images[rows])), generator)
            yield images, self.labels[torch.from_numpy(rows)]

    def _prepare(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(n, H, W, C) as stored -> (n, channels, height, width) as the model takes it."""
        if images.dtype == torch.uint8 and tuple(images.shape[1:3]) != self.shape.size and not self.augment:
            return self._as_pictures(images)
        x = images.permute(0, 3, 1, 2).to(torch.float32) / (255 if images.dtype == torch.uint8 else 1)
        if tuple(x.shape[2:]) != self.shape.size:
            x = F.interpolate(x, self.shape.size, mode="bilinear", align_corners=False)
        if self.augment:
            x = _random_crop(x, generator)
            if self.flip:
                mirrored = torch.rand(len(x), generator=generator) < 0.5
                x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        x = _with_channels(x, self.shape.channels)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.shape.mean, self.shape.std))
        return (x - mean) / std

    def _as_pictures(self, images: Tensor) -> Tensor:
        """Those of another size, as timm prepares pictures."""
        mode, transform = "L" if self.shape.channels == 1 else "RGB", self.shape.transform(False)
        pictures = (Image.fromarray(x.numpy() if x.shape[2] > 1 else x[:, :, 0].numpy()) for x in images)
        return torch.stack([transform(picture.convert(mode)) for picture in pictures])


def _random_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its sides, zeros where nothing comes in."""
    height, width = x.shape[2:]
    pad_y, pad_x = max(1, height // 8), max(1, width // 8)
    padded = F.pad(x, (pad_x, pad_x, pad_y, pad_y))
    top = torch.randint(2 * pad_y + 1, (len(x), 1), generator=generator)
    left = torch.randint(2 * pad_x + 1, (len(x), 1), generator=generator)
    rows = (top + torch.arange(height))[:, None, :, None]
    columns = (left + torch.arange(width))[:, None, None, :]
    images, planes = torch.arange(len(x))[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None]
    return padded[images, planes, rows, columns]


def _with_channels(x: Tensor, channels: int) -> Tensor:
    """(n, C, H, W) with another number of channels: one is repeated, several become their average."""
    if x.shape[1] == channels:
        return x
    return (x if x.shape[1] == 1 else x.mean(1, keepdim=True)).expand(-1, channels, -1, -1)


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("'digits' needs scikit-learn, which ships them: pip install 'sbs-fx[demo]'") from error

    scans = load_digits()
    rows = np.arange(len(scans.target))
    parts = train_test_split(rows, test_size=0.2, stratify=scans.target, random_state=0)
    chosen = np.sort(parts[SPLITS.index(split)])
    images = (scans.images[chosen, :, :, None] / 16).astype(np.float32)  # reason: pixels are counts from 0 to 16
    return images, scans.target[chosen].astype(np.int64)


def _arrays(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for kind in ("images", "labels"):
        path = folder / f"{split}_{kind}.npy"
        try:
            arrays.append(np.load(path, mmap_mode="r" if kind == "images" else None, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"cannot read {str(path)!r}: {error}; expected an array that numpy.save wrote") from error
    images, labels = arrays
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] > 4:
        raise DataError(
            f"{split}_images.npy is {images.dtype} {images.shape}; expected uint8 (N, height, width, channels)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{split}_labels.npy is {labels.dtype} {labels.shape}; expected {len(images)} whole numbers")
    if not len(labels):
        raise DataError(f"{str(folder)!r} holds no {split} images; expected at least one")
    return images, labels.astype(np.int64)


def _hub_dataset(spec: str, split: str, data_dir: str | os.PathLike[str] | None) -> Any:
    from timm.data.dataset_factory import create_dataset

    root = Path(data_dir or Path("~", ".cache", "sbs_fx", "data")).expanduser()
    folder = spec.lower() in ("torch/image_folder", "torch/folder")
    options: dict[str, Any] = {} if folder else {"download": True}
    # reason: data sets spell the held-out split either way; torchvision's take any word but "train" for it
    names = ("train",) if split == "train" else ("validation", "test")
    problem: Exception | None = None
    for name in names:
        try:
            root.mkdir(parents=True, exist_ok=True)
            return create_dataset(spec, root=str(root), split=name, **options)
        except ImportError as error:
            raise DataError(
                f"cannot open {spec!r}: {error}; install what it names, for 'hfds/' with `pip install datasets`"
            ) from error
        except Exception as error:  # reason: each hub has exceptions of its own, and none is ours
            problem = problem or error
    raise DataError(
        f"cannot open {spec!r}, split {split!r}, in {str(root)!r}: {type(problem).__name__}: {problem}; "
        f"expected a name that timm.data.create_dataset knows, and a network or the files"
    ) from problem


class LoaderBatches(Batches):
    """Batches of pictures, prepared as timm prepares them. `classes`: their names, where they are known."""

    def __init__(
        self,
        dataset: Any,
        shape: _Shape,
        batch_size: int,
        shuffle: bool,
        augment: bool,
        seed: int,
        num_classes: int | None,
        num_workers: int,
    ) -> None:
        super().__init__(min(batch_size, len(dataset)) or 1, seed)
        self.dataset, self.num_classes, self.shape = dataset, num_classes, shape
        self.classes: tuple[str, ...] = getattr(dataset, "classes", ())
        dataset.transform = prepared_picture(shape.channels, shape.transform(augment))
        ordered = not shuffle or isinstance(dataset, torch.utils.data.IterableDataset)
        self.loader: Any = torch.utils.data.DataLoader(
            dataset, self.batch_size, shuffle=not ordered, num_workers=num_workers
        )

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def pictures(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = self._next_generator()
        self.loader.generator = generator
        if hasattr(self.loader.sampler, "generator"):
            self.loader.sampler.generator = generator
        for index, (images, labels) in enumerate(self.loader):
            yield images, check_labels(labels, self.num_classes, index)
