"""`on_device`: a graph on another device, whatever its nodes say.

In: a traced, slim or static graph. Out: a copy whose tensors, and the devices that its nodes name, are elsewhere; what
was traced and trained on a GPU can so be saved for processors. Holds: nodes keep their names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sbs_fx.passes.slim import copy_graph


def on_device(graph_module: fx.GraphModule, device: torch.device | str) -> fx.GraphModule:
    """A copy on `device` of a graph that calls no modules; shapes stay as they are."""
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
