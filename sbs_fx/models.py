"""The timm adapter: model names to modules, and the example inputs that a module's own configuration implies."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import torch
from torch import nn

from sbs_fx.plan.errors import InputError, WeightsError
from sbs_fx.weights import load_weights

PREPARATION = ("mean", "std", "crop_pct", "interpolation", "crop_mode")  # of pictures, as timm names it
SMALL_MODEL = "test_resnet"  # what the demo trains: 16 convolutions, 0.5 M parameters


def create_model(name: str, *, pretrained: bool = True, checkpoint: str | None = None, **options: Any) -> nn.Module:
    """A timm model by name with its published weights, or those of a local file, in eval mode.

    Args:
        name: as timm has it, also "hf-hub:OWNER/NAME" and "local-dir:PATH". pretrained: False: random weights, unless
            `checkpoint`, a file, has others (see `sbs_fx.weights`). options: of `timm.create_model`.

    Raises:
        InputError: timm knows no such model (the nearest names are listed). WeightsError: there are no published
        weights, they cannot be had here, or do not fit. FileError: the checkpoint cannot be read.
    """
    import timm

    if not timm.is_model(name.split(".")[0]) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 5)
        raise InputError(f"timm has no model {name!r}; the nearest names are {near}; `timm.list_models()` has all")
    published = pretrained and checkpoint is None
    of_timm = checkpoint if checkpoint is not None and checkpoint.endswith(".npz") else ""  # arrays of other libraries
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # reason: each of ten tries would be told
    try:
        model: nn.Module = timm.create_model(name, pretrained=published, checkpoint_path=of_timm, **options)
    except TypeError:  # reason: of arguments that a model does not take
        raise
    except Exception as error:  # reason: each hub has exceptions of its own
        if not published:
            raise
        raise WeightsError(
            f"the published weights of {name!r} cannot be had: {_first_line(error)}; give a file (--checkpoint FILE) "
            f"or ask for random ones (--random-weights; in Python a module, such as timm.create_model({name!r}))"
        ) from error
    finally:
        hub.setLevel(level)
    if checkpoint is not None and not of_timm:
        load_weights(model, checkpoint)
    return model.eval()


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())


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
