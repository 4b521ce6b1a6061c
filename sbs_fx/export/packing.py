"""Packing: weights at their bitwidth, as a graph.

In: a static graph whose weights are int8 codes. Out of `pack`: the same graph, its codes stored with 8 / bits of them
in a byte and unpacked by plain ATen nodes. `unpack` goes back. Invariant: both leave every value as it is, bit for bit.

    one bitwidth      (bytes >> shifts) & mask, two or four codes a byte, row by row; minus the offset that made them
                      non-negative; the padding of the last byte cut off
    several           one such block per bitwidth, channels of 0 bits as zeros, then put back into order
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.passes.dialects import StoredWeight, set_dialect, static_of
from sbs_fx.passes.graph import attribute, copy_with
from sbs_fx.passes.static.fold import Constants
from sbs_fx.quantizer.superbit import max_level

aten = torch.ops.aten

_PACKED = "_packed_"  # "conv.weight" is stored as "conv.weight_packed_4"; several bitwidths give several of them
_SHIFTS = "unpacking_shifts_"
BYTE = 8


def pack(static: fx.GraphModule) -> fx.GraphModule:
    """A copy of a static graph whose codes are stored at the bits that it states.

    Float tensors are shared with the original.
    """
    result = copy_with(static, read_tensors(static))
    packer = _Packer(result)
    dialect = static_of(static)
    for name, stored in dialect.weights.items():
        packer.replace(name, stored)
    tensors = read_tensors(result)
    result = copy_with(result, tensors)  # without what nothing reads any more
    set_dialect(result, replace(dialect, weights={n: w for n, w in dialect.weights.items() if n in tensors}))
    result.recompile()
    return result


def unpack(packed: fx.GraphModule, weights: Mapping[str, StoredWeight]) -> fx.GraphModule:
    """A graph with the codes computed once, under their own names; the other tensors are shared.

    Args:
        packed: a graph from `pack`, or what became of it after export, saving and loading.
        weights: as they were before packing.
    """
    constants = Constants(packed)
    owner: dict[fx.Node, str] = {}  # node of an unpacking -> the weight it leads to
    for node in packed.graph.nodes:
        name = str(node.target).partition(_PACKED)[0] if _PACKED in str(node.target) else None
        if node.op == "get_attr" and name in weights:
            owner[node] = name
        elif node in constants.nodes and node.op == "call_function":
            names = {owner[source] for source in node.all_input_nodes if source in owner}
            if len(names) == 1 and _is_unpacking(node):
                owner[node] = names.pop()
    result = copy_with(packed, read_tensors(packed))
    graph = result.graph
    copies = dict(zip(packed.graph.nodes, graph.nodes, strict=True))
    for node, name in owner.items():
        if any(user not in owner for user in node.users):
            _register(result, name, constants.value(node).contiguous())
            with graph.inserting_before(copies[node]):
                codes = graph.get_attr(name)
            copies[node].replace_all_uses_with(codes)
    graph.eliminate_dead_code()
    result = copy_with(result, read_tensors(result))  # without what nothing reads any more
    result.recompile()
    return result


def _is_unpacking(node: fx.Node) -> bool:
    """Unpacking ends where the codes become floats."""
    return node.target in _UNPACKING and torch.float32 not in node.args and node.kwargs.get("dtype") != torch.float32


_UNPACKING = {
    aten.bitwise_right_shift.Tensor,
    aten.__rshift__.Tensor,
    aten.bitwise_and.Scalar,
    aten.__and__.Scalar,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.slice.Tensor,
    aten.to.dtype,
    aten._to_copy.default,
    aten.sub.Tensor,
    aten.cat.default,
    aten.index_select.default,
    aten.permute.default,
    aten.clone.default,
}


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes from -L to L as bytes.

    Args:
        codes: int8, any shape, within the signed levels of that bitwidth.
        bits: 2, 4 or 8.

    Returns:
        uint8 of shape (ceil(codes / (8 / bits)), 1), the first code in the lowest bits; for 8 bits `codes` itself.
    """
    if bits == BYTE:
        return codes
    per_byte = BYTE // bits
    flat = codes.flatten().to(torch.int16) + max_level(bits, signed=True)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % per_byte)]).view(-1, per_byte)
    return (padded << _shifts(bits).to(padded)).sum(1, keepdim=True).to(torch.uint8)


def _shifts(bits: int) -> Tensor:
    return torch.arange(0, BYTE, bits, dtype=torch.uint8)


class _Packer:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.readers: dict[str, list[fx.Node]] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            self.readers.setdefault(str(node.target), []).append(node)

    def replace(self, name: str, stored: StoredWeight) -> None:
        """The nodes that unpack a weight instead of those that read its codes."""
        if stored.bits == BYTE:
            return
        codes = attribute(self.module, name)
        for node in self.readers[name]:
            with self.graph.inserting_before(node):
                if isinstance(stored.bits, int):
                    new = self._reshape(self._unpacked(name, codes, stored.bits), list(codes.shape))
                else:
                    new = self._mixed(name, codes, stored)
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)

    def _unpacked(self, name: str, codes: Tensor, bits: int) -> fx.Node:
        """A flat tensor of codes."""
        packed = self._get(f"{name}{_PACKED}{bits}", pack_codes(codes, bits).to(codes.device))
        if bits == BYTE:
            return self._reshape(packed, [-1])
        shifts = self._get(f"{_SHIFTS}{bits}", _shifts(bits).to(codes.device))
        node = self._call(aten.bitwise_right_shift.Tensor, packed, shifts)
        node = self._call(aten.bitwise_and.Scalar, node, (1 << bits) - 1)
        node = self._call(aten.to.dtype, node, torch.int8)
        node = self._reshape(self._call(aten.sub.Tensor, node, max_level(bits, signed=True)), [-1])
        if codes.numel() % (BYTE // bits):
            node = self._call(aten.slice.Tensor, node, 0, 0, codes.numel())
        return node

    def _mixed(self, name: str, codes: Tensor, stored: StoredWeight) -> fx.Node:
        """Blocks of channels of equal bitwidth, concatenated and put back into order."""
        first = codes.movedim(stored.axis, 0)
        bits = torch.tensor(stored.bits)
        blocks, order = [], []
        for b in sorted(set(stored.bits), reverse=True):  # type: ignore[arg-type]
            channels = (bits == b).nonzero().flatten()
            shape = [len(channels), math.prod(first.shape[1:])]
            order.append(channels)
            if b:
                block = self._unpacked(name, first[channels.to(codes.device)].contiguous(), b)
                blocks.append(self._reshape(block, shape))
            else:
                options = {"dtype": torch.int8, "device": codes.device}
                blocks.append(self.graph.call_function(aten.zeros.default, (shape,), options))
        node = blocks[0]
        if len(blocks) > 1:
            position = torch.cat(order).argsort().to(torch.int32).to(codes.device)
            node = self._call(aten.cat.default, blocks, 0)
            node = self._call(aten.index_select.default, node, 0, self._get(f"{name}{_PACKED}order", position))
        node = self._reshape(node, list(first.shape))
        if stored.axis:
            node = self._call(aten.permute.default, node, _moved(first.ndim, stored.axis))
            node = self.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        return node

    def _get(self, name: str, value: Tensor) -> fx.Node:
        _register(self.module, name, value)
        return self.graph.get_attr(name)

    def _reshape(self, node: fx.Node, shape: list[int]) -> fx.Node:
        return self._call(aten.reshape.default, node, shape)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)


def _moved(rank: int, axis: int) -> list[int]:
    """The permutation that takes the first dimension to `axis`."""
    rest = list(range(1, rank))
    return [*rest[:axis], 0, *rest[axis:]]


def _register(module: torch.nn.Module, name: str, value: Tensor) -> None:
    """A buffer of a module that exists."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner).register_buffer(leaf, value)


def read_tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph reads, by name."""
    names = dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr"))
    return {name: attribute(module, name) for name in names}
