"""Which models the coverage benchmark looks at, read off timm's registry.

In: nothing but the registry. Out: tasks (family, model name); a family is a timm module. Parameters are counted on the
meta device, so that no weight is ever made; the count takes minutes and can be kept in a cache file.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import warnings
from typing import Any, NamedTuple

import torch


class Task(NamedTuple):
    """One model to look at."""

    family: str
    model: str


def all_models() -> list[Task]:
    """Every name of the registry, by family."""
    import timm

    return [Task(family, name) for family in sorted(timm.list_modules()) for name in sorted(timm.list_models(module=family))]


def meta_model(name: str) -> torch.nn.Module:
    """A model without weights, in eval mode."""
    import timm

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model: torch.nn.Module = timm.create_model(name)
    return model.eval()


def parameter_count(name: str) -> int | str:
    """Parameters of a model, or why it cannot be made."""
    try:
        return sum(p.numel() for p in meta_model(name).parameters())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def smallest_models(cache: pathlib.Path | None = None) -> list[Task]:
    """The model with the fewest parameters of every family, ties by name.

    Args:
        cache: file that keeps the counts by model name; used if it was made with the same version of timm.
    """
    counts = _cached_counts(cache)
    smallest: dict[str, tuple[int, str]] = {}
    for family, name in all_models():
        count = counts[name]
        if isinstance(count, int) and (family not in smallest or (count, name) < smallest[family]):
            smallest[family] = (count, name)
    return [Task(family, name) for family, (_, name) in sorted(smallest.items(), key=lambda item: item[1])]


def _cached_counts(cache: pathlib.Path | None) -> dict[str, Any]:
    version = importlib.metadata.version("timm")
    if cache is not None and cache.exists():
        known = json.loads(cache.read_text())
        if known["timm"] == version:
            return known["parameters"]
    counts = {name: parameter_count(name) for _, name in all_models()}
    if cache is not None:
        cache.write_text(json.dumps({"timm": version, "parameters": counts}, indent=1))
    return counts
