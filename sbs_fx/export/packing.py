"""Packing: weights at their bitwidth, as a graph.

In: a static graph whose weights are int8 codes. Out of `pack`: the same graph, its codes stored at their bits and
unpacked by plain ATen nodes. `unpack` goes back. Invariants: both leave every value as it is, bit for bit; of a plane,
less than a byte is padding.

    plane of 1, 2, 4  halves of bytes, first all low ones, then all high ones, and so on down to the width; the padding
    bits              of the last ones cut off
    one bitwidth      its planes, low | high << width of the low one: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2; minus the offset
                      that made codes non-negative
    several           one such block per bitwidth, channels of 0 bits as padding, then put back into order
    single weights    a plane of 1 bit says which stay; their codes alone, one zero before them, in the places that
    pruned            counting along that plane gives
    zero points       where scales are negative, which is nowhere: compilers compute it once, and no tensor is stored
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.passes.graph import attribute, copy_with
from sbs_fx.passes.static.finalize import StoredWeight
from sbs_fx.passes.static.fold import Constants
from sbs_fx.plan.bits import place_bits
from sbs_fx.plan.errors import GraphError
from sbs_fx.quantizer.superbit import max_level

aten = torch.ops.aten
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_channel.default

# "conv.weight" is stored as "conv.weight_packed_4"; several bitwidths give several of them, and so do several planes,
# each named by the place of its lowest bit: "conv.weight_packed_6_0" and "conv.weight_packed_6_4".
_PACKED = "_packed_"
BYTE = 8
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}  # bits -> widths, each a divisor of a byte; lowest first


def pack(static: fx.GraphModule) -> fx.GraphModule:
    """A copy of a static graph whose codes are stored at the bits that its `meta["weights"]` states.

    Float tensors are shared with the original.
    """
    result = copy_with(static, read_tensors(static))
    packer = _Packer(result)
    for name, stored in static.meta.get("weights", {}).items():
        packer.replace(name, stored)
    packer.compute_zero_points()
    result.graph.eliminate_dead_code()
    result = copy_with(result, read_tensors(result))  # without what nothing reads any more
    result.recompile()
    return result


def unpack(packed: fx.GraphModule, weights: Mapping[str, StoredWeight]) -> fx.GraphModule:
    """A graph with the codes computed once, under their own names; the other tensors are shared.

    Args:
        packed: a graph from `pack`, or what became of it after export, saving and loading.
        weights: its `meta["weights"]`, by the names before packing.
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
    _store_zero_points(result)
    graph.eliminate_dead_code()
    result = copy_with(result, read_tensors(result))  # without what nothing reads any more
    result.recompile()
    return result


def _is_unpacking(node: fx.Node) -> bool:
    """Unpacking ends where the codes become floats."""
    return node.target in _UNPACKING and torch.float32 not in node.args and node.kwargs.get("dtype") != torch.float32


_UNPACKING = {
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.bitwise_left_shift.Tensor_Scalar,
    aten.bitwise_or.Tensor,
    aten.bitwise_and.Scalar,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.slice.Tensor,
    aten.constant_pad_nd.default,
    aten.cumsum.default,
    aten.mul.Tensor,
    aten.to.dtype,
    aten._to_copy.default,
    aten.sub.Tensor,
    aten.cat.default,
    aten.index_select.default,
    aten.permute.default,
    aten.clone.default,
}


def pack_codes(codes: Tensor, bits: int) -> list[Tensor]:
    """Codes from -L to L as bytes, one tensor a plane, that of the lowest bits first.

    Args:
        codes: int8, any shape, within the signed levels of that bitwidth.
        bits: 2, 3, 4, 5 or 6.

    Returns:
        uint8 of shape (ceil(codes / (8 / width)),) for each plane's width: of a plane of 4 bits, the codes of the first
        half are the low halves of the bytes, and so on for the two and four parts of a byte's halves.
    """
    rest = codes.flatten().to(torch.int16) + max_level(bits, signed=True)
    packed = []
    for width in PLANES[bits]:
        plane = rest & (1 << width) - 1
        rest = rest >> width
        packed.append(_pack_plane(plane, width))
    return packed


def _pack_plane(plane: Tensor, width: int) -> Tensor:
    """Numbers below 2^width, int16, as bytes."""
    plane = torch.cat([plane, plane.new_zeros(-len(plane) % (BYTE // width))])
    while width < BYTE:
        low, high = plane.chunk(2)
        plane = low | high << width
        width *= 2
    return plane.to(torch.uint8)


class _Packer:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.readers: dict[str, list[fx.Node]] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            self.readers.setdefault(str(node.target), []).append(node)

    def replace(self, name: str, stored: StoredWeight) -> None:
        """The nodes that unpack a weight instead of those that read its codes."""
        if stored.bits == BYTE and stored.nonzeros is None:
            return
        codes = attribute(self.module, name)
        for node in self.readers[name]:
            with self.graph.inserting_before(node):
                if stored.nonzeros is not None:
                    new = self._sparse(name, codes, stored)
                elif isinstance(stored.bits, int):
                    new = self._reshape(self._unpacked(name, codes, stored.bits), list(codes.shape))
                else:
                    new = self._mixed(name, codes, stored)
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)

    def _unpacked(self, name: str, codes: Tensor, bits: int) -> fx.Node:
        """A flat tensor of codes."""
        name = f"{name}{_PACKED}{bits}"
        if bits == BYTE:
            return self._reshape(self._get(name, codes), [-1])
        place, node = 0, None
        for width, packed in zip(PLANES[bits], pack_codes(codes, bits), strict=True):
            read = self._get(name if width == bits else f"{name}_{place}", packed)
            plane = self._plane(read, width, codes)
            if node is not None:
                plane = self._call(aten.bitwise_left_shift.Tensor_Scalar, plane, place)
            node = plane if node is None else self._call(aten.bitwise_or.Tensor, node, plane)
            place += width
        node = self._call(aten.to.dtype, node, torch.int8)
        return self._call(aten.sub.Tensor, node, max_level(bits, signed=True))

    def _plane(self, packed: fx.Node, width: int, codes: Tensor) -> fx.Node:
        """The numbers of a plane, one a code, a flat tensor of uint8."""
        node, half = packed, BYTE // 2
        while half >= width:
            low = self._call(aten.bitwise_and.Scalar, node, (1 << half) - 1)
            high = self._call(aten.bitwise_right_shift.Tensor_Scalar, node, half)
            node = self._call(aten.cat.default, [low, high])
            half //= 2
        if codes.numel() % (BYTE // width):
            node = self._call(aten.slice.Tensor, node, 0, 0, codes.numel())
        return node

    def _sparse(self, name: str, codes: Tensor, stored: StoredWeight) -> fx.Node:
        """Which weights stay, and the codes of those alone."""
        stays = (codes != 0).flatten()
        missing = int(stored.nonzeros) - int(stays.sum())  # type: ignore[arg-type]
        if missing < 0 or not isinstance(stored.bits, int):
            raise GraphError(
                f"has {int(stays.sum())} codes that are not zero, at {stored.bits} bits; expected at most "
                f"{stored.nonzeros}, at one bitwidth",
                pass_name="pack",
                node=name,
            )
        # reason: some that stay were rounded to zero; which ones does not matter, that they are stored does
        stays[(~stays).nonzero()[:missing]] = True
        mask = self._get(f"{name}{_PACKED}stays", _pack_plane(stays.to(torch.int16), 1))
        ones = self._plane(mask, 1, codes)
        places = self._call(aten.mul.Tensor, self._call(aten.cumsum.default, ones, 0), ones)
        read = self._unpacked(name, codes.flatten()[stays], stored.bits)
        padded = self._call(aten.constant_pad_nd.default, read, [1, 0])
        return self._reshape(self._call(aten.index_select.default, padded, 0, places), list(codes.shape))

    def compute_zero_points(self) -> None:
        """Zero points from scales, once for each number of channels."""
        made: dict[str, fx.Node] = {}
        for node in self.graph.find_nodes(op="call_function", target=DEQUANTIZE):
            _, scale, zeros = node.args[:3]
            if zeros.op == "get_attr" and not attribute(self.module, zeros.target).any():
                if zeros.target not in made:
                    with self.graph.inserting_after(scale):
                        negative = self.graph.call_function(aten.lt.Scalar, (scale, 0))
                    with self.graph.inserting_after(negative):
                        made[zeros.target] = self.graph.call_function(aten.to.dtype, (negative, torch.int8))
                node.update_arg(2, made[zeros.target])

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
            elif not blocks:  # reason: padding needs a tensor that holds nothing
                blocks.append(self._get(f"{name}{_PACKED}0", codes.new_zeros(0, shape[1])))
        node = blocks[0] if len(blocks) == 1 else self._call(aten.cat.default, blocks, 0)
        zeros = stored.bits.count(0)  # type: ignore[union-attr]
        if zeros:
            node = self._call(aten.constant_pad_nd.default, node, [0, 0, 0, zeros])
        if len(order) > 1:
            dtype = torch.int16 if place_bits(len(bits)) == 16 else torch.int32
            position = torch.cat(order).argsort().to(dtype)
            read = self._get(f"{name}{_PACKED}order", position.to(codes.device))
            places = self._call(aten.to.dtype, read, torch.int32)
            node = self._call(aten.index_select.default, node, 0, places)
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


def _store_zero_points(module: fx.GraphModule) -> None:
    """Zero points as tensors, under the names that `finalize` gives them."""
    names: dict[int, str] = {}
    for node in module.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        scale = attribute(module, node.args[1].target)
        channels = scale.numel()
        if node.args[2].op == "get_attr":
            continue
        if channels not in names:
            name = f"zero_points_{channels}"
            while hasattr(module, name):
                name += "_"
            names[channels] = name
            _register(module, name, torch.zeros(channels, dtype=torch.int8, device=scale.device))
        with module.graph.inserting_before(node):
            node.update_arg(2, module.graph.get_attr(names[channels]))


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
