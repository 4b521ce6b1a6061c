"""One multiplier over decisions whose costs multiply, against enumeration of all of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from sbs_fx.search.solvers.lagrangian import Decision, Load, Polynomial, minimise


@pytest.mark.parametrize("seed", range(20))
def test_the_multiplier_finds_what_enumeration_finds(seed: int) -> None:
    draw = np.random.default_rng(seed)
    decisions, variables = [], [Polynomial.variable(i) for i in range(6)]
    for _ in range(6):
        damage = np.sort(draw.exponential(size=4) * np.array([8.0, 3, 1, 0]))[::-1]
        decisions.append(Decision(np.array([1.0, 2, 4, 8]), damage))
    costs = []
    for limit in (0.3, 0.4)[: 1 + seed % 2]:
        cost = Polynomial({})
        for _ in range(8):
            i, j = draw.integers(6, size=2)
            cost = cost + variables[i] * variables[j] * float(draw.uniform(0.1, 1))
        whole = float(Load([cost], 6)(np.full(6, 8.0))[0])
        costs.append(cost * (1 / (limit * whole)))
    load = Load(costs, 6)
    chosen = minimise(decisions, load)
    assert chosen is not None

    def damage_of(at: Any) -> float:
        return sum(d.damage[i] for d, i in zip(decisions, at, strict=True))

    def fits(at: Any) -> bool:
        return bool((load(np.array([d.values[i] for d, i in zip(decisions, at, strict=True)])) <= 1).all())

    assert fits(chosen)
    every = [at for at in itertools.product(range(4), repeat=6) if fits(at)]
    best, worst = min(map(damage_of, every)), max(map(damage_of, every))
    assert damage_of(chosen) <= best + 0.1 * (worst - best)
    for i, c in enumerate(chosen):
        for more in range(c + 1, 4):
            raised = [*chosen[:i], more, *chosen[i + 1 :]]
            assert not fits(raised) or damage_of(raised) >= damage_of(chosen)


def test_polynomials_multiply_out() -> None:
    x, y = Polynomial.variable(0), Polynomial.variable(1)
    product = (2 * x + y * 3.0 + 1) * (x + y) + 5
    assert product.terms == {(0, 0): 2, (0, 1): 5, (1, 1): 3, (0,): 1, (1,): 1, (): 5}
    assert float(Load([product], 2)(np.array([2.0, 3.0]))[0]) == (2 * 2 + 3 * 3 + 1) * 5 + 5


def test_out_of_reach_is_none_and_all_is_kept_where_it_fits() -> None:
    decisions = [Decision(np.array([1.0, 2.0]), np.array([1.0, 0.0]))] * 2
    cost = Polynomial.variable(0) * Polynomial.variable(1)
    assert minimise(decisions, Load([cost * 1.01], 2)) is None
    assert minimise(decisions, Load([cost], 2)) == [0, 0]
    assert minimise(decisions, Load([cost * 0.25], 2)) == [1, 1]
