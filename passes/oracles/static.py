"""Oracles for static graphs: are they the gated graph, and are their bits real?

In: a static graph from `finalize`, the gated graph it came from, inputs. Out: numbers that a test or a table can judge.
Holds: nothing here reads the arithmetic of `finalize`; the gated graph's own quantisers say which codes are right, and
levels are counted on the values that the static graph computes while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from sbs_fx.passes.dialects import gates_of, static_of
from sbs_fx.passes.folding import TRANSPOSED
from sbs_fx.passes.graph import channel_rows
from sbs_fx.quantizer.superbit import SuperBitQuantizer

aten = torch.ops.aten


class CodeDifference(NamedTuple):
    """One activation, both graphs fed the same codes before it: positions, those that differ, and by how much."""

    tensor: str
    positions: int
    differing: int
    largest_step: int


class LevelCount(NamedTuple):
    """Distinct values of one quantised tensor: `levels` in the worst channel (weights) or in all (activations)."""

    tensor: str
    kind: str
    bits: int
    levels: int

    @property
    def is_real(self) -> bool:
        return self.levels <= 2**self.bits


@torch.no_grad()
def compare_static(gated: fx.GraphModule, static: fx.GraphModule, inputs: Sequence[Tensor]) -> list[CodeDifference]:
    """Codes of both graphs, layer by layer, with teacher forcing.

    The static graph runs first. Then the gated graph runs; at each activation gate it computes its own codes, which are
    compared, and goes on with the value of the static graph, so that each gate tells of one layer alone.

    Args:
        gated: in eval mode, from `insert_gates`, bits fixed.
        static: `finalize(gated)`.
        inputs: one tensor per graph input, any batch size.

    Returns:
        One row per quantised activation, in graph order.
    """
    activations = static_of(static).activations
    names = {name for activation in activations.values() for name in (activation.codes, activation.values)}
    recorded = _Recorder(static, names)
    recorded.run(*inputs)
    forced = _Forced(gated, activations, recorded.values)
    forced.run(*inputs)
    return forced.rows


@torch.no_grad()
def count_levels(static: fx.GraphModule, inputs: Sequence[Tensor]) -> list[LevelCount]:
    """Distinct values of every quantised weight channel and activation, counted as the static graph runs.

    A weight of several bitwidths has one row per bitwidth: the worst of its channels.
    """
    dialect = static_of(static)
    activations = {a.values: (name, a.bits) for name, a in dialect.activations.items()}
    values = {  # the node that holds the values of a weight, after its codes were made floats and scaled
        user if user.target is not aten.to.dtype else next(iter(user.users)): node.target
        for node in static.graph.find_nodes(op="get_attr")
        if node.target in dialect.weights
        for user in node.users
    }
    recorded = _Recorder(static, {*activations, *(node.name for node in values)})
    recorded.run(*inputs)
    rows = [
        LevelCount(name, "activation", bits, recorded.values[node].unique().numel())
        for node, (name, bits) in activations.items()
    ]
    for node, name in values.items():
        rows += _weight_levels(node, str(name), dialect.weights[name], recorded.values[node.name])
    return rows


def _weight_levels(node: fx.Node, name: str, stored: Any, value: Tensor) -> list[LevelCount]:
    """Channels are coordinates of the axis; of a grouped transposed convolution, within one block of rows each."""
    layer = next(iter(node.users))
    groups = int(layer.args[6]) if layer.target in TRANSPOSED else 1  # type: ignore[arg-type]
    channels = channel_rows(value, stored.axis)
    blocks = channels.reshape(len(channels) * groups, -1)
    counts = [row.unique().numel() for row in blocks]
    bits = (stored.bits,) * len(channels) if isinstance(stored.bits, int) else stored.bits
    worst: dict[int, int] = {}
    for i, count in enumerate(counts):
        worst[bits[i // groups]] = max(worst.get(bits[i // groups], 0), count)
    return [LevelCount(name, "weight", b, count) for b, count in sorted(worst.items())]


class _Recorder(fx.Interpreter):
    """Keeps the values of some nodes, by name."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names, self.values = names, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.values[n.name] = value
        return value


class _Forced(fx.Interpreter):
    """Runs a gated graph on the activations of a static one, and compares before it goes on."""

    def __init__(self, gated: fx.GraphModule, activations: Any, values: dict[str, Tensor]) -> None:
        super().__init__(gated)
        self.names = {target: name for name, target in gates_of(gated).activations.items()}
        self.activations, self.values = activations, values
        self.rows: list[CodeDifference] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        activation = self.activations.get(self.names.get(target))
        gate = self.fetch_attr(target)
        if activation is None or not isinstance(gate, SuperBitQuantizer):
            return super().call_module(target, args, kwargs)
        theirs = self.values[activation.codes].to(torch.int32) - activation.zero_point
        step = (gate.codes(args[0]) - theirs).abs()
        self.rows.append(CodeDifference(self.names[target], step.numel(), int((step > 0).sum()), int(step.max())))
        return self.values[activation.values].to(args[0].dtype)
