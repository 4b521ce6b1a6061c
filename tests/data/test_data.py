"""Data by name and the reading of batches: splits, shapes, normalisation against arithmetic by hand, errors."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from sbs_fx.data.batches import check_labels, read_batches, start_epoch
from sbs_fx.data.datasets import IMAGENET_MEAN, IMAGENET_STD, open_data
from sbs_fx.data.prepared import prepared
from sbs_fx.plan.errors import DataError

PLAIN: dict[str, Any] = {"mean": (0.0,), "std": (1.0,)}


def gathered(data: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*data, strict=True)
    return torch.cat(images), torch.cat(labels)


def digits(**options: Any) -> Any:
    return open_data("digits", **{"image_size": 8, "channels": 1, "batch_size": 100, **PLAIN, **options})


@pytest.fixture
def array_folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 7)):
        np.save(tmp_path / f"{split}_images.npy", random.integers(0, 256, (count, 6, 5, 3), dtype=np.uint8))
        np.save(tmp_path / f"{split}_labels.npy", np.arange(count, dtype=np.uint8) % 4)
    return tmp_path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes, each of one colour, in train/ and val/."""
    for split, count in (("train", 5), ("val", 3)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 10), colour).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


# Digits


def test_digits_split_is_disjoint_complete_and_stratified() -> None:
    train, test = gathered(digits(split="train")), gathered(digits(split="test"))
    assert len(train[1]) == 1437
    assert len(test[1]) == 360
    together = torch.cat([train[0], test[0]])[:, 0] * 16
    everything = torch.from_numpy(load_digits().images).float()
    assert sorted(together.flatten(1).tolist()) == sorted(everything.flatten(1).tolist())
    share = torch.bincount(test[1]) / (torch.bincount(train[1]) + torch.bincount(test[1]))
    assert share.sub(0.2).abs().max() < 0.005  # a class has 174 to 183 scans, so one scan is 0.006 of it


def test_digits_keep_their_labels() -> None:
    scans = load_digits()
    known = {tuple(image.flatten()): int(label) for image, label in zip(scans.images, scans.target, strict=True)}
    images, labels = gathered(digits(split="test"))
    assert [known[tuple((16 * image).flatten().tolist())] for image in images] == labels.tolist()


def test_digits_are_resized_repeated_and_normalised() -> None:
    images, _ = gathered(open_data("digits", split="test", image_size=(24, 16), channels=3))
    assert images.shape == (360, 3, 24, 16)
    assert images.dtype == torch.float32
    grey, _ = gathered(digits(split="test"))
    resized = torch.nn.functional.interpolate(grey, (24, 16), mode="bilinear")
    for channel in range(3):
        expected = (resized[:, 0] - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        assert torch.allclose(images[:, channel], expected, atol=1e-6)


# Order


def test_without_shuffling_each_pass_is_the_same() -> None:
    data = digits()
    assert len(data) == 15 == sum(1 for _ in data)
    assert torch.equal(gathered(data)[0], gathered(data)[0])


def test_shuffled_passes_differ_and_follow_from_the_seed() -> None:
    data, again, other = digits(shuffle=True), digits(shuffle=True), digits(shuffle=True, seed=1)
    first, second = gathered(data)[1], gathered(data)[1]
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    assert torch.equal(first, gathered(again)[1])
    assert torch.equal(second, gathered(again)[1])
    assert not torch.equal(first, gathered(other)[1])


def test_augmented_images_are_shifted_copies() -> None:
    """Each is a crop of the padded image; digits are not flipped."""
    plain, _ = gathered(digits(split="test"))
    moved, _ = gathered(digits(split="test", augment=True))
    padded = torch.nn.functional.pad(plain, (1, 1, 1, 1))
    crops = torch.stack([padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    matches = (crops == moved).flatten(2).all(2)
    assert bool(matches.any(0).all())
    assert matches.sum(1).min() > 10


# Folders


def test_folder_of_arrays(array_folder: Path) -> None:
    data = open_data(str(array_folder), split="test", batch_size=4, image_size=(6, 5), num_classes=4)
    images, labels = gathered(data)
    stored = torch.from_numpy(np.load(array_folder / "test_images.npy")).permute(0, 3, 1, 2).float() / 255
    expected = (stored - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert torch.allclose(images, expected, atol=1e-6)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2]
    relative = open_data(array_folder.name, split="test", image_size=(6, 5), data_dir=array_folder.parent)
    assert torch.equal(gathered(relative)[0], images)


def test_shuffled_arrays_keep_images_and_labels_together(array_folder: Path) -> None:
    options: dict[str, Any] = {"split": "train", "image_size": (6, 5), "batch_size": 6}
    plain, shuffled = (gathered(open_data(str(array_folder), shuffle=s, **options)) for s in (False, True))
    label = {tuple(x.flatten().tolist()): int(y) for x, y in zip(*plain, strict=True)}
    assert [label[tuple(x.flatten().tolist())] for x in shuffled[0]] == shuffled[1].tolist()


@pytest.mark.parametrize("shuffle", [False, True])
def test_folder_of_images(image_folder: Path, shuffle: bool) -> None:
    data = open_data(
        str(image_folder),
        split="test",
        batch_size=4,
        image_size=8,
        shuffle=shuffle,
        num_classes=2,
        mean=(0.5,),
        std=(0.5,),
    )
    images, labels = gathered(data)
    assert images.shape[1:] == (3, 8, 8)
    for image, label in zip(images, labels, strict=True):
        expected = torch.tensor([-1.0, -1.0, 1.0] if label == 0 else [1.0, -1.0, -1.0])
        assert torch.allclose(image, expected.view(3, 1, 1).expand_as(image), atol=1e-6)
    if not shuffle:
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_folder_of_images_in_grey_shuffled_by_seed(image_folder: Path) -> None:
    options: dict[str, Any] = {"batch_size": 10, "image_size": 8, "channels": 1, "shuffle": True, "augment": True}
    first, again = (gathered(open_data(str(image_folder), **options, **PLAIN))[1] for _ in range(2))
    assert torch.equal(first, again)
    assert first.bincount().tolist() == [5, 5]


def test_torchvision_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's names reach timm with the split they mean; the set itself is a stand-in, no file of it is at hand."""
    import timm.data.dataset_factory as factory

    class Stored(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.count, self.transform = 6 if train else 4, None
            assert root == str(tmp_path)
            assert download

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> Any:
            return self.transform(Image.new("L", (32, 32), 255)), index  # type: ignore[misc]

    monkeypatch.setitem(factory._TORCH_BASIC_DS, "cifar10", Stored)
    for split, count in (("train", 6), ("test", 4)):
        images, labels = gathered(open_data("torch/cifar10", split=split, image_size=32, data_dir=tmp_path, **PLAIN))
        assert torch.equal(images, torch.ones(count, 3, 32, 32))
        assert labels.tolist() == list(range(count))


# Errors of open_data


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("no_such_thing", {}, "no data is called 'no_such_thing'"),
        ("digits", {"split": "holdout"}, "split 'holdout'"),
        ("digits", {"num_classes": 7}, "label 9 .*expected 0 to 6"),
        ("digits", {"batch_size": 0}, "batch_size 0"),
        ("digits", {"mean": (0.5, 0.5)}, r"mean \(0.5, 0.5\)"),
        ("digits", {"std": (0.5, 0.0, 0.5)}, "above 0"),
        ("torch/no_such_set", {}, "cannot open 'torch/no_such_set'"),
        ("hfds/no/such_set", {}, "cannot open 'hfds/no/such_set'"),
        (".", {}, "no images in"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(spec, **{"data_dir": tmp_path, "image_size": 8, **options})


def test_broken_folders(array_folder: Path, image_folder: Path) -> None:
    """Both fixtures share one directory, so it holds arrays and images."""
    labels = array_folder / "train_labels.npy"
    np.save(labels, np.full(20, 9))
    with pytest.raises(DataError, match="label 9"):
        open_data(str(array_folder), image_size=6, num_classes=4)
    np.save(labels, np.zeros(3, dtype=np.int64))
    with pytest.raises(DataError, match="expected 20 whole numbers"):
        open_data(str(array_folder), image_size=6)
    labels.write_bytes(labels.read_bytes()[:50])
    with pytest.raises(DataError, match="cannot read"):
        open_data(str(array_folder), image_size=6)
    (array_folder / "test_images.npy").unlink()
    with pytest.raises(DataError, match=r"no test_images.npy"):
        open_data(str(array_folder), split="test")
    for left in array_folder.glob("*.npy"):
        left.unlink()
    (image_folder / "val").rename(image_folder / "held_out")
    with pytest.raises(DataError, match="no folder for the split 'test'"):
        open_data(str(image_folder), split="test")


def test_labels_of_an_image_folder_are_checked(image_folder: Path) -> None:
    with pytest.raises(DataError, match="has 2 classes .blue, red. and the model has 1; labels would mean other"):
        list(open_data(str(image_folder), image_size=8, num_classes=1))


def _folder(root: Path, **splits: dict[str, list[Any]]) -> Path:
    """split -> class -> pictures."""
    for split, classes in splits.items():
        for name, pictures in classes.items():
            (root / split / name).mkdir(parents=True)
            for i, picture in enumerate(pictures):
                picture.save(root / split / name / f"{i}.png")
    return root


def test_classes_are_numbered_alike_in_all_splits(tmp_path: Path) -> None:
    """A class without pictures in one split moves no other's number."""
    one = [Image.new("RGB", (8, 8))]
    root = _folder(tmp_path, train={"a": one, "b": one, "d": one}, val={"b": one, "c": one})
    labels = {s: gathered(open_data(str(root), split=s, image_size=8))[1].tolist() for s in ("train", "test")}
    assert labels == {"train": [0, 1, 3], "test": [1, 2]}
    data: Any = open_data(str(root), split="test", image_size=8)
    assert data.classes == ("a", "b", "c", "d")
    assert data.dataset.missing == ("a", "d")


def test_folders_of_wordnet_are_numbered_as_imagenet_is(tmp_path: Path) -> None:
    one = [Image.new("RGB", (8, 8))]
    root = _folder(tmp_path, val={"n03445777": one, "n01440764": one})
    labels = gathered(open_data(str(root), split="test", image_size=8, num_classes=1000))[1]
    assert sorted(labels.tolist()) == [0, 574]  # tench and golf ball


def test_a_file_that_is_no_picture_is_named_or_left_out_when_asked(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), (255, 255, 255))
    root = _folder(tmp_path, train={"a": [picture] * 3})
    (root / "train" / "a" / "1.png").write_bytes(b"no picture")
    (root / "train" / "a" / "2.png").write_bytes((root / "train" / "a" / "2.png").read_bytes()[:44])
    with pytest.raises(DataError, match=r"1\.png' is no picture that can be read"):
        gathered(open_data(str(root), image_size=8))
    data: Any = open_data(str(root), image_size=8, skip_unreadable=True)
    assert len(gathered(data)[0]) == data.pictures == 1
    assert [Path(path).name for path in data.dataset.skipped] == ["1.png", "2.png"]


@pytest.mark.parametrize("size", [8, 16])
def test_sixteen_bits_are_scaled(tmp_path: Path, size: int) -> None:
    values = np.full((size, size), 257 * 100, np.uint16)
    root = _folder(tmp_path, train={"a": [Image.fromarray(values)]})
    images, _ = gathered(open_data(str(root), image_size=8, **PLAIN))
    assert torch.allclose(images, torch.full_like(images, 100 / 255))


@pytest.mark.parametrize("form", ["files", "array"])
def test_pictures_are_prepared_as_timm_prepares_them(tmp_path: Path, form: str) -> None:
    """Bit for bit the loader that timm evaluates with, whether pictures lie in files or in an array; shuffled too."""
    from timm.data import create_dataset, create_loader

    values = np.random.RandomState(0).randint(0, 256, (4, 40, 56, 3), np.uint8)
    pictures = [Image.fromarray(each) for each in values]
    root = _folder(tmp_path, val={"a": pictures[:2], "b": pictures[2:]})
    if form == "array":
        np.save(root / "test_images.npy", values)
        np.save(root / "test_labels.npy", np.array([0, 0, 1, 1]))
    card: dict[str, Any] = {"crop_pct": 0.875, "interpolation": "bicubic", "mean": (0.4,) * 3, "std": (0.2,) * 3}
    dataset = create_dataset("", root=str(root / "val"))
    loader = create_loader(dataset, (3, 24, 24), 4, use_prefetcher=False, device=torch.device("cpu"), **card)
    ((expected, labels),) = list(loader)
    images, given = gathered(open_data(str(root), split="test", image_size=24, **card))
    assert torch.equal(images, expected)
    assert torch.equal(given, labels)
    shuffled, order = gathered(open_data(str(root), split="test", image_size=24, shuffle=True, **card))
    assert sorted(order.tolist()) == labels.tolist()
    assert {tuple(x.flatten().tolist()) for x in shuffled} == {tuple(x.flatten().tolist()) for x in expected}


# Reading batches


def test_forms_of_batches() -> None:
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    for item, inputs, labelled in (
        (x, 1, False),
        ((x, y), 1, True),
        ([x], 1, False),
        ((x, x), 2, False),
        ((x, x, y), 2, True),
        (((x, x), y), 2, True),
        ((x, [0, 1]), 1, True),
    ):
        (batch,) = read_batches([item], inputs=inputs)
        assert len(batch.inputs) == inputs
        assert (batch.targets is not None) == labelled
        if labelled:
            assert torch.equal(batch.targets, y)


def test_no_more_batches_are_asked_for_than_used() -> None:
    def endless() -> Any:
        yield from [torch.zeros(1)] * 3
        raise AssertionError("asked for a fourth")

    assert [batch.number for batch in read_batches(endless(), max_batches=3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batch"),
        (3, "data is of type int"),
        (["image"], "batch 0 is a str"),
        ([torch.zeros(2, 3), torch.zeros(0, 3)], "batch 1 is a tensor of shape .0, 3.*at least one image"),
        ([(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))], "batch 0 has 2 images and 3 labels"),
        ([("image", torch.zeros(2))], "expected 1 tensor"),
    ],
)
def test_batches_of_another_form(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_batches(data))


@pytest.mark.parametrize("labels", [torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3, dtype=torch.int64)])
def test_labels_are_checked_where_they_are_read(labels: torch.Tensor) -> None:
    (batch,) = read_batches([(torch.zeros(2, 3), labels)])
    assert torch.equal(batch.targets, labels)
    with pytest.raises(DataError, match="labels of batch 0 have dtype .* expected whole numbers, one an image"):
        check_labels(batch.targets, None, 0)


@dataclass
class Sample:
    pixel_values: torch.Tensor
    label: torch.Tensor


class Named(NamedTuple):
    image: torch.Tensor
    names: list[str]


IMAGES, CLASSES = torch.arange(6.0).reshape(2, 3), torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("batch", "labelled"),
    [
        ({"pixel_values": IMAGES, "labels": CLASSES}, True),
        ({"anchor": IMAGES, "y": CLASSES, "image": torch.ones(1)}, True),  # by the name that the model has
        (UserDict(image=IMAGES, id=["a", "b"]), False),
        (Sample(IMAGES, CLASSES), True),
        (Named(IMAGES, ["a", "b"]), False),
        (({"image": IMAGES}, CLASSES), True),
        (IMAGES, False),
        ([IMAGES, CLASSES], True),
    ],
)
def test_batches_with_names(batch: Any, labelled: bool) -> None:
    data = prepared([batch, batch], ["anchor"])
    assert len(data) == 2
    for inputs, labels in [(b.inputs, b.targets) for b in read_batches(data)]:
        assert torch.equal(inputs[0], IMAGES)
        assert torch.equal(labels, CLASSES) if labelled else labels is None


def test_batches_of_several_inputs_by_name_and_by_a_function() -> None:
    batch = {"right": IMAGES + 1, "left": IMAGES, "target": CLASSES}
    for data in (
        prepared([batch], ["left", "right"]),
        prepared([batch], ["left", "right"], lambda b: ((b["left"], b["right"]), b["target"])),
        prepared(iter([batch]), ["left", "right"], lambda b: ({"left": b["left"], "right": b["right"]}, b["target"])),
    ):
        ((_, inputs, labels),) = read_batches(data, inputs=2)
        assert torch.equal(inputs[1], inputs[0] + 1)
        assert torch.equal(labels, CLASSES)


def test_names_that_are_not_there_are_said() -> None:
    with pytest.raises(DataError, match="batch 0 holds picture, id; the model takes left, right.*prepare="):
        list(prepared([{"picture": IMAGES, "id": 3}], ["left", "right"]))


def test_data_that_raises_names_the_batch_and_keeps_the_cause() -> None:
    def broken() -> Any:
        yield torch.zeros(1)
        raise OSError("disk gone")

    with pytest.raises(DataError, match="OSError at batch 1: disk gone") as caught:
        list(read_batches(broken()))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.to_sparse(), "layout torch.sparse_coo"),
        (IMAGES.to("meta"), "on meta"),
        (torch.quantize_per_tensor(IMAGES, 0.1, 0, torch.quint8), "dtype torch.quint8"),
    ],
)
def test_images_without_values_of_their_own_are_refused(images: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"batch 0 .*{message}.*expected dense tensors"):
        list(read_batches([(images, CLASSES)]))
    ((_, _, labels),) = read_batches([(IMAGES, images)])
    assert labels is None


def test_data_that_cannot_begin_an_epoch_says_so() -> None:
    class Epochs(list[Any]):
        def set_epoch(self, epoch: int) -> None:
            raise OSError("disk gone")

    with pytest.raises(DataError, match=r"OSError from set_epoch\(2\): disk gone"):
        start_epoch(prepared(Epochs(), ["x"]), 2)
