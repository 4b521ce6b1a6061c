"""Our passes inside torch's `PassManager`.

In: one of our passes and its options. Out: a callable GraphModule -> PassResult that says whether the pass changed
anything. Groups, cost model and what each pass changed travel in `graph_module.meta`, so that later passes find them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from sbs_fx.passes.channels.groups import ChannelGroups, channel_groups
from sbs_fx.passes.cost.model import CostModel
from sbs_fx.passes.graph import attribute


class Changes(NamedTuple):
    """How many nodes a pass added, removed and gave other operators or arguments; how many tensors other values."""

    added: int
    removed: int
    edited: int
    tensors: int


def as_pass(function: Callable[..., Any], **options: Any) -> Callable[[fx.GraphModule], PassResult]:
    """Wrap a pass for `torch.fx.passes.infra.pass_manager.PassManager`.

    A pass that takes `groups` gets those that an earlier `as_pass(channel_groups)` of the same graph left, or finds
    them. An analysis (`channel_groups`, `cost_model`) leaves its result in `graph_module.meta` under its name, any
    other pass what it changed in `meta["changes"]`: its name -> `Changes`.

    >>> from torch.fx.passes.infra.pass_manager import PassManager
    >>> done = PassManager([as_pass(channel_groups), as_pass(slim, kept={"0.weight:0": [0, 1]})])(graph)
    >>> done.graph_module(images).shape
    torch.Size([2, 4])
    """

    def run(graph_module: fx.GraphModule) -> PassResult:
        arguments = dict(options)
        if "groups" in inspect.signature(function).parameters and "groups" not in arguments:
            groups = graph_module.meta.get("channel_groups")
            if groups is None or groups.inference.graph_module is not graph_module:
                groups = channel_groups(graph_module)
            arguments["groups"] = groups
        result = function(graph_module, **arguments)
        if isinstance(result, (ChannelGroups, CostModel)):
            graph_module.meta[function.__name__] = result
            return PassResult(graph_module, False)
        changes = _changes(graph_module, result)
        result.meta["changes"] = {**graph_module.meta.get("changes", {}), function.__name__: changes}
        return PassResult(result, any(changes))

    run.__name__ = function.__name__
    return run


def _changes(before: fx.GraphModule, after: fx.GraphModule) -> Changes:
    """Of a pass that made a graph of its own; nodes and tensors are the same where their names are."""
    old, new = ({node.name: node for node in g.graph.nodes} for g in (before, after))
    both = old.keys() & new.keys()
    read = {str(node.target) for node in new.values() if node.op == "get_attr"}
    read &= {str(node.target) for node in old.values() if node.op == "get_attr"}
    return Changes(
        added=len(new.keys() - both),
        removed=len(old.keys() - both),
        edited=sum(_call(old[name]) != _call(new[name]) for name in both),
        tensors=sum(not torch.equal(attribute(before, name), attribute(after, name)) for name in read),
    )


def _call(node: fx.Node) -> Any:
    return node.op, node.target, fx.node.map_arg((node.args, node.kwargs), lambda source: source.name)
