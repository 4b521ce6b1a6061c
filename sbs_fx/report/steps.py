"""The float graph as rows of a report: what runs, where it stands in the model and in its source.

In: channel groups of a traced graph. Out: a row a node, in the order in which they run, without the tensors that are
only read. Holds: each row reads rows above it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from sbs_fx.passes import ChannelGroups
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Dim
from sbs_fx.report.data import StepRow

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_LIBRARY = f"{os.sep}torch{os.sep}"
_PACKAGES = "site-packages"
_PLACEHOLDER = "_empty_nn_module_stack"  # what export names where no module calls


def steps_of(groups: ChannelGroups) -> tuple[StepRow, ...]:
    """The rows of a traced graph."""
    graph, names = groups.inference.graph_module, {axis: group.name for axis, group in groups.of_axis.items()}
    places: dict[fx.Node, int] = {}
    rows: list[StepRow] = []
    for node in graph.graph.nodes:
        if node.op in ("get_attr", "output"):
            continue
        places[node] = len(rows)
        reads = tuple(dict.fromkeys(places[source] for source in node.all_input_nodes if source in places))
        dims = list(_flat(groups.inference.dims.get(node, ())))
        axes = dict.fromkeys(names[axis] for dim in dims for axis in d.axes(dim) if axis in names)
        why = dict.fromkeys(reason for dim in dims for reason in d.reasons(dim))
        rows.append(
            StepRow(
                name=node.name,
                operator=_operator(node),
                module=_module(node),
                source=_source(node),
                reads=reads,
                shape=_shape(node),
                groups=tuple(axes),
                pinned=tuple(why),
            )
        )
    return tuple(rows)


def _flat(dims: Any) -> Iterator[Dim]:
    """Dimensions of a tensor, or of all that a node with several results gives."""
    for dim in dims:
        if isinstance(dim, tuple):
            yield from _flat(dim)
        elif isinstance(dim, Dim):
            yield dim


def _operator(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(list(stack.values())), ("",))[0])
    return "" if path.startswith(_PLACEHOLDER) else path


def _source(node: fx.Node) -> str:
    """The innermost line that is not torch's own, its path from the package on."""
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if _LIBRARY not in f[0]]
    if not frames:
        return ""
    path, line = frames[-1]
    _, installed, inner = path.rpartition(f"{_PACKAGES}{os.sep}")
    return f"{inner if installed else os.path.basename(path)}:{line}"


def _shape(node: fx.Node) -> tuple[int, ...]:
    value: Any = node.meta.get("val")
    return tuple(size if type(size) is int else 0 for size in value.shape) if isinstance(value, Tensor) else ()
