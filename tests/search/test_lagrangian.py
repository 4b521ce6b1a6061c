"""One multiplier over decisions whose costs multiply, against enumeration of all of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from sbs_fx.passes.cost.polynomial import Polynomial
from sbs_fx.search.solvers.lagrangian import Decision, Load, _Problem, minimise


@pytest.mark.parametrize("seed", range(20))
def test_the_multiplier_finds_what_enumeration_finds(seed: int) -> None:
    draw = np.random.default_rng(seed)
    decisions, variables = [], [Polynomial.variable(i) for i in range(6)]
    for _ in range(6):
        damage = np.sort(draw.exponential(size=4) * np.array([8.0, 3, 1, 0]))[::-1]
        decisions.append(Decision({len(decisions): np.array([1.0, 2, 4, 8])}, damage))
    costs, limits, start = [], [], np.full(6, 8.0)
    for limit in (0.3, 0.4)[: 1 + seed % 2]:
        cost = Polynomial({})
        for _ in range(8):
            i, j = draw.integers(6, size=2)
            cost = cost + variables[i] * variables[j] * float(draw.uniform(0.1, 1))
        costs.append(cost)
        limits.append(limit * float(Load([cost], [1], start, decisions)(start)[0]))
    load = Load(costs, limits, start, decisions)
    chosen = minimise(decisions, load)
    assert chosen is not None

    def damage_of(at: Any) -> float:
        return sum(d.damage[i] for d, i in zip(decisions, at, strict=True))

    def fits(at: Any) -> bool:
        x = np.array([d.values[n][i] for n, (d, i) in enumerate(zip(decisions, at, strict=True))])
        return bool((load(x) <= limits).all())

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
    assert product(np.array([2.0, 3.0, 1.0])) == (2 * 2 + 3 * 3 + 1) * 5 + 5
    assert float(Load([product], [1], np.zeros(3), [])(np.array([2.0, 3.0, 1.0]))[0]) == (2 * 2 + 3 * 3 + 1) * 5 + 5


def test_out_of_reach_is_none_and_all_is_kept_where_it_fits() -> None:
    decisions = [Decision({i: np.array([1.0, 2.0])}, np.array([1.0, 0.0])) for i in range(2)]
    cost = Polynomial.variable(0) * Polynomial.variable(1)
    for limit, chosen in ((0.99, None), (1, [0, 0]), (3.99, [0, 1]), (4, [1, 1])):
        found = minimise(decisions, Load([cost], [limit], np.zeros(2), decisions))
        assert found is chosen or sorted(found) == chosen


def test_a_decision_that_moves_two_variables() -> None:
    """As the bits of a weight do, whose scales are stored only where it is quantised."""
    decisions = [
        Decision({0: np.array([2.0, 32.0]), 1: np.array([1.0, 0.0])}, np.array([1.0, 0.0])),
        Decision({2: np.array([1.0, 2.0, 3.0])}, np.array([2.0, 1.0, 0.0])),
    ]
    cost = (Polynomial.variable(0) * 10 + Polynomial.variable(1) * 7) * Polynomial.variable(2)
    load = Load([cost], [100], np.zeros(3), decisions)
    x = np.array([2.0, 1.0, 2.0])
    assert load.along(x, 0, decisions[0], 0, load(x)).tolist() == [[54.0, 640.0]]
    assert load.along(x, 1, decisions[1], 1, load(x)).tolist() == [[27.0, 54.0, 81.0]]
    assert minimise(decisions, load) == [0, 2]
    assert minimise(decisions, Load([cost], [320], np.zeros(3), decisions)) == [0, 2], "2 + 0 is more than 1 + 0"
    assert minimise(decisions, Load([cost], [26], np.zeros(3), decisions)) is None


def test_the_multiplier_alone_is_near_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many decisions of falling worth, before anything is raised or exchanged: what the multiplier leaves over is less
    than one decision."""
    for step in ("raise_", "exchange"):
        monkeypatch.setattr(_Problem, step, lambda self, chosen: chosen)
    draw = np.random.default_rng(0)
    decisions = []
    for number in range(60):
        gains = np.sort(draw.exponential(size=7))[::-1]
        decisions.append(Decision({number: np.arange(8.0)}, np.append(gains[::-1].cumsum()[::-1], 0.0)))
    total = sum((Polynomial.variable(number) for number in range(60)), start=Polynomial({}))
    load = Load([total], [200.0], np.append(np.zeros(60), 1.0), decisions)
    chosen = minimise(decisions, load)
    assert chosen is not None
    assert 199 <= sum(chosen) <= 200
    gains = np.sort(np.concatenate([-np.diff(decision.damage) for decision in decisions]))[::-1]
    damage = sum(float(decision.damage[at]) for decision, at in zip(decisions, chosen, strict=True))
    assert damage == pytest.approx(gains[sum(chosen) :].sum())


@pytest.mark.parametrize(("saved", "expected"), [(9.0, [1, 0]), (8.0, [1, 0]), (7.0, [0, 1])])
def test_one_up_and_one_down(saved: float, expected: list[int]) -> None:
    """What costs 6 for what costs 4 and saves 8: where it saves more, or as much, since more of the limit is used."""
    decisions = [
        Decision({0: np.array([0.0, 6.0])}, np.array([saved, 0.0])),
        Decision({1: np.array([0.0, 4.0])}, np.array([8.0, 0.0])),
    ]
    total = Polynomial.variable(0) + Polynomial.variable(1)
    problem = _Problem(decisions, Load([total], [6.5], np.array([0.0, 0.0, 1.0]), decisions))
    assert problem.exchange([0, 1]) == expected
