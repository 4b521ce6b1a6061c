"""Values that hold graphs, as bytes for another process of the same versions.

In: any value that pickles but for graphs and operators in it. Out: bytes that `pickle.loads` reads where this package
is installed. Holds: what was one object is one object again; nodes keep their names, not their metadata. Never for
files: whoever reads a pickle runs it.
"""

from __future__ import annotations

import io
import operator
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

_MODULE_STATE = ("_parameters", "_buffers", "_modules", "training")
_META = "sbs_fx"  # what the metadata of this package begins with


def dumps(value: Any) -> bytes:
    """Raises whatever pickle does for what cannot be written, such as a lambda."""
    stream = io.BytesIO()
    _Pickler(stream).dump(value)
    return stream.getvalue()


@dataclass(frozen=True)
class _Named:
    """A node among the arguments of another; no tuple, which would be walked into."""

    name: str


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch._ops.OpOverload):
            name, _, overload = obj.name().partition(".")
            return _operator, (*name.split("::"), overload or "default")
        if isinstance(obj, fx.GraphModule):
            state = {key: obj.__dict__[key] for key in _MODULE_STATE}
            meta = {key: value for key, value in obj.meta.items() if str(key).startswith(_META)}
            rows = [
                (n.op, n.target, *fx.node.map_arg((n.args, n.kwargs), lambda a: _Named(a.name)), n.name)
                for n in obj.graph.nodes
            ]
            return _graph_module, (state, rows, obj.graph._codegen, meta)
        return NotImplemented


def _operator(namespace: str, name: str, overload: str) -> Any:
    return operator.attrgetter(f"{namespace}.{name}.{overload}")(torch.ops)


def _graph_module(state: Mapping[str, Any], rows: list[Any], codegen: Any, meta: dict[str, Any]) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    root.__dict__.update(state)
    nodes: dict[str, fx.Node] = {}
    for op, target, args, kwargs, name in rows:
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: nodes[a.name] if isinstance(a, _Named) else a)
        nodes[name] = graph.create_node(op, target, args, kwargs, name)
    graph._codegen = codegen
    result = fx.GraphModule(root, graph)
    result.meta.update(meta)
    result.training = state["training"]
    return result
