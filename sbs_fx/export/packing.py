"""Packing: weights at their bitwidth, as a graph.

In: a static graph whose weights are int8 codes. Out of `pack`: the same graph, its codes stored at their bits and
unpacked by plain ATen nodes. `unpack` goes back. Invariants: both leave every value as it is, bit for bit; of a weight,
which is one tensor of bytes, less than a byte is padding.

    planes            numbers of 4 bits, of 2 and of 1. Bytes are cut into halves, first all low ones, then all high
                      ones; those are the numbers of 4 bits, and behind them what is cut in the same way into numbers of
                      2 bits, and so on. Codes of 8 bits come behind these bytes.
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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.passes.dialects import StoredWeight, set_dialect, static_of
from sbs_fx.passes.graph import attribute, copy_with, read_tensors
from sbs_fx.passes.static.fold import Constants
from sbs_fx.plan.bits import place_bits
from sbs_fx.plan.errors import GraphError
from sbs_fx.quantizer.grid import max_level

aten = torch.ops.aten
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_channel.default

_PACKED, _ORDER = "_packed", "_packed_order"  # behind the name of a weight
BYTE = 8
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # bits -> widths of planes; lowest bits first


def pack(static: fx.GraphModule) -> fx.GraphModule:
    """A copy of a static graph whose codes are stored at the bits that it states.

    Float tensors are shared with the original.
    """
    result = copy_with(static, read_tensors(static))
    packer = _Packer(result)
    dialect = static_of(static)
    for name, stored in dialect.weights.items():
        packer.replace(name, stored)
    packer.compute_zero_points()
    result.graph.eliminate_dead_code()
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
        name = str(node.target).removesuffix(_ORDER).removesuffix(_PACKED)
        if node.op == "get_attr" and name in weights and name != node.target:
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
    aten.view.dtype,
    aten.mul.Tensor,
    aten.to.dtype,
    aten._to_copy.default,
    aten.sub.Tensor,
    aten.cat.default,
    aten.index_select.default,
    aten.permute.default,
    aten.clone.default,
}


def split_codes(codes: Tensor, bits: int) -> list[Tensor]:
    """Codes from -L to L, int8 and flat, as numbers below 2^width for each plane, that of the lowest bits first."""
    if bits == BYTE:
        return [codes.view(torch.uint8)]
    rest = codes.to(torch.int16) + max_level(bits, signed=True)
    planes = []
    for width in PLANES[bits]:
        planes.append(rest & (1 << width) - 1)
        rest = rest >> width
    return planes


def pack_planes(planes: Mapping[int, Tensor]) -> Tensor:
    """Planes, flattened, by their width (1, 2, 4 or 8) as bytes, uint8 (bytes,)."""
    none = next(iter(planes.values())).new_zeros(0, dtype=torch.int16)
    packed = none
    for width in (1, 2, 4):
        numbers = torch.cat([planes.get(width, none), packed])
        numbers = torch.cat([numbers, numbers.new_zeros(len(numbers) % 2)])
        half = len(numbers) // 2
        packed = numbers[:half] | numbers[half:] << width
    return torch.cat([packed.to(torch.uint8), planes.get(BYTE, none).to(torch.uint8)])


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
                    (new,) = self._blocks(name, {stored.bits: codes.flatten()})
                    new = self._reshape(new, list(codes.shape))
                else:
                    new = self._mixed(name, codes, stored)
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)

    def _blocks(self, name: str, blocks: Mapping[int, Tensor], mask: Tensor | None = None) -> list[fx.Node]:
        """Tensors of int8 codes, flattened, one for each bitwidth, behind that of the mask if there is one."""
        planes: dict[int, list[Tensor]] = {} if mask is None else {1: [mask.to(torch.int16)]}
        for bits, codes in blocks.items():
            for width, plane in zip(PLANES[bits], split_codes(codes, bits), strict=True):
                planes.setdefault(width, []).append(plane)
        whole = {width: torch.cat(parts) for width, parts in planes.items()}
        sizes = {width: len(plane) for width, plane in whole.items()}
        numbers = self._numbers(self._get(f"{name}{_PACKED}", pack_planes(whole)), sizes)
        taken = dict.fromkeys(sizes, 0)

        def take(width: int, count: int) -> fx.Node:
            start = taken[width]
            taken[width] += count
            node, length = numbers[width]
            return self._part(node, start, taken[width], length)

        found = [] if mask is None else [take(1, len(mask))]
        for bits, codes in blocks.items():
            low, *higher = PLANES[bits]
            node = take(low, len(codes))
            for width in higher:
                high = self._call(aten.bitwise_left_shift.Tensor_Scalar, take(width, len(codes)), low)
                node = self._call(aten.bitwise_or.Tensor, node, high)
            found.append(node if bits == BYTE else self._call(aten.sub.Tensor, node, max_level(bits, signed=True)))
        return found

    def _numbers(self, packed: fx.Node, sizes: Mapping[int, int]) -> dict[int, tuple[fx.Node, int]]:
        """Width -> the int8 tensor that starts with the numbers of that plane, and its length."""
        lengths, below = {}, 0
        for width in (1, 2, 4):
            lengths[width] = sizes.get(width, 0) + (below + 1) // 2
            below = lengths[width]
        end = (below + 1) // 2
        whole = end + sizes.get(BYTE, 0)
        found = {}
        if BYTE in sizes:
            found[BYTE] = self._call(aten.view.dtype, self._part(packed, end, whole, whole), torch.int8), sizes[BYTE]
        node = self._part(packed, 0, end, whole)
        for width in (4, 2, 1):
            if not lengths[width]:
                break
            low = self._call(aten.bitwise_and.Scalar, node, (1 << width) - 1)
            high = self._call(aten.bitwise_right_shift.Tensor_Scalar, node, width)
            node = self._call(aten.cat.default, [low, high])
            if width == 4:
                node = self._call(aten.to.dtype, node, torch.int8)
            found[width] = node, lengths[width] + lengths[width] % 2
            node = self._part(node, sizes.get(width, 0), lengths[width], found[width][1])
        return found

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
        mask, values = self._blocks(name, {stored.bits: codes.flatten()[stays]}, stays)
        places = self._call(aten.mul.Tensor, self._call(aten.cumsum.default, mask, 0), mask)
        padded = self._call(aten.constant_pad_nd.default, values, [1, 0])
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
        channels = {
            b: (bits == b).nonzero().flatten().to(codes.device) for b in sorted(set(bits.tolist()), reverse=True)
        }
        blocks = {b: first[places].flatten() for b, places in channels.items() if b}
        # reason: padding needs a tensor, even one that holds nothing
        parts = self._blocks(name, blocks) if blocks else [self._get(f"{name}{_PACKED}", codes.new_zeros(0))]
        node = parts[0] if len(parts) == 1 else self._call(aten.cat.default, parts)
        if 0 in channels:
            padding = len(channels[0]) * math.prod(first.shape[1:])
            node = self._call(aten.constant_pad_nd.default, node, [0, padding])
        if len(channels) > 1:
            dtype = torch.int16 if place_bits(len(bits)) == 16 else torch.int32
            read = self._get(f"{name}{_ORDER}", torch.cat([*channels.values()]).argsort().to(dtype))
            places = self._call(aten.to.dtype, read, torch.int32)
            rows = self._reshape(node, [len(bits), math.prod(first.shape[1:])])
            node = self._call(aten.index_select.default, rows, 0, places)
        node = self._reshape(node, list(first.shape))
        if stored.axis:
            node = self._call(aten.permute.default, node, _moved(first.ndim, stored.axis))
            node = self.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        return node

    def _part(self, node: fx.Node, start: int, end: int, length: int) -> fx.Node:
        """Elements of a flat tensor of that length."""
        return node if (start, end) == (0, length) else self._call(aten.slice.Tensor, node, 0, start, end)

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
