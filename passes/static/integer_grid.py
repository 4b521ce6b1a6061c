"""`integer_grid`: what every backend can compute alike, bit for bit.

In: a static graph. Out: a copy in which each bias is a whole number of steps of the products it is added to, and, in
exact mode, every scale is a power of two. Then each product, sum and bias is a whole number of steps, which float32
holds exactly up to 2^24 of them, so that the order of additions and the place of a multiplication do not matter.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from sbs_fx.passes.dialects import DEQUANTIZE, StoredWeight, quantizers, set_dialect, static_of
from sbs_fx.passes.folding import CONVOLUTIONS
from sbs_fx.passes.graph import attribute, read_tensors, with_tensors
from sbs_fx.quantizer.grid import level

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

LAYERS = CONVOLUTIONS | {aten.linear.default}
_LARGEST = 2**31 - 1


def integer_grid(static: fx.GraphModule, *, exact: bool = False) -> fx.GraphModule:
    """A copy of a static graph with biases on their grid, and all scales powers of two if it is to be `exact`.

    A scale of an activation goes up to the next power of two at 8 bits, where clipping would cost more than the coarser
    step, and to the nearest one below; a weight's to the neighbour that its values fit best, channel by channel.

    >>> integer_grid(finalize(result.gated), exact=True).meta["sbs_fx"].exact
    True
    """
    dialect = static_of(static)
    result = with_tensors(static, {n: t for n, t in read_tensors(static).items() if exact or _is_edited(static, n, t)})
    set_dialect(result, replace(dialect, exact=exact))
    for name, stored in dialect.weights.items():
        _mend_empty_channels(*_codes_and_scale(result, name, stored))
    if exact:
        for first, last in quantizers(result.graph):
            scale = _power_of_two(torch.tensor(first.args[1]), up=first is last.args[0]).item()
            first.update_arg(1, scale)
            last.update_arg(1, scale)
        for name, stored in dialect.weights.items():
            _round_weight(result, name, stored)
    for layer in result.graph.nodes:
        if layer.target in LAYERS:
            _round_bias(result, layer)
    result.graph.lint()
    result.recompile()
    return result.eval()


def _is_edited(static: fx.GraphModule, name: str, tensor: Tensor) -> bool:
    """Whether anything but exact scales may change a tensor: floats, and the codes of a weight with empty channels."""
    codes = name in static_of(static).weights
    return tensor.is_floating_point() if not codes else bool((attribute(static, f"{name}_scale") == 0).any())


def _codes_and_scale(module: fx.GraphModule, name: str, stored: StoredWeight) -> tuple[Tensor, Tensor]:
    """Views of the codes of a weight and of its scales, which broadcast over them: one a channel, but one a group and
    channel where a batch norm was folded into a grouped transposed convolution, whose groups are blocks of rows."""
    codes, scale = attribute(module, name), attribute(module, f"{name}_scale")
    if scale.ndim > codes.ndim:
        return codes.view(scale.shape[0], -1, *codes.shape[1:]), scale
    return codes, scale if scale.ndim > 1 else scale.view([-1 if i == stored.axis else 1 for i in range(codes.ndim)])


def _mend_empty_channels(codes: Tensor, scale: Tensor) -> None:
    """A channel that a batch norm has multiplied by zero gets zeros as codes and, as kernels want one, a scale."""
    empty = scale == 0
    if bool(empty.any()):
        scale[empty] = scale[~empty].median() if bool((~empty).any()) else 1.0
        codes.masked_fill_(empty, 0)


def _power_of_two(scale: Tensor, *, up: bool) -> Tensor:
    exponent = scale.double().log2()
    return torch.exp2(exponent.ceil() if up else exponent.round())


def _round_weight(module: fx.GraphModule, name: str, stored: StoredWeight) -> None:
    """Powers of two as scales, codes that fit them."""
    codes, scale = _codes_and_scale(module, name, stored)
    axis = stored.axis + codes.ndim - attribute(module, name).ndim
    values = codes.double() * scale.double()
    bits = (stored.bits,) if isinstance(stored.bits, int) else stored.bits
    shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
    high = torch.tensor([level(b, signed=True).high for b in bits]).view(shape)
    exponent = scale.double().log2()
    steps = [torch.exp2(exponent.floor()), torch.exp2(exponent.ceil())]
    rounded = [(values / step).round().clamp(-high, high) for step in steps]
    errors = [(r * s - values).square().sum_to_size(scale.shape) for r, s in zip(rounded, steps, strict=True)]
    up = errors[1] < errors[0]
    codes.copy_(torch.where(up, rounded[1], rounded[0]))
    scale.copy_(torch.where(up, steps[1], steps[0]))


def _round_bias(module: fx.GraphModule, layer: fx.Node) -> None:
    """The bias of a layer of two quantised operands, which no other layer reads, as whole steps of their product."""
    source, weight, bias = (*layer.args, None)[:3]
    if (
        bias is None
        or bias.op != "get_attr"
        or source.target is not DEQUANTIZE
        or weight.target is not decomposed.dequantize_per_channel.default
    ):
        return
    step = source.args[1] * attribute(module, str(weight.args[1].target)).double()
    value = attribute(module, str(bias.target))
    with torch.no_grad():
        value.copy_((value.double() / step).round().clamp(-_LARGEST, _LARGEST) * step)
