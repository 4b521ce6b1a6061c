"""Model names to modules, and the example inputs that a module's own configuration implies, as timm writes it."""

from __future__ import annotations

import difflib
import logging
from typing import Any, cast

import torch
from torch import nn

from sbs_fx.plan.errors import InputError
from sbs_fx.sources import published, source_of
from sbs_fx.weights import load_weights

PREPARATION = ("mean", "std", "crop_pct", "interpolation", "crop_mode")  # of pictures, as timm names it
SMALL_MODEL = "test_resnet"  # what the demo trains: 16 convolutions, 0.5 M parameters


def create_model(name: str, *, pretrained: bool = True, checkpoint: str | None = None, **options: Any) -> nn.Module:
    """A model by name with its published weights, or those of a local file, in eval mode.

    Args:
        name: as timm has it, also "hf-hub:OWNER/NAME" and "local-dir:PATH"; "torchvision/NAME", "hf/DIR" or a function
            as "package.module:function" (see `sbs_fx.sources`). pretrained: False: random weights, unless `checkpoint`,
            a file, has others (see `sbs_fx.weights`); a function of one's own gives what it gives. options: of the
            source, such as `num_classes`.

    Raises:
        InputError: nobody knows such a model (the nearest names are listed). WeightsError: there are no published
        weights, they cannot be had here, or do not fit. FileError: the checkpoint cannot be read.
    """
    make = source_of(name) or _of_timm
    # reason: arrays of other libraries, which timm turns around
    arrays = checkpoint if make is _of_timm and checkpoint is not None and checkpoint.endswith(".npz") else None
    if arrays is not None:
        options["checkpoint_path"] = arrays
    model = published(make, name, options) if pretrained and checkpoint is None else make(name, False, options)
    if checkpoint is not None and arrays is None:
        load_weights(model, checkpoint)
    return model.eval()


def _of_timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name.split(".")[0]) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 5)
        raise InputError(f"timm has no model {name!r}; the nearest names are {near}; `timm.list_models()` has all")
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # reason: each of ten tries would be told
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=pretrained, **options))
    finally:
        hub.setLevel(level)


def input_config(module: nn.Module) -> dict[str, Any]:
    """`input_size` (channels, height, width) and `PREPARATION` from a timm model's pretrained configuration; or {}."""
    config = getattr(module, "pretrained_cfg", None) or {}
    return {k: config[k] for k in ("input_size", *PREPARATION) if config.get(k) is not None}


def example_inputs(module: nn.Module, batch: int = 2) -> torch.Tensor:
    """Standard-normal images of the size that the module's configuration names, shape (batch, channels, height, width).

    Raises:
        InputError: the module has no such configuration.
    """
    config = input_config(module)
    if "input_size" not in config:
        raise InputError(
            f"no example inputs were given and {type(module).__name__} has no pretrained_cfg with an "
            "input_size to derive them from; pass example_inputs of shape (batch of 2 or more, ...)"
        )
    parameter = next(module.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *config["input_size"], generator=generator)
    return images.to(parameter.device, parameter.dtype)
