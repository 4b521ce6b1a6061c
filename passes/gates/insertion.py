"""`insert_gates`: make every decision a node of the graph.

In: a traced (or slim) graph and its channel groups. Out: a searchable graph with one super-bit quantiser per weight,
one per activation tensor that a layer reads (shared by its consumers), one channel gate per group. Invariants: with
every gate open at float precision the output is bitwise that of the input graph; `.train()` and `.eval()` switch batch
norm and dropout and keep eps, momentum and p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.channels.facts import non_negative
from sbs_fx.passes.channels.groups import ChannelGroups, quantized_tensors
from sbs_fx.passes.channels.inference import Layer, Path, Statistic, operand
from sbs_fx.passes.dialects import Gated, Searchable, gates_of, set_dialect, switchable
from sbs_fx.passes.folding import has_statistics
from sbs_fx.passes.gates import masked
from sbs_fx.passes.graph import attribute, copy_graph
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.errors import GraphError
from sbs_fx.plan.plan import Kind
from sbs_fx.quantizer.channel_gate import ChannelGate
from sbs_fx.quantizer.superbit import SuperBitQuantizer

aten = torch.ops.aten


Candidates = Callable[[Kind, str], tuple[int, ...]]
_DEFAULT = (2, 4, 8)


@switchable
class BatchNorm(nn.Module):
    """A batch-norm node as a module, so that `.train()` and `.eval()` reach it; eps and momentum stay.

    Shapes: x (batch, channels, ...), the others (channels,).
    """

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        return aten.batch_norm.default(x, weight, bias, mean, var, self.training, self.momentum, self.eps, True)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, eps={self.eps}"


def insert_gates(
    graph_module: fx.GraphModule,
    groups: ChannelGroups,
    *,
    channels: bool = True,
    candidates: tuple[int, ...] | Candidates = _DEFAULT,
    per_channel: bool = True,
    zero_points: bool = True,
    block: int | Mapping[str, int] = 1,
) -> fx.GraphModule:
    """A copy of the graph with gates, all open at float precision and in eval mode.

    Args:
        graph_module: the graph `groups` was found on, or its slim version (then pass `channels=False`).
        groups: from `channel_groups`.
        channels: insert channel gates and masked statistics.
        candidates: of every super-bit quantiser, or by ("weight" | "activation", name); where only float is among them,
            the default.
        per_channel: one weight range per output channel; False: one per tensor.
        zero_points: activations may have a zero point, and be unsigned; False: symmetric, signed grids.
        block: channels that share one pruning decision, one number or one by group name.

    The modules are found with `weight_gates`, `activation_gates` and `channel_gates`.

    >>> gated = insert_gates(graph, groups)
    >>> torch.equal(gated(images), graph(images))
    True
    """
    result = copy_graph(graph_module)
    builder = _Builder(result, groups, candidates, per_channel, zero_points)
    if channels:
        builder.insert_channel_gates(block)
    builder.insert_quantizers()
    builder.make_switchable()
    gates = builder.weights, builder.activations
    set_dialect(result, Searchable(*gates, builder.channels) if channels else Gated(*gates))
    result.graph.lint()
    result.recompile()
    return result.eval()


def weight_gates(gated: fx.GraphModule) -> dict[str, SuperBitQuantizer]:
    """Weight quantisers by weight name.

    >>> list(weight_gates(insert_gates(graph, groups)))
    ['0', '3', '8']
    """
    return {n: gated.get_submodule(t) for n, t in gates_of(gated).weights.items()}


def activation_gates(gated: fx.GraphModule) -> dict[str, SuperBitQuantizer]:
    """Activation quantisers by the name of the tensor (graph node) they quantise.

    >>> len(activation_gates(insert_gates(graph, groups)))
    3
    """
    return {n: gated.get_submodule(t) for n, t in gates_of(gated).activations.items()}


def channel_gates(gated: fx.GraphModule) -> dict[str, ChannelGate]:
    """Channel gates by group name.

    >>> list(channel_gates(insert_gates(graph, groups)))
    ['0.weight:0', '3.weight:0']
    """
    dialect = gates_of(gated)
    paths = dialect.channels if isinstance(dialect, Searchable) else {}
    return {n: gated.get_submodule(t) for n, t in paths.items()}


def apply_bits(gated: fx.GraphModule, weight_bits: Mapping[str, Any], activation_bits: Mapping[str, int]) -> None:
    """Fix the bitwidth of the named gates; the others stay as they are.

    Raises:
        GraphError: a name without a gate.

    >>> gated = insert_gates(graph, groups, channels=False)
    >>> apply_bits(gated, {"3": 4}, {})
    >>> torch.equal(gated(images), graph(images))
    False
    """
    for kind, gates, bits in (
        ("weight", weight_gates(gated), weight_bits),
        ("activation", activation_gates(gated), activation_bits),
    ):
        for name, value in bits.items():
            if name not in gates:
                raise GraphError(
                    f"no {kind} gate is called {name!r}; there are {len(gates)}, the first: {list(gates)[:3]}",
                    pass_name="insert_gates",
                )
            gates[name].fix(value)


class _Builder:
    def __init__(
        self,
        result: fx.GraphModule,
        groups: ChannelGroups,
        candidates: tuple[int, ...] | Candidates,
        per_channel: bool,
        zero_points: bool,
    ) -> None:
        self.module, self.graph, self.groups = result, result.graph, groups
        self.candidates = candidates if callable(candidates) else lambda *_: candidates
        self.per_channel, self.zero_points = per_channel, zero_points
        self.nodes = {node.name: node for node in result.graph.nodes}
        self.types = {node.name: dims for node, dims in groups.inference.dims.items()}
        self.masks: dict[Axis, fx.Node] = {}
        self.dim_masks: dict[Any, fx.Node] = {}
        self.weights: dict[str, str] = {}
        self.activations: dict[str, str] = {}
        self.channels: dict[str, str] = {}

    def _add(self, kind: str, name: str, module: nn.Module) -> str:
        """A gate in a holder of its kind; its path."""
        holder = self.module._modules.setdefault(kind, nn.Module())
        key = name.replace(".", "_").replace(":", "_").replace("'", "_")
        while hasattr(holder, key):  # reason: taken by another gate, or a method of modules, such as `to`
            key += "_"
        holder.add_module(key, module)
        return f"{kind}.{key}"

    # -- channels ----------------------------------------------------------------------------------------------------

    def insert_channel_gates(self, block: int | Mapping[str, int]) -> None:
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            for group in self.groups.values():
                gate = ChannelGate(group.size, block if isinstance(block, int) else block[group.name])
                self.channels[group.name] = self._add("channel_gates", group.name, gate)
                self.masks[group.axis] = self.graph.call_module(self.channels[group.name])
        read_by_weights = self._axes_read_by_weights()
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and isinstance(attribute(self.module, str(node.target)), nn.Parameter):
                self._mask_tensor(node, range(node.meta["val"].ndim), self.masks.keys() - read_by_weights)
            for statistic in self.groups.inference.statistics.get(node.name, ()):
                self._mask_statistic(node, statistic)
        layers = self.groups.inference.layers.values()
        weights = {operand(self.nodes[x.name], path): x.outputs for x in layers for path in x.weights}
        for weight, outputs in weights.items():
            rank = weight.meta["val"].ndim
            self._mask_tensor(weight, [i for i in range(rank) if i != outputs % rank], read_by_weights)

    def _axes_read_by_weights(self) -> set[Axis]:
        """Axes that only layers with weights add up over. Masking those weights' inputs takes all effect from a closed
        channel, while the channel itself is still computed: so the gradient tells what opening it again would do, which
        is zero where its own weights are masked too."""
        inference = self.groups.inference
        others = {axis for adapter in inference.adapters.values() for axis in d.axes(adapter.type)}
        outputs: dict[fx.Node, int] = {}
        for layer in inference.layers.values():
            read = [operand(self.nodes[layer.name], path) for path in layer.weights]
            alike = all(outputs.setdefault(node, layer.outputs) == layer.outputs for node in read)
            if layer.kind not in ("conv", "linear") or not read or not alike:
                others |= {axis for term in layer.terms for dim, _ in term.sizes for axis in d.axes(dim)}
        return self.masks.keys() - others

    def _mask(self, dim: Dim, among: Set[Axis]) -> fx.Node | None:
        """The node that holds the mask of a type by these axes; None where nothing can be pruned."""
        order: dict[Axis, int] = {}
        key = masked.recipe(dim, order)
        live = [axis for axis in order if axis in among]
        if not live:
            return None
        if key == ("axis", 0):
            return self.masks[live[0]]
        cached = (key, tuple(order), tuple(live))
        if cached not in self.dim_masks:
            last = list(self.masks.values())[-1]
            with self.graph.inserting_after(last):
                ones = {
                    a: self.masks[a] if a in live else self.graph.call_function(torch.ones, (a.size,)) for a in order
                }
            anchor = max((*ones.values(), last), key=lambda n: n)
            with self.graph.inserting_after(anchor):
                self.dim_masks[cached] = self.graph.call_function(masked.dim_mask, (key, *ones.values()))
        return self.dim_masks[cached]

    def _mask_tensor(self, node: fx.Node, dims: Iterable[int], among: Set[Axis]) -> None:
        """Silence these dimensions of a tensor, for all that read it."""
        types, users, value = self.types[node.name], list(node.users), node
        for i in dims:
            mask = self._mask(types[i], among)
            if mask is not None:
                # reason: after both, whichever comes later
                with self.graph.inserting_after(max(value, mask)):
                    value = self.graph.call_function(masked.silence, (value, mask, i))
                value.meta = dict(node.meta)
                self.types[value.name] = types
        for user in users:
            if value is not node:
                user.replace_input_with(node, value)

    def _mask_statistic(self, node: fx.Node, statistic: Statistic) -> None:
        masks = [(i, m) for i, dim in statistic.dims if (m := self._mask(dim, self.masks.keys())) is not None]
        if not masks:
            return
        if statistic.neutral is None:
            node.args = (node.target, [i for i, _ in masks], [m for _, m in masks], *node.args)
            node.target = masked.moments
            return
        value: Any = operand(node, statistic.arg)
        for i, mask in masks:
            with self.graph.inserting_before(node):
                if statistic.neutral == 0:
                    value = self.graph.call_function(masked.silence, (value, mask, i))
                else:
                    value = self.graph.call_function(masked.exclude, (value, mask, i, statistic.neutral))
        _replace_at(node, statistic.arg, value)

    # -- bits ----------------------------------------------------------------------------------------------------------

    def insert_quantizers(self) -> None:
        weights, activations = quantized_tensors(self.groups)
        unsigned = {n.name for n in non_negative(self.groups.inference.graph_module.graph.nodes)}
        for name, places in activations.items():
            # reason: integer kernels for products of two activations know no zero point
            affine = self.zero_points and all(layer.weights for layer, _ in places)
            bits, signed = self._candidates("activation", name), name not in unsigned or not self.zero_points
            gate = SuperBitQuantizer(signed=signed, affine=affine, candidates=bits)
            self.activations[name] = self._add("activation_gates", name, gate)
            self._quantize(self.activations[name], places)
        for name, places in weights.items():
            layer, path = places[0]
            shape = operand(self.nodes[layer.name], path).meta["val"].shape
            dim = layer.outputs % len(shape)
            channels = int(shape[dim]) if self.per_channel and len(shape) > 1 else None  # a vector has one output
            bits = self._candidates("weight", name)
            gate = SuperBitQuantizer(channels=channels, channel_dim=dim, signed=True, candidates=bits)
            self.weights[name] = self._add("weight_gates", name, gate)
            for node in self._quantize(self.weights[name], places):
                min(node.users).prepend(node)  # reason: a rounded weight lives no longer than what reads it

    def _candidates(self, kind: Kind, name: str) -> tuple[int, ...]:
        bits = self.candidates(kind, name)
        return _DEFAULT if bits == (FLOAT_BITS,) else bits

    def _quantize(self, target: str, places: list[tuple[Layer, Path]]) -> list[fx.Node]:
        """One node of the gate after the tensor, read by every layer that multiplies it."""
        made: dict[fx.Node, fx.Node] = {}
        for layer, path in places:
            consumer = self.nodes[layer.name]
            offset = 3 if consumer.target is masked.moments else 0
            source = operand(consumer, (path[0] + offset, *path[1:]))
            if source not in made:
                with self.graph.inserting_after(source):
                    made[source] = self.graph.call_module(target, (source,))
                made[source].meta = dict(source.meta)
            _replace_at(consumer, path, made[source])
        return list(made.values())

    # -- modes -----------------------------------------------------------------------------------------------------

    def make_switchable(self) -> None:
        """Batch norm and dropout nodes become modules that know their mode."""
        for node in list(self.graph.nodes):
            if has_statistics(node):
                module, args = BatchNorm(node.args[6], node.args[7]), node.args[:5]
            elif node.target is aten.dropout.default:
                module, args = nn.Dropout(node.args[1]), node.args[:1]
            else:
                continue
            holder = self.module._modules.setdefault("modes", nn.Module())
            holder.add_module(node.name, module)
            node.op, node.target, node.args, node.kwargs = "call_module", f"modes.{node.name}", tuple(args), {}


def _replace_at(node: fx.Node, path: Path, value: fx.Node) -> None:
    if len(path) == 1:
        node.update_arg(path[0], value)
    else:
        inner = list(node.args[path[0]])
        inner[path[1]] = value
        node.update_arg(path[0], inner)
