"""Which models the coverage benchmark looks at, read off timm's registry.

In: nothing but the registry. Out: tasks (family, model name); a family is a timm module. Parameters are counted on the
meta device, so that no weight is ever made; the count takes minutes and can be kept in a cache file.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Task(NamedTuple):
    """One model to look at."""

    family: str
    model: str


def all_models() -> list[Task]:
    """Every name of the registry, by family."""
    import timm

    families = sorted(timm.list_modules())
    return [Task(family, name) for family in families for name in sorted(timm.list_models(module=family))]


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


def smallest_models(tasks: Sequence[Task], cache: pathlib.Path | None = None) -> list[Task]:
    """Of each family among the tasks, the model with the fewest parameters, ties by name; smallest first.

    Args:
        cache: file that keeps the counts by model name; used if it was made with the same version of timm.
    """
    counts = _counts([task.model for task in tasks], cache)
    smallest: dict[str, tuple[int, str]] = {}
    for family, name in tasks:
        count = counts[name]
        if isinstance(count, int) and (family not in smallest or (count, name) < smallest[family]):
            smallest[family] = (count, name)
    return [Task(family, name) for family, (_, name) in sorted(smallest.items(), key=lambda item: item[1])]


def _counts(names: Sequence[str], cache: pathlib.Path | None) -> dict[str, Any]:
    """Name -> parameters, for these names at least; the cache is filled with what was counted."""
    version = importlib.metadata.version("timm")
    known: dict[str, Any] = {}
    if cache is not None and cache.exists():
        kept = json.loads(cache.read_text())
        known = kept["parameters"] if kept["timm"] == version else {}
    missing = [name for name in names if name not in known]
    known.update((name, parameter_count(name)) for name in missing)
    if cache is not None and missing:
        cache.write_text(json.dumps({"timm": version, "parameters": known}, indent=1))
    return known
