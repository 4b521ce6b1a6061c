"""Ranges against exact computation, on values themselves: tops of least error, and running histograms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sbs_fx.plan.bits import BITS
from sbs_fx.quantizer import ranges
from sbs_fx.quantizer.ranges import BINS, Histogram, best_top, grid_of, set_range, squared_error, weight_top
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from tests.oracles.gated import error_of, quantiser

# Tops


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_largest_value_as_top_is_the_outermost_level(bits: int, signed: bool) -> None:
    x = torch.randn(500) if signed else torch.randn(500).abs()
    gate = quantiser(bits, signed=signed)
    set_range(gate, x.abs().max().view(1))
    codes = gate.codes(x)
    assert codes.abs().max() == grid_of(gate)[1]
    assert float(gate(x).detach().abs().max()) == pytest.approx(float(x.abs().max()), rel=1e-6)


@pytest.mark.parametrize("bits", [*BITS, [0, 2, 4, 8, 8, 2], [3, 5, 6, 0, 3, 8]])
@pytest.mark.parametrize("dim", [0, 1])
def test_least_error_is_never_above_that_of_the_largest_value(bits: Any, dim: int) -> None:
    weight = torch.randn(6, 6, 3, 5) ** 3
    gate = quantiser(bits, channels=6, channel_dim=dim)
    largest, best = weight_top(weight, gate, "minmax"), weight_top(weight, gate, "mse")
    assert torch.equal(largest, weight.movedim(dim, 0).flatten(1).abs().amax(1))
    assert (best <= largest).all()
    assert (best > 0).all()
    assert (error_of(gate, weight, best) <= error_of(gate, weight, largest) * (1 + 1e-6)).all()


def test_error_is_that_of_the_quantiser() -> None:
    weight = torch.randn(6, 40)
    gate = quantiser([0, 2, 3, 5, 6, 8], channels=6)
    top = torch.rand(6) + 0.5
    assert torch.allclose(squared_error(weight, top, grid_of(gate)), error_of(gate, weight, top), rtol=1e-4)


def test_least_error_is_near_that_of_a_fine_search() -> None:
    for bits, distribution in ((2, torch.randn(4, 4000)), (4, torch.randn(4, 4000)), (4, torch.randn(4, 4000) ** 3)):
        gate = quantiser(bits, channels=4)
        largest = distribution.abs().amax(1)
        found = squared_error(distribution, best_top(distribution, largest, grid_of(gate)), grid_of(gate))
        fine = torch.stack([squared_error(distribution, largest * k / 400, grid_of(gate)) for k in range(4, 401)])
        # Shares 4 % apart: at most 2 % from the optimum, of an error that is flat there.
        assert (found <= 1.02 * fine.amin(0)).all()


@pytest.mark.parametrize(
    ("candidates", "middle"), [((2, 4, 8), 4), ((2, 4, 8, 32), 4), ((3, 32), 3), ((2, 3, 5, 6), 5), ((2, 32), 2)]
)
def test_a_searching_gate_has_the_grid_of_its_middle_candidate(candidates: tuple[int, ...], middle: int) -> None:
    gate = SuperBitQuantizer(candidates=candidates)
    gate.search()
    assert grid_of(gate) == grid_of(quantiser(middle))


def test_known_optimum_for_a_normal_weight_of_two_bits() -> None:
    """Ternary levels of a unit normal have least error at 1.224 (Max, 1960, three levels)."""
    gate = quantiser(2)
    assert float(weight_top(torch.randn(200_000), gate, "mse")) == pytest.approx(1.224, rel=0.05)


def test_of_a_large_weight_a_part_is_searched_and_all_of_it_compared() -> None:
    """The one outlier is not among the values that are looked at."""
    weight = torch.rand(4, 300_001) * 2 - 1
    weight[:, 1] = 1000.0
    gate = quantiser(8, channels=4)
    for method in ("mse", "minmax"):
        top = weight_top(weight, gate, method)
        assert (squared_error(weight, top, grid_of(gate)) <= squared_error(weight, weight.amax(1), grid_of(gate))).all()


# Histograms


def histogram(*parts: Tensor) -> Histogram:
    found = Histogram()
    for part in parts:
        assert found.add(part)
    return found


def test_counts_are_exact_while_the_range_grows() -> None:
    parts = [torch.randn(1000) * 3.0**k for k in range(-3, 6)] + [torch.zeros(50)]
    found, values = histogram(*parts), torch.cat(parts).abs()
    assert found.zeros == 50
    assert found.counts.sum() == 9000
    assert found.largest == float(values.max())
    assert found.width * BINS >= found.largest > found.width * BINS / 4
    edges = torch.arange(0, BINS + 1, dtype=torch.float64) * found.width
    expected = torch.histogram(values[values > 0].double(), edges).hist
    # A value that sits on an edge to the last digit may fall to either side.
    assert (found.counts.sum(0).cumsum(0) - expected.cumsum(0)).abs().max() <= 1


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_exact_to_a_bin(percent: float) -> None:
    parts = [torch.randn(5000), torch.randn(5000) * 2]
    found, values = histogram(*parts), torch.cat(parts).abs()
    exact = values.kthvalue(math.ceil(percent / 100 * len(values))).values
    # The upper end of its bin; a value on an edge to the last digit may fall to either side.
    assert -0.01 * found.width <= found.percentile(percent) - float(exact) <= 1.01 * found.width
    if percent == 100:
        assert found.percentile(percent) == float(values.max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_least_error_by_histogram_is_that_of_the_values(bits: int, signed: bool) -> None:
    parts = [torch.randn(4000), torch.randn(4000) * 1.5]
    parts = parts if signed else [part.relu() for part in parts]
    gate, x = quantiser(bits, signed=signed), torch.cat(parts)
    by_histogram = histogram(*parts)._top(gate, "mse", 0)
    by_values = best_top(x[None], x.abs().max().view(1), grid_of(gate))
    # A bin is at most a 2048th of the largest value, an eighth of an 8-bit step.
    assert error_of(gate, x, by_histogram) <= 1.005 * error_of(gate, x, by_values)
    assert error_of(gate, x, by_histogram) <= 1.005 * error_of(gate, x, x.abs().max().view(1))


def test_values_of_a_histogram_are_known_to_half_a_bin(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([0.0, 0.1234, 0.5, 0.8765, 1.0])
    found = histogram(x)
    monkeypatch.setattr(ranges, "best_top", lambda values, *_: values[0])
    assert (found._top(quantiser(4), "mse", 0) - x).abs().max() <= 0.501 * found.width


def test_weights_count_as_often_as_they_say() -> None:
    x = torch.randn(1000)
    twice, weighted = histogram(x, x), Histogram()
    weighted.add(x, torch.full_like(x, 2))
    assert torch.equal(twice.counts, weighted.counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    assert histogram(x).largest == float(x.abs().max())
    assert histogram(x).counts.sum() == 1000


def test_nan_and_inf_are_refused() -> None:
    found = histogram(torch.ones(3))
    for value in (math.nan, math.inf, -math.inf):
        assert not found.add(torch.tensor([0.5, value]))
    assert found.counts.sum() == 3


@pytest.mark.parametrize("options", [{"channels": 0}, {}])
def test_a_weight_without_elements_has_a_range(options: dict[str, int]) -> None:
    gate, weight = quantiser(8, **options), torch.zeros(0, 3)
    set_range(gate, weight_top(weight, gate, "mse"))
    assert gate(weight).shape == weight.shape
