"""Affine grids: zero is a level, the ends are where values end, at every bitwidth and in the search's chain."""

from __future__ import annotations

import itertools

import pytest
import torch

from sbs_fx.plan.bits import BITS
from sbs_fx.quantizer.ranges import Histogram
from sbs_fx.quantizer.superbit import SuperBitQuantizer


def affine(bits: int, low: float = -0.71, high: float = 2.29) -> SuperBitQuantizer:
    gate = SuperBitQuantizer(signed=True, affine=True)
    gate.fix(bits)
    gate.set_ends(low, high)
    return gate


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_all_there_are_and_zero_is_one(bits: int) -> None:
    gate = affine(bits)
    x = torch.linspace(-3, 4, 100_001)
    with torch.no_grad():
        y = gate(x)
    scale = 3.0 / (2**bits - 1)
    levels = y.unique()
    zero = round(0.71 / scale)
    expected = torch.arange(-zero, 2**bits - zero) * scale
    assert torch.allclose(levels, expected, atol=1e-5)
    assert gate(torch.zeros(1)).item() == 0
    codes = gate.codes(x)
    assert (int(codes.min()), int(codes.max())) == (-zero, 2**bits - 1 - zero)
    assert torch.allclose(codes * gate.scale(), y)


def test_signed_grids_without_ends_of_their_own_are_as_they_were() -> None:
    assert SuperBitQuantizer(signed=True).below is None
    assert SuperBitQuantizer(signed=False, affine=True).below is None


def test_gradients_stop_at_the_ends() -> None:
    gate = affine(8)
    x = torch.tensor([-1.0, -0.7, 0.0, 2.28, 2.5], requires_grad=True)
    gate(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    gate.search()
    x.grad = None
    gate(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert float(gate.range.grad) != 0  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_search_rounds_as_the_fixed_bits_do(bits: int) -> None:
    gate, fixed = affine(8), affine(bits)
    gate.search()
    x = torch.randn(1000)
    with torch.no_grad():
        open_gates = {2: 0, 4: 1, 8: 2}[bits]
        gate.threshold.copy_(torch.tensor([-1.0 if i < open_gates else 9.0 for i in range(2)]))
        assert torch.equal(gate(x), fixed(x))


def test_state_and_grid_travel() -> None:
    gate, other = affine(4), SuperBitQuantizer(signed=True, affine=True)
    other.load_state_dict(gate.state_dict())
    x = torch.randn(100)
    assert torch.equal(other(x), gate(x))
    assert other.bits == 4
    third = SuperBitQuantizer(**gate.options)
    third.fix(4)
    third.use(gate.grid)
    assert torch.equal(third(x), gate(x))
    gate.search()
    other.load_state_dict(gate.state_dict())
    assert other.bits is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", ["silu", "shifted", "normal"])
def test_ends_of_least_error_are_near_the_best_there_are(bits: int, shape: str) -> None:
    """Against every pair of ends out of a fine grid of them."""
    x = torch.randn(20_000)
    x = {"silu": torch.nn.functional.silu(3 * x), "shifted": x + 1.5, "normal": x}[shape]
    gate, found = SuperBitQuantizer(signed=True, affine=True), Histogram()
    gate.fix(bits)
    found.add(x)
    found.set_range(gate, "mse", 0)

    def error(each: SuperBitQuantizer) -> float:
        with torch.no_grad():
            return float((each(x) - x).square().mean())

    shares = torch.linspace(0.2, 1, 17).tolist()
    low, high = float(x.min()), float(x.max())
    best = min(error(affine(bits, low * a, high * b)) for a, b in itertools.product(shares, shares))
    assert error(gate) <= 1.05 * best
    symmetric = SuperBitQuantizer(signed=True)
    symmetric.fix(bits)
    found.set_range(symmetric, "mse", 0)
    assert error(gate) <= 1.001 * error(symmetric)
    if shape == "silu":
        assert error(gate) < 0.5 * error(symmetric)


def test_counts_of_a_part_have_the_ends_of_all() -> None:
    x = torch.randn(100_000)
    part, whole = Histogram(1000), Histogram()
    part.add(x)
    whole.add(x)
    assert (part.low, part.high) == (whole.low, whole.high)
    assert 900 < float(part.counts.sum()) < 1200
