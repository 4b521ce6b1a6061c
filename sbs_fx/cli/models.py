"""What the options of the command line stand for: a model with inputs for it, and data that fits it.

In: names, numbers and paths as they were typed. Out: a module, example inputs and batches of the same size and
normalisation. Holds: whatever does not fit together is an `SbsError` before anything long is begun.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from sbs_fx.cli.progress import say
from sbs_fx.data.datasets import Batches, open_data
from sbs_fx.data.pictures import Pictures, listed
from sbs_fx.export import load_saved as load_static
from sbs_fx.export.pt2 import example_shape, load_program
from sbs_fx.models import PREPARATION, create_model, input_config
from sbs_fx.passes.capture.part import with_part
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.graph import digest
from sbs_fx.plan.errors import DataError, FileError, InputError


class NamedModel(NamedTuple):
    """A model, what it takes, how images are made ready for it, where its weights are from, its classes' names."""

    module: nn.Module
    example_inputs: Tensor
    preparation: dict[str, Any]
    weights: str = ""
    classes: tuple[str, ...] = ()


def make_model(
    name: str,
    checkpoint: str | None,
    random_weights: bool,
    input_size: str | None,
    num_classes: int | None,
    in_chans: int | None,
    device: str = "cpu",
) -> NamedModel:
    """A timm model and example inputs, shape (2, channels, height, width), of the size that it is to run at.

    Args:
        input_size: "channels,height,width"; None: as the model's own configuration says.
        device: as torch names it; "cuda" is the GPU that belongs to this process.

    Raises:
        InputError: an unknown name, a size that makes no sense, weights that do not fit. FileError: no checkpoint.
    """
    place = _device(device)
    if name.endswith(".pt2"):
        return _of_program(name, checkpoint, place)
    options = {k: v for k, v in (("num_classes", num_classes), ("in_chans", in_chans)) if v is not None}
    size = _parse_size(input_size)
    if size is not None:
        options["in_chans"] = size[0]
        if in_chans not in (None, size[0]):
            raise InputError(f"--in-chans {in_chans} and --input-size {input_size} disagree; give one of them")
    if checkpoint is not None and not os.path.isfile(checkpoint):
        raise FileError(f"there is no checkpoint {checkpoint!r}; expected a file of weights")

    def create(**more: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # reason: random weights are the same ones in the next command
            return create_model(name, pretrained=not random_weights, checkpoint=checkpoint, **options, **more)

    if size is None:
        module = create()
    else:
        try:
            module = create(img_size=size[1:])  # reason: tables of positions have the size of the image
        except TypeError:
            module = create()
    card = input_config(module)
    if size is None:
        if "input_size" not in card:
            raise InputError(f"{name!r} does not say which images it takes; give --input-size C,H,W")
        size = (in_chans or card["input_size"][0], *card["input_size"][1:])
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    weights = weights_of(name, module, not random_weights, checkpoint)
    return NamedModel(module.to(place), images.to(place), {k: card[k] for k in PREPARATION if k in card}, weights)


def _of_program(path: str, checkpoint: str | None, place: torch.device) -> NamedModel:
    """A float model as `torch.export.save` wrote it, and images of the shape that it takes, 2 where it is dynamic."""
    if checkpoint is not None:
        raise InputError(f"{path!r} has its own weights; leave --checkpoint out")
    program = load_program(path)
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    values = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder") if n.name in names]
    if len(values) != 1 or values[0].ndim != 4:
        raise InputError(f"{path!r} takes {len(values)} inputs; the command line gives one of images: use the library")
    module = program.module(check_guards=False)
    images = torch.randn(example_shape(values[0]), generator=torch.Generator().manual_seed(0)).to(values[0].dtype)
    weights = f"file {path} (sha256 {digest(module.state_dict())[:16]})"
    return NamedModel(module.to(place), images.to(place), {}, weights)


def weights_of(name: str, module: nn.Module, pretrained: bool, checkpoint: str | None) -> str:
    """Where a model's weights are from, in words, with a digest of them."""
    card = getattr(module, "pretrained_cfg", None) or {}
    if checkpoint is not None:
        source = f"file {checkpoint}"
    elif pretrained:
        tag = f"{card.get('architecture', name)}.{card['tag']}" if card.get("tag") else name
        place = next((card[key] for key in ("file", "hf_hub_id", "url") if card.get(key)), "")
        source = f"{tag} from {place}" if place else tag
        if card.get("num_classes") not in (None, getattr(module, "num_classes", None)):
            source += f", but for a classifier of {getattr(module, 'num_classes', None)} classes, which is random"
    else:
        source = "random"
    return f"{source} (sha256 {digest(module.state_dict())[:16]})"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if name == "cuda" and torch.cuda.is_available():
            from sbs_fx.training.processes import Processes

            device = Processes().device  # reason: asked for first, or every process would hold a part of the first GPU
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # reason: torch asserts that it was built for the device
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; expected cpu, or a GPU") from error
    return device


def _parse_size(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        channels, height, width = (int(part) for part in text.split(","))
    except ValueError:
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise InputError(f"--input-size {text!r}; expected channels, height and width, such as 3,224,224")
    return channels, height, width


def load_saved(path: str) -> NamedModel:
    """A saved result; its file says which images it takes."""
    return of_saved(path, *load_static(path))


def of_saved(path: str, module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> NamedModel:
    """The same of what was read from the path. Raises InputError for a part."""
    metadata = static_of(module).metadata
    if "part" in metadata:
        raise InputError(
            f"{path!r} is the part {metadata['part']!r} of a model and gives no classes by itself; give the "
            f"model's name and --with-part {path}"
        )
    return NamedModel(module, inputs[0], {k: metadata[k] for k in PREPARATION if k in metadata})


def with_saved_part(made: NamedModel, path: str) -> NamedModel:
    """A model with a saved part of it in its place. Raises InputError for a result that is no part of it."""
    static, _ = load_static(path)
    part = static_of(static).metadata.get("part")
    if part is None:
        raise InputError(f"{path!r} is no part of a model; give it in place of the model's name")
    return made._replace(module=with_part(made.module, part, static))


def open_split(
    made: NamedModel,
    spec: str,
    data_dir: str | None,
    split: str,
    batch_size: int,
    seed: int,
    skip_unreadable: bool = False,
    workers: int = 0,
) -> Batches:
    """Batches of one split, of the size that the model takes, prepared as its configuration says. Raises DataError."""
    channels, height, width = made.example_inputs.shape[1:]
    return open_data(
        spec,
        split=split,
        batch_size=batch_size,
        image_size=(height, width),
        channels=channels,
        shuffle=split == "train",
        seed=seed,
        data_dir=data_dir,
        num_classes=getattr(made.module, "num_classes", None),
        skip_unreadable=skip_unreadable,
        num_workers=workers,
        **made.preparation,
    )


def both_splits(
    made: NamedModel,
    spec: str | None,
    data_dir: str | None,
    batch_size: int,
    seed: int,
    skip_unreadable: bool = False,
    workers: int = 0,
) -> tuple[Batches | None, Batches | None]:
    """Training data to calibrate and fine-tune on, held-out data to measure accuracy on; says what there is.

    Raises:
        DataError: as `open_data`, and for a folder in which the two are the same pictures.
    """
    if spec is None:
        return None, None
    options = (batch_size, seed, skip_unreadable, workers)
    train, test = (open_split(made, spec, data_dir, split, *options) for split in ("train", "test"))
    samples = [getattr(getattr(split, "dataset", None), "samples", None) for split in (train, test)]
    if samples[0] is not None and samples[0] == samples[1]:
        raise DataError(
            f"{spec!r} has no folders train/ and test/ (or val/): accuracy would be measured on the pictures that the "
            "model is calibrated on; put some of them apart"
        )
    say(told(train, test))
    return train, test


def told(train: Batches, test: Batches) -> str:
    """How many pictures of which classes there are, and what was left out."""
    text = f"data: {train.pictures} train, {test.pictures} test pictures"
    if classes := getattr(train, "classes", ()):
        text += f", {len(classes)} classes: {listed(classes)}"
    for name, split in (("train", train), ("test", test)):
        of_split = getattr(split, "dataset", None)
        if isinstance(of_split, Pictures):
            text += f"; no {name} picture of {listed(of_split.missing)}" if of_split.missing else ""
            out = f"{len(of_split.skipped)} {name} files left out: {listed(of_split.skipped)}"
            text += f"; {out}" if of_split.skipped else ""
    return text
