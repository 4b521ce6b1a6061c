"""`compare_slim`: is a slim graph what its plan says, node by node?

In: a traced graph, its channel groups, a plan and inputs. Out: a `SlimReport`. Two readings of one analysis are run in
step: the whole graph with the dropped channels silenced, whose kept coordinates are gathered, and the slim graph. They
agree to rounding or a rule is wrong, and the first node that disagrees is next to it. The output alone is no oracle: a
saturated softmax or sigmoid hides most errors before they get there. Constant layer scales, zero gammas and biases hide
them too, so randomise the weights first; and use float64, since random statistics can cost float32 three digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sbs_fx.passes.capture.trace import outputs_of
from sbs_fx.passes.channels.groups import ChannelGroups, channel_groups
from sbs_fx.passes.channels.slim import Slices, slim
from sbs_fx.passes.gates.insertion import channel_gates, insert_gates
from sbs_fx.plan.errors import GraphError

Kept = Mapping[str, Sequence[int]]

# A tensor whose largest entry is below this is noise around a zero (a mean of one coordinate taken from itself).
_SMALLEST_SCALE = 1e-3


@dataclass(frozen=True)
class SlimReport:
    """How far a slim graph is from the masked one.

    `errors` holds one relative error per computed tensor, by node name in graph order: the largest difference over
    the largest entry (or over 1e-3, where that is more). `output_error` is the largest error of the graph's outputs,
    `differs_from_dense` the largest relative difference between the slim outputs and the same coordinates of the dense
    ones: near 0, the plan changes nothing and the comparison says nothing.
    """

    errors: Mapping[str, float] = field(repr=False)
    output_error: float
    differs_from_dense: float

    @property
    def nodes(self) -> int:
        """How many tensors were compared."""
        return len(self.errors)

    @property
    def worst_error(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def worst_node(self) -> str:
        """The node with the largest error, "" if nothing was compared."""
        return max(self.errors, key=self.errors.__getitem__, default="")

    def first_above(self, tolerance: float) -> str:
        """The first node whose error exceeds `tolerance`, next to the rule that is wrong; "" if there is none."""
        return next((name for name, error in self.errors.items() if error > tolerance), "")

    def __str__(self) -> str:
        return (
            f"{self.nodes} tensors compared, worst relative error {self.worst_error:.1e}"
            f"{f' at {self.worst_node}' if self.worst_error else ''}, at the output {self.output_error:.1e} "
            f"(slim and dense outputs differ by {self.differs_from_dense:.1e})"
        )


def compare_slim(
    graph_module: fx.GraphModule,
    groups: ChannelGroups,
    kept: Kept,
    inputs: Sequence[Tensor],
    *,
    slimmed: fx.GraphModule | None = None,
) -> SlimReport:
    """Run the masked and the slim graph on the same inputs and compare every tensor that both compute.

    Args:
        graph_module: the graph that `groups` was found on, from `trace`.
        groups: from `channel_groups`.
        kept: group name -> kept coordinates, as `slim` takes it.
        inputs: one tensor per graph input, of any batch size, in the dtype of the parameters.
        slimmed: a slim graph to check; default: `slim(graph_module, groups, kept)`.

    Raises:
        GraphError: a tensor has another shape in the slim graph than its type says, or exists in one graph only.
    """
    result = slim(graph_module, groups, kept) if slimmed is None else slimmed
    actual = activations(result, inputs)
    outputs = [node.name for node in outputs_of(graph_module)]
    errors: dict[str, float] = {}
    slim_outputs: dict[str, Tensor] = {}
    slices = measured_slices(groups, kept, inputs)
    for name, expected in masked_activations(graph_module, groups, kept, inputs):
        value = next((v for n, v in actual if n == name), None)
        if value is None:
            raise GraphError("is computed by the masked graph and not by the slim one", pass_name="slim", node=name)
        errors[name] = relative_error(slices.narrow(name, value), expected, name)
        if name in outputs:
            slim_outputs[name] = value
    changes = [
        relative_error(slim_outputs[name], slices.gather(name, value), name)
        for name, value in activations(graph_module, inputs)
        if name in slim_outputs
    ]
    return SlimReport(errors, max((errors[name] for name in slim_outputs), default=0.0), max(changes, default=0.0))


def masked_activations(
    graph_module: fx.GraphModule, groups: ChannelGroups, kept: Kept, inputs: Sequence[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(node name, kept coordinates of its value) for every tensor that the masked graph computes, in graph order."""
    gated = insert_gates(graph_module, groups)
    for name, gate in channel_gates(gated).items():
        if name in kept:
            gate.fix(list(kept[name]))
    slices = measured_slices(groups, kept, inputs)
    for name, value in activations(gated, inputs):
        if name in slices.types:
            yield name, slices.gather(name, value)


def activations(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(node name, value) for every tensor that a graph computes, in graph order; values are freed after their last
    use, so that two graphs can be run in step."""
    interpreter = fx.Interpreter(graph_module)
    interpreter.args_iter = iter(graph_module.graph.process_inputs(*inputs))
    for node in graph_module.graph.nodes:
        with torch.no_grad():
            value = interpreter.env[node] = interpreter.run_node(node)
        if isinstance(value, Tensor) and node.op.startswith("call_"):
            yield node.name, value
        for unused in interpreter.user_to_last_uses.get(node, []):
            del interpreter.env[unused]


def measured_slices(groups: ChannelGroups, kept: Kept, inputs: Sequence[Tensor]) -> MeasuredSlices:
    """How to gather activations of graphs that run on these very inputs."""
    return MeasuredSlices(groups, kept, inputs)


class MeasuredSlices:
    """Kept coordinates of activations, with symbolic sizes (the batch) as large as the given inputs have them."""

    def __init__(self, groups: ChannelGroups, kept: Kept, inputs: Sequence[Tensor]) -> None:
        graph_module = groups.inference.graph_module
        sized = channel_groups(
            graph_module, keep_outputs=groups.inference.pin_outputs, symbol_sizes=symbol_sizes(graph_module, inputs)
        )
        if list(sized) != list(groups):
            raise GraphError(
                f"inputs of shape {[tuple(x.shape) for x in inputs]} give other channel groups than the "
                f"graph alone; they differ in {sorted({*sized} ^ {*groups})[:3]}",
                pass_name="channel_groups",
            )
        self.slices = Slices(sized, kept)
        self.adapters = sized.inference.adapters
        self.types: dict[str, Any] = {
            node.name: types
            for node, types in sized.inference.dims.items()
            if node.op == "call_function" and isinstance(node.meta["val"], Tensor)
        }

    def gather(self, name: str, value: Tensor) -> Tensor:
        """The kept coordinates of a value of the dense or masked graph."""
        return self.slices.select(value, self.types[name])

    def narrow(self, name: str, value: Tensor) -> Tensor:
        """A value of the slim graph; an adapter's operator runs at full width, of which the kept part counts."""
        if name not in self.adapters:
            return value
        adapter = self.adapters[name]
        if not self.slices.changed(adapter.type):
            return value
        return value.index_select(adapter.dim, self.slices.index(adapter.type).to(value.device))


def symbol_sizes(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, int]:
    """The size that each symbolic input dimension has in the given inputs, by symbol name."""
    placeholders = [n for n in graph_module.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), Tensor)]
    sizes: dict[str, int] = {}
    for node, value in zip(placeholders, pytree.tree_leaves(tuple(inputs)), strict=True):
        for symbolic, size in zip(node.meta["val"].shape, value.shape, strict=True):
            if isinstance(symbolic, torch.SymInt):
                sizes[str(symbolic.node.expr)] = int(size)
    return sizes


def relative_error(actual: Tensor, expected: Tensor, name: str = "") -> float:
    """Largest difference over the largest finite entry of `expected`; infinite if either holds a NaN of its own.

    Raises:
        GraphError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise GraphError(
            f"has shape {tuple(actual.shape)} in the slim graph and {tuple(expected.shape)} by its type",
            pass_name="slim",
            node=name,
        )
    if actual.numel() == 0:
        return 0.0
    if not expected.is_floating_point() and not expected.is_complex():
        actual, expected = actual.double(), expected.double()
    actual, expected = actual.detach(), expected.detach()
    difference = torch.where(actual == expected, 0, (actual - expected).abs())  # reason: equal infinities differ by NaN
    scale = expected.abs().nan_to_num(0, 0, 0).max().clamp_min(_SMALLEST_SCALE)
    return float((difference.max() / scale).nan_to_num(torch.inf))
