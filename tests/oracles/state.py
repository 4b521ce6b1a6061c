"""What a module and the process hold, as one value that can be compared with another."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that a forward could change: attributes to any depth, classes, random states, defaults."""
    parts = {name: _form(dict(vars(part)), ()) for name, part in module.named_modules()}
    classes = {cls for part in module.modules() for cls in type(part).__mro__ if cls is not object}
    return {
        "modules": parts,
        "classes": {cls.__qualname__: _form(dict(vars(cls)), ()) for cls in classes},
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def _form(value: Any, above: tuple[int, ...]) -> Any:
    if id(value) in above or isinstance(value, nn.Module):
        return type(value).__name__, id(value)
    inside = (*above, id(value))
    if isinstance(value, Tensor):
        grad = _form(value.grad, inside) if value.is_leaf else None
        return type(value).__name__, value.dtype, value.requires_grad, *_content(value), grad, id(value)
    if isinstance(value, Mapping):
        return type(value).__name__, [(key, _form(each, inside)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_form(each, inside) for each in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted(map(repr, value))
    if isinstance(value, (int, float, str, bool, bytes, type(None))):
        return value
    if hasattr(value, "__dict__") and not callable(value):
        return type(value).__name__, id(value), _form(dict(vars(value)), inside)
    return type(value).__name__, id(value)


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Shape and values, as far as there are any; as text, in which NaN equals itself."""
    if is_lazy(tensor):
        return ()
    return tensor.shape, None if tensor.device.type == "meta" else repr(tensor.tolist())
