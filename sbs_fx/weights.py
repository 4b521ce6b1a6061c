"""Weights of a file into a module: whichever training tool left the file, tensors alone are read, and they fit or are
refused.

In: a module, the path of safetensors or of what `torch.save` wrote: a state dict, or a checkpoint that holds one under
any name. Out: the module with these values. Holds: nothing is unpickled but tensors and plain containers; a module that
is refused a file keeps the values that it had.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sbs_fx.plan.errors import FileError, WeightsError

_DEPTH = 3  # of dicts within each other
_COUNTERS = "num_batches_tracked"


class Found(NamedTuple):
    """A state dict in a file: where it is there ("" at the top), the prefix that its names had, and the tensors."""

    place: str
    prefix: str
    tensors: dict[str, Tensor]


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> str:
    """Load a file's weights into a module, in place; returns where in the file they were, "" for its top.

    Of several state dicts the one that fits best is taken, averaged ones (EMA) first. Prefixes such as "module.",
    "_orig_mod." and "model." are looked through.

    Raises:
        FileError: no file, or one that holds no tensors. WeightsError: they do not fit; says how many and which.
    """
    wanted = module.state_dict()
    candidates = [_fitted(place, tensors, wanted) for place, tensors in _state_dicts(_read(path))]
    if not candidates:
        raise FileError(
            f"{os.fspath(path)!r} holds no tensors by name; expected a state dict, or a checkpoint with one"
        )
    best = max(candidates, key=lambda found: (_score(found.tensors, wanted), "ema" in found.place.lower()))
    if problem := _problem(best.tensors, wanted):
        raise WeightsError(f"the weights in {os.fspath(path)!r} do not fit {type(module).__name__}: {problem}")
    module.load_state_dict({**wanted, **{name: best.tensors[name] for name in wanted if name in best.tensors}})
    return best.place


def _read(path: str | os.PathLike[str]) -> Any:
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            head = file.read(1)
    except (OSError, ValueError) as error:  # reason: a null in a path
        raise FileError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from error
    if not head:
        raise FileError(f"{path!r} is empty: it was cut short; expected weights")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch, pickle, zip and safetensors raise
        text = str(error)
        if "TorchScript" in text:
            reason = "it is a scripted model; load it with torch.jit.load and save its state_dict()"
        elif "weights_only" in text or "Unsupported global" in text or "WeightsUnpickler" in text:
            reason = (
                "it holds objects beside tensors, which loading would run, or is no such file; in the program that "
                "wrote it, save model.state_dict() alone"
            )
        else:
            reason = f"{type(error).__name__}: {' '.join(text.split())[:120]}; it was cut short or is none"
        raise FileError(f"cannot read weights from {path!r}: {reason}") from error


def _state_dicts(value: Any, place: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All mappings of names to tensors, with the names that lead to them."""
    if not isinstance(value, Mapping) or not depth:
        return
    tensors = {str(name): x for name, x in value.items() if isinstance(x, Tensor)}
    if tensors:
        yield place, tensors
    for name, inner in value.items():
        yield from _state_dicts(inner, f"{place}.{name}" if place else str(name), depth - 1)


def _fitted(place: str, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> Found:
    """The state dict with the prefix taken off under which most names fit."""
    prefixes = {""}
    for name in list(wanted)[:3]:  # reason: the first may be missing
        prefixes |= {other[: -len(name)] for other in tensors if other.endswith(f".{name}")}
    options = [
        Found(place, prefix, {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)})
        for prefix in sorted(prefixes)
    ]
    return max(options, key=lambda found: _score(found.tensors, wanted))


def _score(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    return sum(name in tensors and tensors[name].shape == x.shape for name, x in wanted.items())


def _problem(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """How they differ, with the first of each kind; "" if nothing is missing. Names that nobody asks for are none, as
    long as all that are asked for are there."""
    missing = [name for name in wanted if name not in tensors and not name.endswith(_COUNTERS)]
    other = [name for name, x in wanted.items() if name in tensors and tensors[name].shape != x.shape]
    if not missing and not other:
        return ""
    parts = []
    if missing:
        unknown = [name for name in tensors if name not in wanted]
        parts.append(f"{len(missing)} of {len(wanted)} names are missing, the first {missing[0]!r}")
        if unknown:
            parts.append(f"{len(unknown)} in the file are not the model's, the first {unknown[0]!r}")
    if other:
        name = other[0]
        parts.append(
            f"{len(other)} have another shape, the first {name!r}: {tuple(tensors[name].shape)} in the file, "
            f"{tuple(wanted[name].shape)} in the model"
        )
    heads = [n for n in other if wanted[n].ndim > 1 and tensors[n].shape[1:] == wanted[n].shape[1:]]
    if heads and not missing:
        classes, own = len(tensors[heads[-1]]), len(wanted[heads[-1]])
        parts.append(f"it was trained for {classes} classes and the model has {own}: give --num-classes {classes}")
    else:
        parts.append("check the model's name and its options")
    return "; ".join(parts)
