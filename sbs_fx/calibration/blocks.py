"""A graph cut where one tensor carries everything: the blocks between are run, measured and reconstructed one by one.

In: a traced, slim or gated graph. Out: names of tensors that every path from input to output goes through, and the
block between two of them as a graph of its own. Holds: a block shares parameters and modules with the graph, and
the blocks one after the other compute what the graph computes.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.data.batches import Tensors
from sbs_fx.passes import ChannelGroups


def alike(groups: ChannelGroups) -> set[str]:
    """Nodes that give in a slim graph what they give in the float graph, at the kept coordinates."""
    # reason: an operator that runs at full width gives all coordinates, of which some mean nothing
    return {node.name for node in groups.inference.dims if node.name not in groups.inference.adapters}


def cut_points(graph_module: fx.GraphModule, layers: Container[str], among: Container[str]) -> list[str]:
    """Names of tensors at which the graph falls apart: behind each of `layers` (names of nodes), up to the next, the
    last one there is. Only nodes whose name is in `among` count. A tensor that is more than twice as large as those of
    the cuts on both sides is none, since holding it for all images takes more than running one layer again.

    In a residual network these are the sums, in a chain the inputs of layers. A gate is no cut: its tensor is.
    """
    nodes = list(graph_module.graph.nodes)
    live = _live(nodes)
    position = {node: i for i, node in enumerate(nodes)}
    reach = 0  # the last place that reads a tensor met so far
    cuts: dict[int, fx.Node] = {}
    count = 0
    for i, node in enumerate(nodes):
        count += node.name in layers
        if node not in live:
            continue
        if reach <= i and count and node.name in among and isinstance(node.meta.get("val"), Tensor):
            cuts[count] = node
        # reason: a size of the input carries no values
        readers = [user for user in node.users if node.op != "placeholder" or user in live]
        reach = max([reach, *(position[user] for user in readers)])
    found = list(cuts.values())
    sizes = [_size(node) for node in found]
    peaks = {i for i in range(1, len(found) - 1) if sizes[i] > 2 * max(sizes[i - 1], sizes[i + 1])}
    return [node.name for i, node in enumerate(found) if i not in peaks]


def _size(node: fx.Node) -> int:
    """Numbers in its tensor, as it was traced."""
    return math.prod(size if isinstance(size, int) else size.node.hint for size in node.meta["val"].shape)


def _live(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on values of the input. A size of the input is no value."""
    live: set[fx.Node] = set()
    for node in nodes:
        if (
            node.op == "placeholder"
            or any(n in live for n in node.all_input_nodes)
            and not (node.target is torch.ops.aten.sym_size.int and node.all_input_nodes[0].op == "placeholder")
        ):
            live.add(node)
    return live


def subgraph(graph_module: fx.GraphModule, begin: str | None, ends: Sequence[str]) -> fx.GraphModule:
    """The part of a graph from the tensor `begin` (None: the inputs) to the tensors `ends`.

    Takes the graph's inputs and, unless it is None, the tensor `begin`; gives a tuple of tensors.
    """
    named = {node.name: node for node in graph_module.graph.nodes}
    needed: set[fx.Node] = set()
    stack = [named[end] for end in ends]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend([] if node.name == begin else node.all_input_nodes)
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph_module.graph.find_nodes(op="placeholder"):
        new[node] = graph.node_copy(node)
    if begin is not None:
        new[named[begin]] = graph.placeholder(f"{begin}_")
    for node in graph_module.graph.nodes:
        if node in needed and node not in new:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[named[end]] for end in ends))
    return fx.GraphModule(graph_module, graph)


@torch.no_grad()
def results(part: fx.GraphModule, batches: Sequence[Tensors]) -> Iterator[Tensors]:
    """What a block gives, batch by batch. What depends on no input, such as rounded weights, is computed once."""
    interpreter, fixed = fx.Interpreter(part), dict[fx.Node, Any]()
    interpreter.env = fixed
    for node in part.graph.nodes:
        if node.op not in ("placeholder", "output") and all(source in fixed for source in node.all_input_nodes):
            fixed[node] = interpreter.run_node(node)
    for tensors in batches:
        yield interpreter.run(*tensors, initial_env=dict(fixed))
