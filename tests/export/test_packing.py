"""Codes in bytes: what is packed is read again, at the bits that were asked for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from sbs_fx.export.packing import PLANES, _moved, pack, pack_planes, split_codes, unpack
from sbs_fx.passes.dialects import Static, StoredWeight, set_dialect
from sbs_fx.plan.bits import BITS
from sbs_fx.plan.errors import GraphError
from sbs_fx.quantizer.grid import max_level


def codes(shape: tuple[int, ...], bits: int | tuple[int, ...], axis: int) -> Tensor:
    """Random levels of that bitwidth, or of one bitwidth a channel."""
    per_channel = (bits,) * shape[axis] if isinstance(bits, int) else bits
    limits = torch.tensor([max_level(b, True) if b else 0 for b in per_channel])
    limits = limits.view([-1 if i == axis else 1 for i in range(len(shape))])
    return ((torch.rand(shape) * 2 - 1) * limits).round().to(torch.int8)


@st.composite
def stored_weights(draw: st.DrawFn) -> tuple[Tensor, StoredWeight]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = draw(st.integers(0, len(shape) - 1))
    bits = draw(st.sampled_from(BITS) | st.tuples(*[st.sampled_from((0, *BITS))] * shape[axis]))
    torch.manual_seed(draw(st.integers(0, 99)))
    value = codes(shape, bits, axis)
    if not isinstance(bits, int) or draw(st.booleans()):
        return value, StoredWeight(bits, axis)
    value *= torch.rand(shape) < 0.5
    return value, StoredWeight(bits, axis, draw(st.integers(max(1, int(value.count_nonzero())), value.numel())))


def weight_graph(value: Tensor, stored: StoredWeight) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.to.dtype, (graph.get_attr("layer.weight"), torch.float32)))
    result = fx.GraphModule({"layer.weight": value}, graph)
    set_dialect(result, Static({"layer.weight": stored}))
    return result


@settings(max_examples=150)
@given(stored_weights())
def test_packing_is_exact_and_tight(drawn: tuple[Tensor, StoredWeight]) -> None:
    value, stored = drawn
    packed = pack(weight_graph(value, stored))
    assert torch.equal(packed(), value.float())
    assert torch.equal(unpack(packed, {"layer.weight": stored}).get_buffer("layer.weight"), value)
    per_channel = stored.bits if isinstance(stored.bits, tuple) else (stored.bits,) * value.shape[stored.axis]
    bits = sum(per_channel) * value.numel() // value.shape[stored.axis]
    if stored.nonzeros is not None:
        bits = value.numel() + per_channel[0] * stored.nonzeros
    held = {name: buffer for name, buffer in packed.named_buffers() if "order" not in name}
    assert sum(b.numel() for b in held.values()) == math.ceil(bits / 8)


def test_the_first_dimension_goes_where_it_was() -> None:
    for axis in range(4):
        x = torch.empty(5, 6, 7, 8)
        assert x.movedim(axis, 0).permute(_moved(4, axis)).shape == x.shape


def test_planes_of_two_four_and_eight_codes_a_byte() -> None:
    def packed(codes: list[int], bits: int) -> list[int]:
        planes = split_codes(torch.tensor(codes, dtype=torch.int8), bits)
        return pack_planes(dict(zip(PLANES[bits], planes, strict=True))).tolist()

    assert packed([1, -7, 7], 4) == [0xE8, 0x00]  # plus 7: 8, 0 | 14, padding
    # plus 1: 2, 1, 0 | 2, 2, padding: halves of bytes 0b1010, 0b1001 | 0b0000, padding
    assert packed([1, 0, -1, 1, 1], 2) == [0b1010, 0b1001]
    # plus 31: 0b10_0000, 0b00_0000, 0b11_1110: halves of bytes 0, 0, 14 and, of the high bits 2, 0, 3, 0b1110 and 0
    assert packed([1, -31, 31], 6) == [0b1110_0000, 0b0000_0000, 0b1110]
    assert packed([-127, 127], 8) == [0x81, 0x7F]


def test_more_codes_than_a_plan_keeps_are_refused() -> None:
    graph = weight_graph(torch.tensor([[1, 0, -1, 1]], dtype=torch.int8), StoredWeight(2, 0, 2))
    with pytest.raises(GraphError, match="3 codes that are not zero"):
        pack(graph)
