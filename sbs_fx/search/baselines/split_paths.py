"""`split_paths`: each searched layer once a candidate bitwidth, and the sum of what they give.

In: a graph from `insert_gates` without channel gates, and the names whose bits are fixed. Out: the same graph with the
searched convolutions and linear layers replaced, and the choice that each of their weights has. Operators are looked
at, never module classes. Holds: node names stay, a layer's name now being that of its sum; with all of the softmax on
one path, every node's value is that of the graph whose gates are fixed at that path's bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.passes import CostModel
from sbs_fx.passes.channels.inference import Layer, Path, operand
from sbs_fx.passes.dialects import Gated, gates_of, set_dialect
from sbs_fx.passes.graph import attribute
from sbs_fx.quantizer.superbit import SuperBitQuantizer

Fixed = tuple[Mapping[str, int], Mapping[str, int]]  # bits of weights and of tensors that are not searched, by name
MARK = "@"  # in the names of the paths' quantisers


class PathSum(nn.Module):
    """Adds up the outputs of a layer's paths with softmax weights. Layers that share a weight share this too.

    Attributes:
        logits: architecture parameters, one a candidate, initially 0.
    """

    def __init__(self, candidates: Sequence[int]) -> None:
        super().__init__()
        self.candidates = tuple(candidates)
        self.logits = nn.Parameter(torch.zeros(len(self.candidates)))

    def expected_bits(self) -> Tensor:
        """Mean of the candidates under the softmax, a scalar."""
        return (self.logits.softmax(0) * self.logits.new_tensor(self.candidates)).sum()

    def decided_bits(self) -> int:
        """The candidate of the largest weight."""
        return self.candidates[int(self.logits.argmax())]

    def forward(self, *outputs: Tensor) -> Tensor:
        """The sum of the paths' outputs, in their order the candidates'; all have one shape."""
        shares = self.logits.softmax(0)
        total = outputs[0] * shares[0]
        for index in range(1, len(outputs)):
            total = total + outputs[index] * shares[index]
        return total


@dataclass(frozen=True)
class Choice:
    """The paths of one weight.

    Attributes:
        paths: where they are added up. weight: the parameter that they replace.
        copies: the parameter of each path by its bits. reads: tensors that the layers read, by name.
    """

    paths: PathSum
    weight: str
    copies: Mapping[int, str]
    reads: tuple[str, ...]


def split_paths(network: fx.GraphModule, cost: CostModel, fixed: Fixed) -> dict[str, Choice]:
    """Split, in place, every layer whose weight is a parameter that is not named in `fixed`.

    Each path has a copy of the weight and quantisers fixed at its bits, registered among the gates (so that `calibrate`
    sets their ranges) as "WEIGHT@BITS" and "TENSOR@LAYER@BITS". Gates and weights that nothing reads any more go.

    Returns:
        Weight name -> its choice.
    """
    splitter = _Splitter(network, fixed)
    choices = {}
    for name, places in cost.weights.items():
        if name not in fixed[0] and splitter.can_split(places):
            choices[name] = splitter.split(name, places)
    splitter.forget_unread()
    network.graph.lint()
    network.recompile()
    return choices


class _Splitter:
    def __init__(self, network: fx.GraphModule, fixed: Fixed) -> None:
        self.network, self.graph, self.fixed = network, network.graph, fixed
        self.nodes = {node.name: node for node in network.graph.nodes}
        gates = gates_of(network)
        self.weights, self.activations = dict(gates.weights), dict(gates.activations)
        self.tensors = {target: name for name, target in self.activations.items()}
        self.paths = nn.Module()
        network.add_module("paths", self.paths)

    def can_split(self, places: Sequence[tuple[Layer, Path]]) -> bool:
        layer, path = places[0]
        source = operand(self.nodes[layer.name], path).args[0]
        return (
            isinstance(source, fx.Node)
            and source.op == "get_attr"
            and isinstance(attribute(self.network, str(source.target)), nn.Parameter)
            and all(layer.kind in ("conv", "linear") for layer, _ in places)
        )

    def split(self, name: str, places: Sequence[tuple[Layer, Path]]) -> Choice:
        gate_node = operand(self.nodes[places[0][0].name], places[0][1])
        source: Any = gate_node.args[0]
        gate = self.gate(gate_node)
        key = str(gate_node.target).rpartition(".")[2]
        holder = nn.Module()
        self.paths.add_module(key, holder)
        holder.add_module("sum", paths := PathSum(gate.candidates).to(gate.range.device))
        weight = attribute(self.network, str(source.target))
        copies, quantized = {}, {}
        for bits in gate.candidates:
            copies[bits] = f"paths.{key}.weight_{bits}"
            holder.register_parameter(f"weight_{bits}", nn.Parameter(weight.detach().clone(), weight.requires_grad))
            target = self.add_gate(self.weights, f"{name}{MARK}{bits}", key, f"weight_gate_{bits}", gate, bits)
            with self.graph.inserting_before(gate_node):
                read = self.graph.get_attr(copies[bits])
                quantized[bits] = self.graph.call_module(target, (read,))
            read.meta, quantized[bits].meta = dict(source.meta), dict(source.meta)
        reads = tuple(self.split_layer(layer, path, key, gate.candidates, quantized) for layer, path in places)
        return Choice(paths, str(source.target), copies, reads)

    def split_layer(
        self, layer: Layer, path: Path, key: str, candidates: Sequence[int], weights: Mapping[int, fx.Node]
    ) -> str:
        """Put a layer's paths in front of its node, which becomes the sum; the name of the tensor that it reads."""
        node = self.nodes[layer.name]
        (input_path,) = layer.inputs
        old_input, old_weight = operand(node, input_path), operand(node, path)
        tensor = self.tensors[str(old_input.target)]
        outputs = []
        for bits in candidates:
            # reason: a fixed tensor, such as the model's input, has its bits whoever reads it
            at = self.fixed[1].get(tensor, bits)
            name, leaf = f"{tensor}{MARK}{node.name}{MARK}{bits}", f"{node.name}_gate_{bits}"
            target = self.add_gate(self.activations, name, key, leaf, self.gate(old_input), at)
            with self.graph.inserting_before(node):
                x = self.graph.call_module(target, (old_input.args[0],))
                x.meta = dict(old_input.meta)
                new = {old_input: x, old_weight: weights[bits]}
                outputs.append(self.graph.node_copy(node, lambda n, new=new: new.get(n, n)))  # type: ignore[misc]
        node.op, node.target, node.args, node.kwargs = "call_module", f"paths.{key}.sum", tuple(outputs), {}
        return tensor

    def gate(self, node: fx.Node) -> SuperBitQuantizer:
        module = self.network.get_submodule(str(node.target))
        assert isinstance(module, SuperBitQuantizer)
        return module

    def add_gate(
        self, paths: dict[str, str], name: str, key: str, leaf: str, like: SuperBitQuantizer, bits: int
    ) -> str:
        """A quantiser with the options of another, fixed; the path of the new module."""
        gate = SuperBitQuantizer(**like.options).to(like.range.device)
        gate.fix(bits)
        self.paths.get_submodule(key).add_module(leaf, gate)
        paths[name] = f"paths.{key}.{leaf}"
        return f"paths.{key}.{leaf}"

    def forget_unread(self) -> None:
        """Erase gates and weights without a reader, from the graph and from the module."""
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_module", "get_attr") and not node.users:
                self.graph.erase_node(node)
        called = {str(n.target) for n in self.graph.find_nodes(op="call_module")}
        for paths in (self.weights, self.activations):
            for name, target in list(paths.items()):
                if target not in called:
                    del paths[name]
                    self.network.delete_submodule(target)
        set_dialect(self.network, Gated(self.weights, self.activations))
        read = {str(n.target) for n in self.graph.find_nodes(op="get_attr")}
        for node in self.nodes.values():
            if node.op == "get_attr" and str(node.target) not in read:
                owner, _, leaf = str(node.target).rpartition(".")
                delattr(self.network.get_submodule(owner), leaf)
                read.add(str(node.target))  # reason: two nodes may read one tensor
