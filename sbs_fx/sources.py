"""Models by name from elsewhere than timm: torchvision, directories of Transformers, functions of one's own.

In: a name such as "torchvision/NAME", "hf/DIR" or "package.module:function". Out: a module, with a `pretrained_cfg`
as timm has it where the source says which images it takes. Holds: a function of one's own runs code, and is asked for
by name alone.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from sbs_fx.plan.errors import InputError, SbsError, WeightsError

Options = dict[str, Any]


def source_of(name: str) -> Callable[[str, bool, Options], nn.Module] | None:
    """What makes the model of a name, with (name, with published weights, options); None for a name of timm."""
    if name.startswith("torchvision/"):
        return _of_torchvision
    if name.startswith("hf/"):
        return _of_transformers
    module, colon, function = name.partition(":")
    is_function = colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
    return _of_function if is_function else None


def _of_torchvision(name: str, pretrained: bool, options: Options) -> nn.Module:
    from torchvision.models import get_model, get_model_weights, list_models

    name = name.partition("/")[2]
    if name not in list_models():
        near = difflib.get_close_matches(name, list_models(), 5)
        raise InputError(f"torchvision has no model {name!r}; the nearest names are {near}")
    weights = next(iter(get_model_weights(name)), None)
    model: nn.Module = get_model(name, weights=weights if pretrained else None, **options)
    if weights is not None:
        given = weights.transforms()
        size, resized = (getattr(given, key, None) for key in ("crop_size", "resize_size"))
        if size:
            model.pretrained_cfg = {  # type: ignore[assignment]
                "input_size": (3, size[0], size[0]),
                "mean": tuple(given.mean),
                "std": tuple(given.std),
                "interpolation": given.interpolation.value,
                "crop_pct": size[0] / resized[0] if resized else 1.0,
            }
    return model


def _of_transformers(name: str, pretrained: bool, options: Options) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"{name!r} needs transformers: pip install transformers") from error
    place = name.partition("/")[2]
    if "num_classes" in options:
        options = {**options, "num_labels": options.pop("num_classes")}
    config = transformers.AutoConfig.from_pretrained(place, **options)
    make = transformers.AutoModelForImageClassification
    model: nn.Module = make.from_pretrained(place, config=config) if pretrained else make.from_config(config)
    side = getattr(config, "image_size", None)
    if isinstance(side, int):
        card: Options = {"input_size": (getattr(config, "num_channels", 3), side, side)}
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(place, use_fast=False)
            card |= {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std), "crop_pct": 1.0}
        except Exception:  # reason: a directory without a processor; the images are then as timm has them
            pass
        model.pretrained_cfg = card  # type: ignore[assignment]
    return model


def _of_function(name: str, pretrained: bool, options: Options) -> nn.Module:
    path, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(path), function)
    except ImportError as error:
        raise InputError(f"cannot import {path!r} of {name!r}: {error}") from error
    except AttributeError:
        raise InputError(f"{path!r} has no {function!r}; expected a function that gives a model") from None
    try:
        model = make(**options)
    except SbsError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise InputError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} gave a {type(model).__name__}; expected an nn.Module")
    return model


def published(make: Callable[[str, bool, Options], nn.Module], name: str, options: Options) -> nn.Module:
    """With published weights. Raises WeightsError if they cannot be had."""
    try:
        return make(name, True, options)
    except SbsError:
        raise
    except TypeError:  # reason: of arguments that a model does not take
        raise
    except Exception as error:  # reason: each hub has exceptions of its own
        text = str(error).strip() or type(error).__name__
        raise WeightsError(
            f"the published weights of {name!r} cannot be had: {' '.join(text.splitlines()[0].split())}; give a file "
            f"(--checkpoint FILE) or ask for random ones (--random-weights; in Python a module for {name!r})"
        ) from error
