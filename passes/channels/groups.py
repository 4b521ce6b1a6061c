"""`channel_groups`: which coordinates of which parameter dimensions must live or die together.

In: a graph from `trace`. Out: `ChannelGroups`, every channel axis with all the (tensor, dimension) places it occurs in,
and every pin with its cause. Invariant: every dimension of every parameter and buffer has a type whose size is its own.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.channels.inference import Inference, Layer, Path, operand


@dataclass(frozen=True)
class Member:
    """One place of a group: dimension `dim` of a parameter or buffer, and the type of that dimension."""

    tensor: str
    dim: int
    type: Dim


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """One channel axis: `size` coordinates that are kept or removed together in all `members`.

    `primary` is False for the smaller factor of a product axis (heads beside head width, groups beside group width):
    both factors compound, so only the larger one is pruned unless the other is asked for.

    >>> group = groups["0.weight:0"]
    >>> group.size, len(group.members)
    (16, 7)
    """

    name: str
    size: int
    axis: Axis
    members: tuple[Member, ...]
    primary: bool = True

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.size} channels{'' if self.primary else ' (minor factor, kept by default)'}"]
        lines += [f"  {m.tensor} dim {m.dim}: {d.resolve(m.type)}" for m in self.members]
        return "\n".join(lines)


@dataclass(frozen=True)
class Pin:
    """A parameter dimension of which `size` coordinates cannot be removed, and why."""

    tensor: str
    dim: int
    size: int
    causes: tuple[str, ...]


class ChannelGroups(Mapping[str, ChannelGroup]):
    """The groups of one graph by name, in graph order, with what the other passes read from the same inference.

    >>> list(groups)
    ['0.weight:0', '3.weight:0']
    """

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self._groups = {g.name: g for g in _collect(inference)}

    def __getitem__(self, name: str) -> ChannelGroup:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __str__(self) -> str:
        return "\n".join(str(g) for g in self.values())

    @cached_property
    def of_axis(self) -> dict[Axis, ChannelGroup]:
        return {g.axis: g for g in self.values()}

    @cached_property
    def outputs(self) -> dict[str, Dim]:
        """Weight -> the type of its output dimension."""
        nodes = {node.name: node for node in self.inference.graph_module.graph.nodes}
        weights = {name: places[0] for name, places in quantized_tensors(self)[0].items()}
        types = {name: (self.inference[operand(nodes[x.name], path)], x.outputs) for name, (x, path) in weights.items()}
        return {name: dims[outputs] for name, (dims, outputs) in types.items()}

    @cached_property
    def pins(self) -> tuple[Pin, ...]:
        """Parameter dimensions with coordinates that something named has pinned."""
        pins = []
        for tensor, dims in self.inference.tensors.items():
            for i, dim in enumerate(dims):
                causes = d.reasons(dim)
                if not causes and dim.size > 1 and not d.axes(dim):
                    causes = ("meets a spatial, token or batch dimension",)
                if causes:
                    fixed = d.evaluate(dim, lambda axis: 0)
                    pins.append(Pin(tensor, i, fixed or d.resolve(dim).size, causes))
        return tuple(pins)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the architecture: tensors with their shapes, operators in order. Weight values play no part."""
        digest = hashlib.sha256()
        for name, dims in self.inference.tensors.items():
            digest.update(f"{name}{tuple(x.size for x in dims)};".encode())
        for node in self.inference.graph_module.graph.nodes:
            digest.update(f"{node.op}:{node.target};".encode())
        return digest.hexdigest()[:32]

    def kept_axes(self, kept: Mapping[str, list[int]]) -> dict[Axis, torch.Tensor]:
        """Kept coordinates by axis, int64, for the groups of a plan that lose any."""
        return {
            self[name].axis: torch.tensor(indices, dtype=torch.int64)
            for name, indices in kept.items()
            if len(indices) != self[name].size
        }

    def graph(self) -> nx.Graph:
        """Bipartite coupling graph: layers (`kind="layer"`) and groups (`kind="group"`, `size`), an edge where a
        group changes a layer's cost."""
        coupling = nx.Graph()
        for group in self.values():
            coupling.add_node(group.name, kind="group", size=group.size)
        for layer in self.inference.layers.values():
            coupling.add_node(layer.name, kind="layer", layer=layer.kind)
            for term in layer.terms:
                for dim, _ in term.sizes:
                    for axis in d.axes(dim):
                        if axis in self.of_axis:
                            coupling.add_edge(layer.name, self.of_axis[axis].name)
        return coupling


def channel_groups(
    graph_module: fx.GraphModule, *, keep_outputs: bool = True, symbol_sizes: Mapping[str, int] | None = None
) -> ChannelGroups:
    """Find the channel groups of a traced graph.

    Args:
        graph_module: a graph from `trace`.
        keep_outputs: pin the model's outputs. False lets a headless model's output features shrink.
        symbol_sizes: sizes to assume for symbolic dimensions by symbol name; default: large primes.

    Raises:
        GraphError: a rule gave a node types whose sizes are not the node's shape.

    >>> channel_groups(trace(net, images))["3.weight:0"].size
    16
    """
    inference = Inference(graph_module, dict(symbol_sizes or {}))
    return ChannelGroups(inference.run(pin_outputs=keep_outputs))


def weight_name(node: fx.Node) -> str:
    """How a policy calls a weight: its parameter's name without ".weight", or the node's name if it is computed."""
    return str(node.target).removesuffix(".weight") if node.op == "get_attr" else node.name


Readers = dict[str, list[tuple[Layer, Path]]]  # name of a tensor -> the places where layers read it


def quantized_tensors(groups: ChannelGroups) -> tuple[Readers, Readers]:
    """(weights, activations) of a graph: name -> the places where layers read it."""
    weights: Readers = {}
    activations: Readers = {}
    named = {node.name: node for node in groups.inference.graph_module.graph.nodes}
    for layer in groups.inference.layers.values():
        for path in layer.weights:
            weights.setdefault(weight_name(operand(named[layer.name], path)), []).append((layer, path))
        for path in layer.inputs:
            activations.setdefault(operand(named[layer.name], path).name, []).append((layer, path))
    return weights, activations


def _collect(inference: Inference) -> Iterator[ChannelGroup]:
    members: dict[Axis, list[Member]] = {}
    names: dict[Axis, tuple[bool, str]] = {}
    secondary: set[Axis] = set()
    for tensor, dims in inference.tensors.items():
        for i, dim in enumerate(dims):
            axes = d.axes(dim)
            secondary.update(_minor_factors(d.resolve(dim)))
            for place, axis in enumerate(axes):
                members.setdefault(axis, []).append(Member(tensor, i, dim))
                # reason: the side that produces the channels names the group; a later reader only if nothing does
                produces = i == 0 and len(dims) > 1
                suffix = f".{place}" if len(axes) > 1 else ""
                if axis not in names or (produces and not names[axis][0]):
                    names[axis] = (produces, f"{tensor}:{i}{suffix}")
    taken: set[str] = set()
    for axis, places in members.items():
        name = names[axis][1]
        if name in taken:
            name = next(n for n in (f"{name}'{k}" for k in itertools.count(2)) if n not in taken)
        taken.add(name)
        axis.name = name
        yield ChannelGroup(name, axis.size, axis, tuple(places), primary=axis not in secondary)


def _minor_factors(dim: Dim) -> Iterator[Axis]:
    """Axes of every factor of a product that is not its largest one (the later one of two equals is the largest)."""
    if isinstance(dim, d.Sum):
        for item in dim.items:
            yield from _minor_factors(item)
    elif isinstance(dim, d.Prod):
        live = [f for f in dim.factors if d.axes(f)]
        largest = max(range(len(live)), key=lambda i: (live[i].size, i), default=0)
        for i, part in enumerate(live):
            yield from d.axes(part) if i != largest else _minor_factors(part)
