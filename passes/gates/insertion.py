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
from sbs_fx.passes.channels.groups import ChannelGroups, quantized_tensors
from sbs_fx.passes.channels.inference import Layer, Path, Statistic, operand
from sbs_fx.passes.folding import has_statistics
from sbs_fx.passes.gates import masked
from sbs_fx.passes.graph import attribute, copy_graph
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.errors import GraphError
from sbs_fx.plan.plan import Kind
from sbs_fx.quantizer.channel_gate import ChannelGate
from sbs_fx.quantizer.superbit import SuperBitQuantizer

aten = torch.ops.aten

# Operators whose output is never negative, whatever goes in; those that keep the sign of what goes in.
_NON_NEGATIVE = {
    aten.relu.default,
    aten.relu6.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.softmax.int,
    aten.abs.default,
    aten.square.default,
    aten.exp.default,
    aten.linalg_vector_norm.default,
}
_SIGN_KEEPING = {
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.cat.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.flatten.using_ints,
    aten.dropout.default,
    aten.clone.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.constant_pad_nd.default,
    aten.contiguous.default,
    aten.select.int,
    aten.adaptive_max_pool2d.default,
    aten.index_select.default,
    aten.upsample_nearest2d.vec,
    aten.stack.default,
    aten.upsample_bilinear2d.vec,
    aten.im2col.default,
}


Candidates = Callable[[Kind, str], tuple[int, ...]]
_DEFAULT = (2, 4, 8)


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
        block: channels that share one pruning decision, one number or one by group name.

    The modules are found with `weight_gates`, `activation_gates` and `channel_gates`.
    """
    result = copy_graph(graph_module)
    builder = _Builder(result, groups, candidates, per_channel)
    if channels:
        builder.insert_channel_gates(block)
    builder.insert_quantizers()
    builder.make_switchable()
    result.graph.lint()
    result.recompile()
    return result.eval()


def weight_gates(gated: fx.GraphModule) -> dict[str, SuperBitQuantizer]:
    """Weight quantisers by weight name."""
    return {n: gated.get_submodule(t) for n, t in gated.meta["weight_gates"].items()}


def activation_gates(gated: fx.GraphModule) -> dict[str, SuperBitQuantizer]:
    """Activation quantisers by the name of the tensor (graph node) they quantise."""
    return {n: gated.get_submodule(t) for n, t in gated.meta["activation_gates"].items()}


def channel_gates(gated: fx.GraphModule) -> dict[str, ChannelGate]:
    """Channel gates by group name."""
    return {n: gated.get_submodule(t) for n, t in gated.meta["channel_gates"].items()}


def apply_bits(gated: fx.GraphModule, weight_bits: Mapping[str, Any], activation_bits: Mapping[str, int]) -> None:
    """Fix the bitwidth of the named gates; the others stay as they are.

    Raises:
        GraphError: a name without a gate.
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


def non_negative(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes whose value is provably never negative, so that an unsigned grid wastes no level."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op != "call_function":
            continue
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if node.target in _NON_NEGATIVE:
            found.add(node)
        elif node.target in (aten.clamp.default, aten.clamp_min.default, aten.hardtanh.default):
            if isinstance(node.args[1], (int, float)) and node.args[1] >= 0:
                found.add(node)
        elif node.target in _SIGN_KEEPING and tensors and all(n in found for n in tensors):
            scalars = [a for a in node.args[1:] if isinstance(a, (int, float))]
            if node.target not in (aten.add.Tensor, aten.mul.Tensor) or all(s >= 0 for s in scalars):
                found.add(node)
    return found


class _Builder:
    def __init__(
        self, result: fx.GraphModule, groups: ChannelGroups, candidates: tuple[int, ...] | Candidates, per_channel: bool
    ) -> None:
        self.module, self.graph, self.groups = result, result.graph, groups
        self.candidates = candidates if callable(candidates) else lambda *_: candidates
        self.per_channel = per_channel
        self.nodes = {node.name: node for node in result.graph.nodes}
        self.types = {node.name: dims for node, dims in groups.inference.dims.items()}
        self.masks: dict[Axis, fx.Node] = {}
        self.dim_masks: dict[Any, fx.Node] = {}
        result.meta = {**result.meta, "weight_gates": {}, "activation_gates": {}, "channel_gates": {}}

    def _add(self, kind: str, name: str, module: nn.Module) -> str:
        holder = self.module._modules.setdefault(kind, nn.Module())
        key = name.replace(".", "_").replace(":", "_").replace("'", "_")
        while hasattr(holder, key):  # reason: taken by another gate, or a method of modules, such as `to`
            key += "_"
        holder.add_module(key, module)
        self.module.meta[kind][name] = f"{kind}.{key}"
        return f"{kind}.{key}"

    # -- channels ----------------------------------------------------------------------------------------------------

    def insert_channel_gates(self, block: int | Mapping[str, int]) -> None:
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            for group in self.groups.values():
                target = self._add(
                    "channel_gates",
                    group.name,
                    ChannelGate(group.size, block if isinstance(block, int) else block[group.name]),
                )
                self.masks[group.axis] = self.graph.call_module(target)
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
        found = [(i, self._mask(dim, self.masks.keys())) for i, dim in statistic.dims]
        masks = [(i, mask) for i, mask in found if mask is not None]
        if not masks:
            return
        if statistic.kind == "moments":
            node.args = (node.target, [i for i, _ in masks], [m for _, m in masks], *node.args)
            node.target = masked.moments
            return
        value: Any = operand(node, statistic.arg)
        for i, mask in masks:
            with self.graph.inserting_before(node):
                if statistic.kind == "zero":
                    value = self.graph.call_function(masked.silence, (value, mask, i))
                else:
                    limit = float("-inf") if statistic.kind == "lowest" else float("inf")
                    value = self.graph.call_function(masked.exclude, (value, mask, i, limit))
        _replace_at(node, statistic.arg, value)

    # -- bits ----------------------------------------------------------------------------------------------------------

    def insert_quantizers(self) -> None:
        weights, activations = quantized_tensors(self.groups)
        unsigned = {n.name for n in non_negative(self.groups.inference.graph_module.graph.nodes)}
        for name, places in activations.items():
            gate = SuperBitQuantizer(signed=name not in unsigned, candidates=self._candidates("activation", name))
            self._quantize("activation_gates", name, places, gate)
        for name, places in weights.items():
            layer, path = places[0]
            shape = operand(self.nodes[layer.name], path).meta["val"].shape
            dim = layer.outputs % len(shape)
            channels = int(shape[dim]) if self.per_channel else None
            self._quantize(
                "weight_gates",
                name,
                places,
                SuperBitQuantizer(
                    channels=channels, channel_dim=dim, signed=True, candidates=self._candidates("weight", name)
                ),
            )

    def _candidates(self, kind: Kind, name: str) -> tuple[int, ...]:
        bits = self.candidates(kind, name)
        return _DEFAULT if bits == (FLOAT_BITS,) else bits

    def _quantize(self, kind: str, name: str, places: list[tuple[Layer, Path]], gate: nn.Module) -> None:
        """One gate node after the tensor, read by every layer that multiplies it."""
        target = self._add(kind, name, gate)
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
