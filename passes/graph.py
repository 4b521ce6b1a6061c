"""Tensors and inputs of graphs, and copies: with other tensors, or on another device.

In: any graph of ours. Out: a copy that shares nothing with it but what is said. Holds: nodes keep their names and
metadata; the structure of inputs and outputs stays.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx


def attribute(graph_module: torch.nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of that dotted name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(graph_module.get_submodule(owner), leaf)


def channel_rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Values by coordinate of a dimension, (size of it, all others); a tensor of one dimension has one value each."""
    return tensor.movedim(dim, 0)[..., None].flatten(1)


def input_count(module: torch.nn.Module) -> int:
    """How many tensors a graph takes; 1 for any other module."""
    return len(module.graph.find_nodes(op="placeholder")) if isinstance(module, fx.GraphModule) else 1


def read_tensors(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The parameters and buffers that some node reads, by name."""
    names = dict.fromkeys(str(n.target) for n in graph_module.graph.find_nodes(op="get_attr"))
    return {name: attribute(graph_module, name) for name in names}


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that owns its own tensors; nodes keep their names and metadata."""
    tensors = read_tensors(graph_module)
    return copy_with(graph_module, {name: _like(old, old.detach().clone()) for name, old in tensors.items()})


@torch.no_grad()
def with_tensors(graph_module: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """A copy of the graph whose parameters and buffers of these names have these values; all others are the same
    tensors (reason: of a large network another copy of everything may not fit)."""
    own = read_tensors(graph_module)
    changed = {n: _like(own[n], own[n].detach().clone().copy_(value)) for n, value in tensors.items()}
    return copy_with(graph_module, {**own, **changed})


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new


def copy_with(graph_module: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """A copy of the graph that owns `tensors` and shares nothing with the original."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        hold(root, name, tensor)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, mapping))
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
        new.name = old.name
    result = fx.GraphModule(root, graph)
    result.graph._codegen = copy.deepcopy(graph_module.graph._codegen)
    result.meta = dict(graph_module.meta)
    return result


def hold(root: torch.nn.Module, name: str, value: torch.Tensor, *, persistent: bool = True) -> None:
    """Give a module a parameter or buffer of that dotted name; modules on the way are made."""
    *path, leaf = name.split(".")
    owner = root
    for step in path:
        if step not in owner._modules:
            owner.add_module(step, torch.nn.Module())
        owner = owner._modules[step]  # type: ignore[assignment]
    if isinstance(value, torch.nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value, persistent=persistent)


def on_device(graph_module: fx.GraphModule, device: torch.device | str) -> fx.GraphModule:
    """A copy on `device` of a graph that calls no modules; shapes stay as they are.

    >>> on_device(result.model, "cpu")(images).device
    device(type='cpu')
    """
    place = torch.device(device)

    def moved(value: Any) -> Any:
        return place if isinstance(value, torch.device) else value

    result = copy_graph(graph_module).to(place)
    for node in result.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["val"] = node.meta["val"].to(place)
    result.recompile()
    return result


def digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """sha256 (hex) of tensors with their names, dtypes and shapes, and of a text."""
    total = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        total.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
