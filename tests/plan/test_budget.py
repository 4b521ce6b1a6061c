"""`Budget.absolute`: shares as numbers that plans are compared with, by no rounding more or less than was asked for."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sbs_fx.plan import Budget, Cost, LayerCost
from sbs_fx.plan.errors import BudgetError

SHARES = st.floats(0, 1, exclude_min=True) | st.sampled_from([0.05, 0.1, 1 / 3, 0.3, 0.7, 1.0, 5e-324])
WHOLES = st.integers(1, 2**53) | st.integers(1, 1000)
HUGE = st.integers(2**53, 2**80)


def limit_of(share: float, whole: Any) -> Any:
    return Budget(macs=share).absolute({"macs": whole})["macs"]


def cost(macs: int, reference: Cost | None = None) -> Cost:
    layer = LayerCost(
        name="layer", kind="conv", macs=macs, weight_bits=8, activation_bits=8, bops=0, params=0, stored_bits=0
    )
    return Cost(layers=(layer,), reference=reference)


@given(SHARES, WHOLES | HUGE)
@example(0.57, 100)  # whose product is 56.99999999999999
@example(0.29, 100)  # and this 28.999999999999996
@example(math.nextafter(0.5, 1), 2**54)  # half way between two shares, and divided to the upper one
def test_the_limit_is_the_largest_number_of_at_most_that_share(share: float, whole: int) -> None:
    limit = limit_of(share, whole)
    assert isinstance(limit, int)
    assert 0 <= limit <= whole
    assert limit / whole <= share
    assert limit == whole or (limit + 1) / whole > share
    # which is floor(share * whole), but for a share that stands for the number above it
    assert limit in (floor := math.floor(Fraction(share) * whole), floor + 1) or whole > 2**53


@given(st.data(), WHOLES)
def test_a_share_of_so_many_is_so_many(data: st.DataObject, whole: int) -> None:
    part = data.draw(st.integers(1, whole))
    assert limit_of(part / whole, whole) == part
    assert limit_of(math.nextafter(part / whole, 0), whole) == part - 1


@given(st.data(), HUGE)
def test_of_what_floats_cannot_tell_apart_none_is_refused(data: st.DataObject, whole: int) -> None:
    part = data.draw(st.integers(1, whole))
    limit = limit_of(part / whole, whole)
    assert limit >= part
    assert limit / whole == part / whole


@given(SHARES, WHOLES | HUGE)
def test_a_cost_is_within_a_budget_to_its_limit_and_no_further(share: float, whole: int) -> None:
    budget, reference = Budget(macs=share), cost(whole)
    limit = limit_of(share, whole)
    assert budget.is_satisfied_by(cost(limit, reference))
    assert not budget.is_satisfied_by(cost(limit + 1, reference))
    assert not limit or budget.is_satisfied_by(cost(limit - 1, reference))


@given(SHARES, st.floats(1e-9, 1e3), st.floats(1e-3, 1))
def test_seconds_are_exact_too(share: float, whole: float, part: float) -> None:
    limit = limit_of(share, whole)
    assert isinstance(limit, float)
    assert limit / whole <= share < math.nextafter(limit, math.inf) / whole
    seconds = part * whole
    assert limit_of(min(1.0, seconds / whole), whole) >= seconds or seconds > whole


def test_each_measure_has_its_own_whole_and_none_is_made_up() -> None:
    whole = {"bops": 1000, "size": 999, "macs": 7, "latency": 0.5}
    assert Budget(bops=0.05, size=1 / 3, latency=0.5).absolute(whole) == {"bops": 50, "size": 333, "latency": 0.25}
    assert Budget(macs=0.1).absolute(whole) == {"macs": 0}
    assert Budget(macs=0.1).absolute({"macs": 0}) == {"macs": 0}
    with pytest.raises(BudgetError, match="latency, which was not measured; give the cost model a timing"):
        Budget(latency=0.5).absolute({"bops": 1, "size": 1, "macs": 1})
