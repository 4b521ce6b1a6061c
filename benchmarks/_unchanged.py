"""Whether a model is as it was: everything that a forward could change, as one value, and the first difference of two.

In: a module. Out: a state; text. Holds: large models are compared by digests and identities, so that nothing is copied.
"""

from __future__ import annotations

import hashlib
import pathlib
import random
import sys
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(pathlib.Path(__file__).parent.parent))
from tests.oracles.state import state_of

LISTED = 300_000  # parameters up to which values are listed, which names the one that changed


def state(model: nn.Module) -> dict[str, Any]:
    if sum(p.numel() for p in model.parameters()) <= LISTED:
        return state_of(model)
    tensors = {
        name: (tuple(tensor.shape), tensor.dtype, _digest(tensor)) for name, tensor in model.state_dict().items()
    }
    parts = {name: (part.training, [(k, id(v)) for k, v in vars(part).items()]) for name, part in model.named_modules()}
    generators = (torch.get_rng_state().tolist(), random.getstate())
    return {"tensors": tensors, "modules": parts, "random": generators}


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What changed; "" if nothing did."""
    for key, value in before.items():
        if isinstance(value, dict):
            for name in {*value, *after[key]}:
                a, b = value.get(name), after[key].get(name)
                if repr(a) != repr(b):
                    return f"{key} {name!r} changed{_where(a, b)}"
        elif value != after[key]:
            return f"{key} changed"
    return ""


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


def _where(a: Any, b: Any) -> str:
    """The first attribute of a module or class that differs."""
    if not (isinstance(a, tuple) and isinstance(b, tuple) and isinstance(a[-1], list) and isinstance(b[-1], list)):
        return ""
    left, right = dict(a[-1]), dict(b[-1])
    keys = [k for k in {*left, *right} if repr(left.get(k)) != repr(right.get(k))]
    return f": {keys[0]}: {str(left.get(keys[0]))[:80]} -> {str(right.get(keys[0]))[:80]}" if keys else ""
