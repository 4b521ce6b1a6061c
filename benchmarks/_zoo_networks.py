"""What a row of the zoo benchmark is made of: how a network is built, and what it is called with.

In: nothing. Out: `Network`, the table that `network` and `add` fill, and makers of inputs. A file that adds rows
imports its library inside the builders, so that listing all rows costs nothing and a row needs only its own package.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = Any  # a tensor, a tuple (of tensors, None, numbers, more tuples), or a dict of keyword arguments
Maker = Callable[[int], Inputs]  # batch size -> inputs

FILES = (
    "_zoo_own_layers",
    "_zoo_own_forwards",
    "_zoo_own_tasks",
    "_zoo_own_pairs",
    "_zoo_own_detectors",
    "_zoo_torchvision",
    "_zoo_torchvision_dense",
    "_zoo_segmentation",
    "_zoo_transformers_backbones",
    "_zoo_transformers_detection",
    "_zoo_transformers_tasks",
)


@dataclass(frozen=True)
class Network:
    """A row: `inputs` is called with a batch size; so is `other_size`, for images of another height and width, where
    the graph is to be traced for any. `imports`: what a plain process needs beside torch to run the saved file."""

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Maker
    other_size: Maker | None = None
    package: str = "torch"
    imports: tuple[str, ...] = ()


NETWORKS: dict[str, Network] = {}


def add(kind: str, name: str, build: Callable[[], nn.Module], inputs: Maker, **options: Any) -> None:
    """Enter a row. Raises ValueError if the name is taken."""
    if name in NETWORKS:
        raise ValueError(f"two networks are called {name!r}")
    NETWORKS[name] = Network(name, kind, build, inputs, **options)


def network(kind: str, inputs: Maker, **options: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Decorator of a function that builds a network; the function's name is the row's."""

    def enter(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        add(kind, getattr(build, "__name__", ""), build, inputs, **options)
        return build

    return enter


def all_networks() -> dict[str, Network]:
    """Every row by name, in the order of the files."""
    for name in FILES:
        importlib.import_module(name)
    return NETWORKS


def is_installed(network: Network) -> bool:
    return importlib.util.find_spec(network.package) is not None


# -- inputs ------------------------------------------------------------------------------------------------------------


def images(*shape: int) -> Maker:
    """Standard-normal tensors (batch, *shape); the batch size is the seed."""
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def unit(*shape: int) -> Maker:
    """Uniform tensors (batch, *shape) between 0 and 1, such as coordinates."""
    return lambda batch: torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch))


def tokens(vocabulary: int, *shape: int) -> Maker:
    """Indices (batch, *shape) from 1 on, int64."""
    return lambda batch: torch.randint(1, vocabulary, (batch, *shape), generator=torch.Generator().manual_seed(batch))


def several(*makers: Maker) -> Maker:
    return lambda batch: tuple(make(batch) for make in makers)


def by_name(**makers: Maker) -> Maker:
    return lambda batch: {name: make(batch) for name, make in makers.items()}


# -- calls -------------------------------------------------------------------------------------------------------------


class PlainCall(nn.Module):
    """A network that is called by name or with nested inputs, as one of tensors to a tuple of tensors, for what calls
    it so; at most four."""

    def __init__(self, module: nn.Module, example: Inputs) -> None:
        super().__init__()
        self.module = module
        leaves, self.spec = pytree.tree_flatten(example)
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, d: Tensor | None = None) -> Any:
        leaves = list(self.constants)
        for place, tensor in zip(self.places, (a, b, c, d), strict=False):
            leaves[place] = tensor
        inputs = pytree.tree_unflatten(leaves, self.spec)
        outputs = self.module(**inputs) if isinstance(inputs, Mapping) else self.module(*inputs)
        return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


def called(module: nn.Module, inputs: Inputs) -> Any:
    """What a module gives for inputs as a row has them."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def tensors_in(inputs: Any) -> tuple[Tensor, ...]:
    """The tensors of a call or of an output, in order."""
    return tuple(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
