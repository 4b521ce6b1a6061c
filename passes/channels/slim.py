"""`slim`: remove for good the channels that a plan drops.

In: a traced graph, its channel groups, and the kept coordinates per group. Out: a new, smaller graph. Invariant: every
kept activation coordinate equals that of the graph with the dropped channels masked, to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Dim
from sbs_fx.passes.channels.groups import ChannelGroups
from sbs_fx.passes.channels.inference import Adapter
from sbs_fx.passes.graph import attribute, copy_with
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import PolicyError

aten = torch.ops.aten


def slim(graph_module: fx.GraphModule, groups: ChannelGroups, kept: Mapping[str, Sequence[int]]) -> fx.GraphModule:
    """A copy of the graph without the channels that are not kept.

    Args:
        graph_module: the graph that `groups` was found on (unchanged).
        groups: from `channel_groups`.
        kept: group name -> kept coordinates, ascending; groups not named keep all.

    Raises:
        PolicyError: an unknown group, an index out of range or twice, or a group with nothing left.

    >>> slimmed = slim(graph, groups, {"0.weight:0": [0, 3, 5]})
    >>> slimmed.get_parameter("0.weight").shape
    torch.Size([3, 3, 3, 3])
    """
    index = Slices(groups, _checked(groups, kept))
    tensors = {name: index.tensor(graph_module, name) for name in groups.inference.tensors}
    result = copy_with(graph_module, tensors)
    for node in list(result.graph.nodes):
        _edit(node, groups, index)
    _retype(groups.inference.graph_module, result, index)
    for node in list(result.graph.nodes):
        if node.name in groups.inference.adapters:
            _adapt(result, node, groups.inference.adapters[node.name], index)
    result.graph.lint()
    result.recompile()
    return result


def scatter(
    groups: ChannelGroups, kept: Mapping[str, Sequence[int]], name: str, whole: torch.Tensor, part: torch.Tensor
) -> torch.Tensor:
    """The tensor `name` as a whole with its kept coordinates replaced by those of its slim form `part`."""
    index = Slices(groups, kept)
    places = [index.index(dim).to(whole.device) for dim in groups.inference.tensors[name]]
    result = whole.clone()
    result[torch.meshgrid(*places, indexing="ij") if places else ...] = part.to(whole.dtype)
    return result


class Slices:
    """Sizes and kept coordinates of types under one plan, each type's index computed once."""

    def __init__(self, groups: ChannelGroups, kept: Mapping[str, Sequence[int]]) -> None:
        self.groups = groups
        self.kept = groups.kept_axes({name: list(indices) for name, indices in kept.items()})
        self._index: dict[Dim, torch.Tensor] = {}

    def changed(self, dim: Dim) -> bool:
        return any(axis in self.kept for axis in d.axes(dim))

    def size(self, dim: Dim) -> int:
        return d.evaluate(dim, lambda axis: len(self.kept[axis]) if axis in self.kept else axis.size)

    def index(self, dim: Dim) -> torch.Tensor:
        """Kept coordinates of a type, int64, ascending."""
        dim = d.resolve(dim)
        if dim not in self._index:
            self._index[dim] = d.kept_index(dim, self.kept)
        return self._index[dim]

    def select(self, tensor: torch.Tensor, dims: Sequence[Dim]) -> torch.Tensor:
        """The kept coordinates of a tensor along every dimension."""
        for i, dim in enumerate(dims):
            if self.changed(dim):
                tensor = tensor.index_select(i, self.index(dim).to(tensor.device))
        return tensor

    def tensor(self, graph_module: fx.GraphModule, name: str) -> torch.Tensor:
        """A parameter or buffer of the slim graph."""
        old = attribute(graph_module, name)
        with torch.no_grad():
            new = self.select(old.detach(), self.groups.inference.tensors[name]).contiguous()
        new = new.clone() if new.data_ptr() == old.data_ptr() else new
        return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new


def slim_bits(groups: ChannelGroups, plan: Plan) -> dict[str, int | list[int]]:
    """Weight bits of the slim graph: where a plan has one number per output channel, those of the kept channels.

    Raises:
        PolicyError: not one number for each output channel of the float model.
    """
    result: dict[str, int | list[int]] = {}
    index: Slices | None = None
    for name, bits in plan.weight_bits.items():
        if isinstance(bits, int):
            result[name] = bits
            continue
        index = Slices(groups, plan.kept) if index is None else index
        outputs = groups.outputs[name]
        if len(bits) != d.resolve(outputs).size:
            raise PolicyError(
                f"the plan has {len(bits)} bitwidths for the weight {name!r}; expected one for each of its "
                f"{d.resolve(outputs).size} output channels in the float model, those that go included"
            )
        result[name] = [bits[i] for i in index.index(outputs).tolist()]
    return result


def _retype(old: fx.GraphModule, new: fx.GraphModule, index: Slices) -> None:
    """Shapes in `meta["val"]` follow the types, so that the slim graph can be analysed like a traced one."""
    named = {node.name: node for node in new.graph.nodes}
    for node in old.graph.nodes:
        types, value = index.groups.inference.dims.get(node), node.meta.get("val")
        if isinstance(value, torch.Tensor) and types:
            named[node.name].meta["val"] = _resized(value, types, index)
        elif isinstance(value, (tuple, list)) and types:
            named[node.name].meta["val"] = tuple(_resized(v, t, index) for v, t in zip(value, types, strict=True))


def _resized(value: torch.Tensor, types: Sequence[Dim], index: Slices) -> torch.Tensor:
    if not any(index.changed(dim) for dim in types):
        return value
    shape = [
        s
        if not index.changed(dim)
        else index.size(dim)
        if isinstance(s, int)
        else s * index.size(dim) // d.resolve(dim).size
        for s, dim in zip(value.shape, types, strict=True)
    ]
    if isinstance(value, FakeTensor):  # reason: built directly, twenty times faster than by dispatch
        return FakeTensor(value.fake_mode, torch.empty(shape, dtype=value.dtype, device="meta"), value.device)
    return value.new_empty(shape)


def _checked(groups: ChannelGroups, kept: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
    for name, indices in kept.items():
        if name not in groups:
            raise PolicyError(
                f"the plan keeps channels of {name!r}, which is no channel group of this graph "
                f"({len(groups)} groups, the first: {list(groups)[:3]})"
            )
        size = groups[name].size
        if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= size:
            raise PolicyError(
                f"the plan keeps {list(indices)[:8]} of channel group {name!r}; expected ascending, "
                f"distinct coordinates within [0, {size}), at least one"
            )
    return kept


def _edit(node: fx.Node, groups: ChannelGroups, index: Slices) -> None:
    """Integer arguments follow their types: an int becomes the new size, a symbolic one is scaled by new / old."""
    edits = [e for e in groups.inference.edits.get(node.name, ()) if index.changed(e.dim)]
    if not edits:
        return
    args: list[Any] = [list(a) if isinstance(a, (list, tuple)) else a for a in node.args]
    inferable = _inferable(node, edits)
    for edit in edits:
        new, old = index.size(edit.dim), d.resolve(edit.dim).size
        holder: Any = args
        for step in edit.path[:-1]:
            holder = holder[step]
        value = holder[edit.path[-1]]
        if isinstance(value, int):
            if value >= 0:
                holder[edit.path[-1]] = new
        elif isinstance(value, fx.Node):
            if inferable:
                holder[edit.path[-1]] = -1
            else:
                with node.graph.inserting_before(node):
                    scaled = node.graph.call_function(operator.mul, (value, new))
                    follows = node.graph.call_function(operator.floordiv, (scaled, old))
                scaled.meta["val"] = value.meta["val"] * new
                follows.meta["val"] = scaled.meta["val"] // old
                holder[edit.path[-1]] = follows
    node.args = tuple(args)


def _inferable(node: fx.Node, edits: Sequence[Any]) -> bool:
    """Whether exactly one size of a reshape is symbolic: it can be left to -1."""
    if node.target is not aten.reshape.default:
        return False
    shape = node.args[1]
    symbolic = [s for s in shape if isinstance(s, fx.Node)]
    return len(symbolic) == 1 and all(not isinstance(s, int) or s >= 0 for s in shape)


def _adapt(graph_module: fx.GraphModule, node: fx.Node, adapter: Adapter, index: Slices) -> None:
    """Run an operator across channels at full width: scatter into zeros, run, gather. Exact; its cost is charged.

    The kept coordinates are a buffer with one entry per kept channel, so that slimming the result again slices it.
    """
    if not index.changed(adapter.type):
        return
    name, dim, source = f"_adapter_{node.name}", adapter.dim, node.args[0]
    graph_module.register_buffer(name, index.index(adapter.type).clone())
    narrow_in, narrow_out = source.meta["val"], node.meta["val"]  # type: ignore[union-attr]
    full = d.resolve(adapter.type).size
    graph = node.graph

    def add(target: Any, *args: Any, value: Any) -> fx.Node:
        new = graph.get_attr(target) if isinstance(target, str) else graph.call_function(target, args)
        new.meta["val"] = value
        return new

    with graph.inserting_before(node):
        kept = add(name, value=narrow_in.new_empty((index.size(adapter.type),), dtype=torch.int64))
        sizes = [
            full if i == dim else s if isinstance(s, int) else add(aten.sym_size.int, source, i, value=s)
            for i, s in enumerate(narrow_in.shape)
        ]
        wide_shape = [full if i == dim else s for i, s in enumerate(narrow_in.shape)]
        zeros = add(aten.new_zeros.default, source, sizes, value=narrow_in.new_empty(wide_shape))
        wide = add(aten.index_copy.default, zeros, dim, kept, source, value=narrow_in.new_empty(wide_shape))
    node.replace_input_with(source, wide)  # type: ignore[arg-type]
    node.meta["val"] = narrow_out.new_empty([full if i == dim else s for i, s in enumerate(narrow_out.shape)])
    with graph.inserting_after(node):
        narrow = add(aten.index_select.default, node, dim, kept, value=narrow_out)
    node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
