"""Make an exported graph functional without tracing it a second time, where that is safe.

In: a graph as `torch.export` leaves it, with in-place operators. Out: the same values from out-of-place operators, or
False and an unchanged graph where a view outlives a write or a sub-graph is called; torch's own functionalisation,
which traces again and takes as long as the export, is then the way, as it is where an operator is to be taken apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sbs_fx.passes.capture.canonical import REWRITTEN
from sbs_fx.passes.channels.inference import RULES, load_rules

aten = torch.ops.aten


def make_functional(graph: fx.Graph) -> bool:
    """Replace every in-place operator of `graph` by its out-of-place form. False: not safe, nothing was changed.

    A write is safe if what it writes to is a fresh result of the graph and no view of that, made before the write, is
    read after it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    written: dict[fx.Node, fx.Node] = {}  # a node of a chain of writes -> the tensor that the chain writes to
    views: dict[fx.Node, set[fx.Node]] = {}  # a tensor -> nodes that may share its storage
    writes: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            if node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
                return False
            if node.op == "call_function":  # getitem and arithmetic on sizes
                _record_view(node, written, views)
            continue
        if not node.target._schema.is_mutable:
            if _may_alias(node.target):
                _record_view(node, written, views)
            continue
        base = node.args[0]
        if _out_of_place(node.target) is None or not isinstance(base, fx.Node):
            return False
        root = written.get(base, base)
        fresh = root.op == "call_function" and isinstance(root.target, torch._ops.OpOverload)
        if not fresh or _may_alias(root.target) and root not in written:
            return False
        outlived = (user for view in views.get(root, ()) for user in view.users if order[user] > order[node])
        if next(outlived, None) is not None:
            return False
        written[root] = written[node] = root
        writes.append((node, root))
    for node, root in writes:
        node.target = _out_of_place(node.target)
        chain = [c for c, r in written.items() if r is root and c is not node and order[c] < order[node]]
        for earlier in chain:
            for user in list(earlier.users):
                if order[user] > order[node]:
                    user.replace_input_with(earlier, node)
    return True


def decompositions(graph: fx.Graph) -> dict[Any, Callable[..., Any]]:
    """What `run_decompositions` is to take apart: composite operators without a rule, which would pin all they touch.

    A composite computes by running what it is made of, so values stay as they are, bit for bit.
    """
    load_rules()

    def is_opaque(target: Any) -> bool:
        return (
            isinstance(target, torch._ops.OpOverload)
            and target not in RULES
            and target not in REWRITTEN
            and torch.Tag.pointwise not in target.tags
            and _is_composite(target)
        )

    opaque = (n for n in graph.nodes if is_opaque(n.target) and isinstance(n.meta["val"], (torch.Tensor, tuple, list)))
    if next(opaque, None) is None:
        return {}
    # reason: all of them, since a composite may be made of others
    return {target: how for target, how in torch.export.default_decompositions().items() if is_opaque(target)}


def _record_view(node: fx.Node, written: dict[fx.Node, fx.Node], views: dict[fx.Node, set[fx.Node]]) -> None:
    """`node` may share storage with any of its inputs, and with whatever those share storage with."""
    for source in node.all_input_nodes:
        root = written.get(source, source)
        views.setdefault(root, set()).add(node)
        for members in views.values():
            if source in members:
                members.add(node)


def _may_alias(target: torch._ops.OpOverload) -> bool:
    """Whether a result may share storage with an argument: views by schema, composites such as reshape, dropout."""
    if target in _FRESH:
        return False
    return any(r.alias_info is not None for r in target._schema.returns) or _is_composite(target)


def _is_composite(target: torch._ops.OpOverload) -> bool:
    """Whether the operator is made of others, which torch can put in its place, and it computes by running them."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


# Composite operators whose result never shares storage with an argument.
_FRESH = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv2d.padding,
    aten.linear.default,
    aten.batch_norm.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.matmul.default,
    aten.cat.default,
    aten.conv_transpose2d.input,
    aten.max_pool2d.default,
}


def _out_of_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """aten.add_.Tensor -> aten.add.Tensor; None where there is no such form with the same arguments."""
    packet = target._schema.name.removeprefix("aten::")
    if not packet.endswith("_") or any(a.alias_info is not None for a in target._schema.arguments[1:]):
        return None
    functional = getattr(getattr(aten, packet[:-1], None), target._overloadname, None)
    same = functional is not None and len(functional._schema.arguments) == len(target._schema.arguments)
    return functional if same and not functional._schema.is_mutable else None
