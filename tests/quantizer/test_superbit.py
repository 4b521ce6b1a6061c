"""The super-bit quantiser and the channel gate against plain arithmetic, finite differences and counts."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sbs_fx.plan.bits import BITS, FLOAT_BITS
from sbs_fx.plan.errors import InputError, PolicyError
from sbs_fx.quantizer.channel_gate import ChannelGate
from sbs_fx.quantizer.grid import level, max_level
from sbs_fx.quantizer.superbit import SuperBitQuantizer

CANDIDATES = st.lists(st.sampled_from(BITS), min_size=1, unique=True).map(lambda drawn: tuple(sorted(drawn)))


def plain(x: Tensor, width: Tensor | float, bits: int, signed: bool) -> Tensor:
    """The b-bit quantiser as the papers write it, in float64, sharing no code with the module."""
    x, width = x.double(), torch.as_tensor(width).double()
    steps = 2**bits - 1
    if signed:  # outer level (2^b - 2)/2 of a step of 2v/(2^b - 1)
        step = 2 * width / steps
        return (x / step).round().clamp(-(steps // 2), steps // 2) * step
    return width * ((x / width).clamp(0, 1) * steps).round() / steps


def tied(x: Tensor, width: float, signed: bool, candidates: tuple[int, ...]) -> Tensor:
    """Where x lies within rounding error of the middle between two levels of any candidate."""
    near = torch.zeros(x.shape, dtype=torch.bool)
    for steps in (2**bits - 1 for bits in candidates):
        unit = x.double() / width * (steps / 2 if signed else steps)
        near |= (unit - unit.floor() - 0.5).abs() < 1e-3
    return near


def make(bits: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> SuperBitQuantizer:
    quantizer = SuperBitQuantizer(**options).to(dtype)
    quantizer.search() if bits is None else quantizer.fix(bits)
    return quantizer


def set_range(quantizer: SuperBitQuantizer, values: Any) -> None:
    with torch.no_grad():
        quantizer.range.copy_(torch.as_tensor(values))


def close_gates_from(quantizer: SuperBitQuantizer, number: int) -> None:
    """Leave the first `number` gates open, whatever the data, and close the others."""
    with torch.no_grad():
        quantizer.threshold.fill_(-1)
        quantizer.threshold[number:] = 1e6


def test_levels() -> None:
    assert [max_level(bits, True) for bits in BITS] == [1, 3, 7, 15, 31, 127]
    assert [max_level(bits, False) for bits in BITS] == [3, 7, 15, 31, 63, 255]
    for signed in (True, False):
        divisors = [level(bits, signed).divisor for bits in (2, 4, 8)]
        assert [b / a for a, b in zip(divisors, divisors[1:], strict=False)] == [5, 17], "s_4 = s_2/5, s_8 = s_4/17"


@given(st.booleans(), CANDIDATES, st.integers(0, 10**6), st.floats(1e-3, 1e3), st.data())
def test_chain_is_the_plain_quantiser(
    signed: bool, candidates: tuple[int, ...], seed: int, width: float, data: st.DataObject
) -> None:
    width = torch.tensor(width).item()  # as float32 has it
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * width
    quantizer = make(signed=signed, candidates=candidates)
    set_range(quantizer, width)
    number = data.draw(st.integers(0, len(candidates) - 1))
    close_gates_from(quantizer, number)
    chain, bits = quantizer(x), candidates[number]
    assert quantizer.decided_bits() == quantizer.expected_bits().item() == bits
    difference = (chain.double() - plain(x, width, bits, signed)).abs()
    same = ~tied(x, width, signed, candidates)
    assert same.sum() > 150, "or this test says nothing"
    assert difference[same].max() < 1e-5 * width
    assert difference.max() < 2 * width / (2**bits - 1) * 1.0001, "a tie moves a value by one step"
    quantizer.fix(bits)
    assert torch.equal(chain, quantizer(x)), "searching and fixed are one arithmetic, to the last bit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_fixed_is_the_static_arithmetic(dtype: torch.dtype, signed: bool, bits: int) -> None:
    quantizer = make(bits, dtype, channels=5, channel_dim=1, signed=signed)
    set_range(quantizer, torch.rand(5) + 0.1)
    s = quantizer.scale().view(1, 5, 1, 1)
    x = torch.randn(40, 5, 3, 3, dtype=dtype)
    x[20:] = ((x[20:] / s).floor() + 0.5) * s  # ties, where x * (1/s) and x / s part
    y, codes = quantizer(x), quantizer.codes(x)
    assert codes.dtype == torch.int32
    assert torch.equal(codes.to(dtype) * s, y)
    assert torch.equal(quantizer.codes(y), codes), "quantising twice changes nothing"
    high = max_level(bits, signed)
    low = -high if signed else 0
    assert torch.equal((x * (1 / s)).round().clamp(low, high) * s, y)
    for channel in range(5):
        assert len(y[:, channel].unique()) <= 2**bits


def test_static_graph_operators_agree() -> None:
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operators)

    ops = torch.ops.quantized_decomposed
    x = torch.randn(64, 6)
    weight = make(8, channels=6, channel_dim=1)
    set_range(weight, torch.rand(6) + 0.5)
    zero = torch.zeros(6, dtype=torch.int64)
    codes = ops.quantize_per_channel(x, weight.scale(), zero, 1, -127, 127, torch.int8)
    assert torch.equal(codes.int(), weight.codes(x))
    assert torch.equal(ops.dequantize_per_channel(codes, weight.scale(), zero, 1, -127, 127, torch.int8), weight(x))
    for bits in BITS:
        activation = make(bits, signed=False)
        set_range(activation, 1.7)
        scale = float(activation.scale())
        codes = ops.quantize_per_tensor(x, scale, 0, 0, 255, torch.uint8).clamp_max(2**bits - 1)
        assert torch.equal(codes.int(), activation.codes(x))
        assert torch.equal(ops.dequantize_per_tensor(codes, scale, 0, 0, 255, torch.uint8), activation(x))


@given(st.lists(st.sampled_from([0, *BITS]), min_size=1, max_size=8), st.booleans(), st.integers(0, 10**6))
def test_bits_per_channel(bits: list[int], signed: bool, seed: int) -> None:
    x = torch.randn(len(bits), 300, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    mixed = make(bits, channels=len(bits), signed=signed)
    set_range(mixed, torch.linspace(0.5, 2, len(bits)))
    y = mixed(x)
    y.sum().backward()
    assert x.grad is not None
    assert mixed.range.grad is not None
    for channel, b in enumerate(bits):
        assert len(y[channel].unique()) <= 2**b
        if b == 0:
            assert not y[channel].any()
            assert not x.grad[channel].any()
            assert not mixed.range.grad[channel].any()
            continue
        alone = make(b, signed=signed)
        set_range(alone, mixed.range[channel])
        assert torch.equal(alone(x[channel]), y[channel])
        assert torch.equal(alone.codes(x[channel]), mixed.codes(x)[channel])
        assert torch.equal(alone.scale(), mixed.scale()[channel])
    assert torch.equal(mixed.codes(x) * mixed.scale()[:, None], y)
    assert float(mixed.expected_bits()) == pytest.approx(sum(bits) / len(bits))


@pytest.mark.parametrize("bits", [*BITS, 32])
def test_a_fixed_gate_need_not_be_a_candidate(bits: int) -> None:
    x = torch.randn(100)
    assert torch.equal(make(bits, candidates=(4, 8))(x), make(bits, candidates=BITS)(x))


@given(CANDIDATES, st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_last_gate_may_lead_to_float(
    candidates: tuple[int, ...], signed: bool, held: bool, dtype: torch.dtype
) -> None:
    quantizer = make(candidates=(*candidates, 32), signed=signed).to(dtype)
    set_range(quantizer, 0.7)
    x = torch.randn(200, dtype=dtype, requires_grad=True)
    for number, bits in enumerate((*candidates, 32)):
        close_gates_from(quantizer, number)
        quantizer.frozen = False
        quantizer(x)
        quantizer.frozen = held
        x.grad = quantizer.range.grad = None
        y = quantizer(x)
        y.sum().backward()
        assert quantizer.decided_bits() == quantizer.expected_bits().item() == bits
        alone = make(bits, signed=signed).to(dtype)
        set_range(alone, 0.7)
        leaf = x.detach().clone().requires_grad_()
        expected = alone(leaf)
        expected.sum().backward()
        assert torch.equal(y, expected), "at 32 bits x itself, uncut"
        assert x.grad is not None
        assert leaf.grad is not None
        assert torch.equal(x.grad, leaf.grad)
        assert quantizer.range.grad is not None
        if bits == 32:
            assert not quantizer.range.grad.any()
        else:
            assert torch.equal(quantizer.range.grad, alone.range.grad)


def test_open_gives_the_same_object() -> None:
    quantizer = SuperBitQuantizer(channels=3)
    x = torch.randn(7)  # not even three channels: nothing is looked at
    assert quantizer.bits == 32
    assert quantizer(x) is x
    assert float(quantizer.expected_bits()) == 32
    for call in (quantizer.scale, lambda: quantizer.codes(x)):
        with pytest.raises(PolicyError, match="fix"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_half_precision_rounds_in_float(dtype: torch.dtype, bits: int | None) -> None:
    x = torch.randn(100, dtype=dtype, requires_grad=True)
    quantizer = make(bits)
    y = quantizer(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(y, quantizer(x.detach().float()).to(dtype))


def test_channel_of_zeros() -> None:
    quantizer = make(8, channels=2)
    set_range(quantizer, [0.0, 1.0])
    y = quantizer(torch.tensor([[0.0, 0.0], [0.5, -1.0]], requires_grad=True))
    y.sum().backward()
    assert y[0].tolist() == [0, 0]
    assert quantizer.range.grad is not None
    assert quantizer.range.grad.isfinite().all()


def relaxed(quantizer: SuperBitQuantizer, x0: Tensor, width0: Tensor, threshold0: Tensor) -> Any:
    """The function that the backward pass belongs to: every rounding error (in units of the range) and every clipping
    decision frozen at one point, every gate 1[A > a0] + sigma(A - a) - sigma(A - a0) with its norm A frozen."""
    signed = quantizer.signed
    below = [bits for bits in quantizer.candidates if bits != FLOAT_BITS]
    values = [plain(x0, width0, bits, signed) for bits in below]
    clip0 = torch.minimum(torch.maximum(x0, -width0 if signed else torch.zeros_like(width0)), width0)
    errors = [(value - clip0) / width0 for value in values]
    levels = [level(bits, signed) for bits in below]
    steps = [width0 / each.divisor for each in levels]
    norms = torch.stack(
        [((clip0 - value) / step).square().mean().sqrt() for value, step in zip(values, steps, strict=True)]
    )[: len(threshold0)]

    def function(x: Tensor, width: Tensor, threshold: Tensor) -> Tensor:
        clipped = torch.minimum(torch.maximum(x, -width if signed else torch.zeros_like(width)), width)
        z = [*(clipped + width * error for error in errors), x]  # x is the last candidate, or stays unused
        gates = (norms > threshold0).double() + torch.sigmoid(norms - threshold) - torch.sigmoid(norms - threshold0)
        offset = torch.zeros_like(x)
        for index in reversed(range(len(gates))):
            offset = gates[index] * (z[index + 1] - z[index] + offset)
        return z[0] + offset

    return function


def finite_differences(function: Any, arguments: list[Tensor], grad: Tensor, step: float = 1e-6) -> list[Tensor]:
    results = []
    for place, argument in enumerate(arguments):
        result = torch.zeros_like(argument)
        for index in range(argument.numel()):
            ends = []
            for sign in (1, -1):
                moved = [a.clone() for a in arguments]
                moved[place].view(-1)[index] += sign * step
                ends.append((function(*moved) * grad).sum())
            result.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
        results.append(result)
    return results


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("candidates", "thresholds"),
    [
        *(((2, 4, 8), thresholds) for thresholds in [(0, 0), (0, 1), (1, 0), (1, 1), (0.2, 0.1)]),
        ((2, 3, 5, 6), (0, 0, 1)),
        *(((3, 6, 32), thresholds) for thresholds in [(0, 0), (0, 1), (1, 0)]),
        *(((8, 32), thresholds) for thresholds in [(0,), (1,)]),
        *(((bits,), ()) for bits in BITS),
    ],
)
def test_gradients(channels: int | None, signed: bool, candidates: tuple[int, ...], thresholds: Any) -> None:
    bits = None if thresholds else candidates[0]
    quantizer = make(bits, torch.float64, channels=channels, signed=signed, candidates=candidates)
    set_range(quantizer, 0.8 if channels is None else torch.tensor([0.5, 0.8, 1.3]))
    with torch.no_grad():
        quantizer.threshold.copy_(torch.tensor(thresholds))
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 10, dtype=torch.float64)
    y = quantizer(x)
    y.backward(grad)
    point = [t.detach().clone() for t in (x, quantizer.range, quantizer.threshold)]
    if channels is not None:
        point[1] = point[1][:, None]
    function = relaxed(quantizer, *point)
    torch.testing.assert_close(function(*point), y.detach())
    expected = finite_differences(function, point, grad)
    leaves = (x, quantizer.range, quantizer.threshold) if bits is None else (x, quantizer.range)
    for leaf, wanted in zip(leaves, expected, strict=False):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, wanted.view_as(leaf), rtol=1e-6, atol=1e-7)


def test_expected_bits_gradients() -> None:
    quantizer = make(None, torch.float64)
    x = torch.randn(50, dtype=torch.float64)
    for thresholds in ([0.0, 0.0], [0.0, 1.0], [1.0, 0.0]):
        with torch.no_grad():
            quantizer.threshold.copy_(torch.tensor(thresholds))
        quantizer.threshold.grad = None
        quantizer(x)
        g4, g8 = quantizer.gates()
        bits = quantizer.expected_bits()
        assert bits.item() == 2 + g4 * (2 + 4 * g8)
        bits.backward()
        soft = torch.sigmoid(quantizer.norms - quantizer.threshold.detach())
        slope = -soft * (1 - soft)
        assert quantizer.threshold.grad is not None
        torch.testing.assert_close(quantizer.threshold.grad, torch.stack([slope[0] * (2 + 4 * g8), slope[1] * g4 * 4]))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("candidates", [(2, 4), (2, 4, 8), (2, 8, 32)])
def test_nothing_is_kept_per_candidate(bits: int | None, candidates: tuple[int, ...]) -> None:
    quantizer = make(bits, channels=16, candidates=candidates)
    x = torch.randn(16, 1000, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = quantizer(x)
    large = [tensor for tensor in kept if tensor.numel() > 100]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()], "the input itself and nothing of its size"
    y.sum().backward()


@pytest.mark.parametrize("candidates", [(2, 4, 8), (3, 5, 32)])
@pytest.mark.parametrize("bits", [32, 2, 6, 8, None, [0, 2, 4, 8], [3, 5, 6, 6]])
def test_state_survives(bits: Any, candidates: tuple[int, ...]) -> None:
    quantizer = make(bits, channels=4, candidates=candidates)
    set_range(quantizer, [0.5, 1.0, 2.0, 3.0])
    x = torch.randn(4, 20)
    y = quantizer(x)
    state = io.BytesIO()
    torch.save(quantizer.state_dict(), state)
    for start in (32, 4, None, [8, 8, 0, 2]):
        loaded = make(start, channels=4, candidates=candidates)
        state.seek(0)
        loaded.load_state_dict(torch.load(state, weights_only=True))
        assert torch.equal(loaded(x), y)
        assert repr(loaded) == repr(quantizer)
        copied = copy.deepcopy(loaded)
        assert torch.equal(copied(x), y)
        assert (copied.bits.tolist() if isinstance(copied.bits, Tensor) else copied.bits) == bits


def test_fixing_takes_lists_and_tensors() -> None:
    quantizer = SuperBitQuantizer(channels=2)
    for bits in ([2, 8], torch.tensor([2, 8]), (2, 8)):
        quantizer.fix(bits)
        assert isinstance(quantizer.bits, Tensor)
        assert quantizer.bits.tolist() == [2, 8]
    quantizer.fix(torch.tensor(4))
    assert quantizer.bits == 4
    for wrong in (1, 7, 0, -1, 16, [2], [2, 7], [2, 32], [2, 2, 2], []):
        with pytest.raises(PolicyError):
            quantizer.fix(wrong)
    assert quantizer.bits == 4, "a refused change changes nothing"
    with pytest.raises(PolicyError):
        SuperBitQuantizer().fix([2])


def test_refused_arguments() -> None:
    for candidates in ((), (4, 2), (2, 2), (1, 2), (2, 7), (2, 16), (32,), (32, 2)):
        with pytest.raises(PolicyError):
            SuperBitQuantizer(candidates=candidates)
    with pytest.raises(InputError, match=r"\(4, 5\).*3 channels"):
        make(4, channels=3)(torch.randn(4, 5))
    with pytest.raises(InputError):
        make(4, channels=3, channel_dim=2)(torch.randn(3, 3))


def test_thresholds_learn_to_close() -> None:
    quantizer = make(None)
    x = torch.randn(1000) * 0.3
    optimizer = torch.optim.SGD([quantizer.threshold], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        quantizer(x)
        quantizer.expected_bits().backward()
        optimizer.step()
    assert quantizer.decided_bits() == 2


def test_channel_gate_fixed() -> None:
    gate = ChannelGate(6)
    x = torch.randn(2, 6)
    assert torch.equal(x * gate(), x)
    gate.fix([4, 1])
    assert gate().tolist() == [0, 1, 0, 0, 1, 0]
    loaded = ChannelGate(6)
    loaded.load_state_dict(copy.deepcopy(gate).state_dict())
    assert torch.equal(loaded(), gate())
    wrong: list[list[int]] = [[], [6], [-1], [1, 1]]
    for kept in wrong:
        with pytest.raises(PolicyError):
            gate.fix(kept)
    assert gate().tolist() == [0, 1, 0, 0, 1, 0]
    with pytest.raises(InputError):
        gate.gate_from(torch.ones(5))
    with pytest.raises(PolicyError):
        ChannelGate(0)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 10**6), st.floats(0, 3))
def test_channel_gate_search(size: int, block: int, seed: int, alpha: float) -> None:
    gate = ChannelGate(size, block).double()
    norms = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    weights = torch.arange(1.0, size + 1, dtype=torch.float64)
    with torch.no_grad():
        gate.threshold.fill_(alpha)
    mask = gate.gate_from(norms)
    means = [norms[start : start + block].mean() for start in range(0, size, block)]
    wanted = [float(mean > gate.threshold) for mean in means]
    if not any(wanted):
        wanted[int(torch.stack(means).argmax())] = 1.0
    assert mask.tolist() == [wanted[index // block] for index in range(size)]
    assert torch.equal(gate().detach(), mask.detach())
    assert torch.equal(copy.deepcopy(gate).mask, mask.detach()), "the decision is also the buffer's"
    (mask * weights).sum().backward()
    soft = torch.sigmoid(torch.stack([means[index // block] for index in range(size)]) - alpha)
    assert gate.threshold.grad is not None
    torch.testing.assert_close(gate.threshold.grad, (-soft * (1 - soft) * weights).sum())
    gate.fix([0])
    assert gate().tolist() == [1.0] + [0.0] * (size - 1)
