"""The timm adapter: model names to modules, and the example inputs that a module's own configuration implies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sbs_fx.plan.errors import InputError

SMALL_MODEL = "test_resnet"  # what the demo trains: 16 convolutions, 0.5 M parameters


def create_model(name: str, *, pretrained: bool = False, checkpoint: str | None = None, **options: Any) -> nn.Module:
    """A timm model by name, in eval mode; `checkpoint` is a local file of weights.

    Raises:
        InputError: timm knows no such model (the nearest names are listed).
    """
    import timm

    if not timm.is_model(name.split(".")[0]) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        near = timm.list_models(f"*{name.split('_')[0].split('.')[0]}*")[:5]
        raise InputError(f"timm has no model {name!r}; the nearest names are {near}; `timm.list_models()` has all")
    model: nn.Module = timm.create_model(name, pretrained=pretrained, checkpoint_path=checkpoint or "", **options)
    return model.eval()


def input_config(module: nn.Module) -> dict[str, Any]:
    """`input_size` (channels, height, width), `mean` and `std` from a timm model's pretrained configuration; or {}."""
    config = getattr(module, "pretrained_cfg", None) or {}
    return {k: config[k] for k in ("input_size", "mean", "std") if config.get(k) is not None}


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
