"""The knapsack against brute force; what it does at its limits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbs_fx.plan.errors import InfeasibleBudget
from sbs_fx.search.solvers.knapsack import Allocation, Knapsack, Pair, allocate, greedy, undominated


def drawn(seed: int, variables: int, choices: int, limits: int, pairs: int, share: float, whole: bool) -> Knapsack:
    """A random instance; with `whole` numbers there are ties and equal choices."""
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> Any:
        return rng.integers(0, 4, shape).astype(float) if whole else rng.random(shape)

    counts = rng.integers(1, choices + 1, variables)
    costs = [numbers(limits, n) for n in counts]
    ends = [tuple(sorted(rng.choice(variables, 2, replace=False))) for _ in range(pairs if variables > 1 else 0)]
    tables = [Pair(int(i), int(j), numbers(limits, counts[i], counts[j])) for i, j in ends]
    most = sum(c.max(1) for c in costs) + sum((t.costs.max((1, 2)) for t in tables), np.zeros(limits))
    return Knapsack([numbers(n) for n in counts], costs, share * most, tables)


def brute_force(problem: Knapsack) -> float:
    every = itertools.product(*(range(len(loss)) for loss in problem.losses))
    return min((problem.loss(choices) for choices in every if problem.fits(choices)), default=np.inf)


@settings(max_examples=150)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(0, 3),
    st.floats(0, 1),
    st.booleans(),
)
def test_allocation_is_the_best_there_is(
    seed: int, variables: int, choices: int, limits: int, pairs: int, share: float, whole: bool
) -> None:
    problem = drawn(seed, variables, choices, limits, pairs, share, whole)
    best = brute_force(problem)
    if best == np.inf:
        with pytest.raises(InfeasibleBudget):
            allocate(problem)
        return
    found = allocate(problem)
    assert found.loss == pytest.approx(best, abs=1e-9)
    assert problem.fits(found.choices)
    assert problem.loss(found.choices) == found.loss
    assert found.proven
    assert found.gap == 0
    try:
        by_rule = greedy(problem)
    except InfeasibleBudget:
        return  # the rule never takes a move back, and may end where nothing frees anything
    assert problem.fits(by_rule.choices)
    assert by_rule.loss >= best - 1e-9


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(0, 3), st.floats(0.2, 1), st.booleans())
def test_dominated_choices_are_never_missed(seed: int, limits: int, pairs: int, share: float, whole: bool) -> None:
    problem = drawn(seed, 4, 5, limits, pairs, share, whole)
    kept = undominated(problem)
    assert all(kept)
    within = [c for c in itertools.product(*kept) if problem.fits(c)]
    assert min((problem.loss(c) for c in within), default=np.inf) == pytest.approx(brute_force(problem))


def test_a_dominated_choice_is_dropped_and_of_equal_ones_the_first_stays() -> None:
    losses, costs = [np.array([2.0, 1.0, 1.0, 3.0])], [np.array([[1.0, 2.0, 2.0, 1.5]])]
    assert undominated(Knapsack(losses, costs, np.array([9.0]))) == [[0, 1]]


def test_a_thousand_layers_of_sixteen_choices_in_five_seconds() -> None:
    rng = np.random.default_rng(0)
    losses = [np.sort(rng.exponential(1, 16))[::-1].copy() for _ in range(1000)]
    costs = [np.sort(rng.random(16))[None] for _ in range(1000)]
    problem = Knapsack(losses, costs, np.array([0.3 * sum(float(c.max()) for c in costs)]))
    since = time.process_time()
    found = allocate(problem)
    assert time.process_time() - since < 5
    assert found.proven
    assert problem.fits(found.choices)
    assert found.loss <= greedy(problem).loss


def test_a_solver_that_is_stopped_gives_the_best_so_far_and_says_so() -> None:
    rng = np.random.default_rng(1)
    count = 60
    losses = [np.sort(rng.random(8))[::-1].copy() for _ in range(count)]
    costs = [np.sort(rng.random(8))[None] for _ in range(count)]
    pairs = [Pair(i, i + 1, np.outer(costs[i], costs[i + 1])[None]) for i in range(count - 1)]
    problem = Knapsack(losses, costs, np.array([0.3 * count]), pairs)
    found = allocate(problem, time_limit=1e-3)
    assert not found.proven
    assert problem.fits(found.choices)
    assert found.bound <= found.loss
    assert found.gap > 0


def test_gaps() -> None:
    assert Allocation((0,), 2.0, 1.5, False).gap == 0.25
    assert Allocation((0,), 2.0, 2.0, True).gap == 0
    assert Allocation((0,), -1.0, -2.0, False).gap == 1


def test_limits_of_any_sign_and_size() -> None:
    """What is decided already may have used more than all of a limit, and costs may be below zero."""
    problem = Knapsack([np.array([0.0, 1.0])], [np.array([[5e12, -7e12]])], np.array([-3e12]))
    assert allocate(problem).choices == greedy(problem).choices == (1,)
    zero = Knapsack([np.array([0.0, 1.0])], [np.array([[1e-3, 0.0]])], np.array([0.0]))
    assert allocate(zero).choices == (1,)
    with pytest.raises(InfeasibleBudget, match="no allocation"):
        allocate(Knapsack([np.array([1.0])], [np.array([[2.0]])], np.array([1.0])))


@pytest.mark.parametrize("solve", [allocate, greedy])
def test_nothing_to_allocate(solve: Callable[[Knapsack], Allocation]) -> None:
    assert solve(Knapsack([], [], np.array([0.0, 3.0]))) == Allocation((), 0.0, 0.0, True)
    with pytest.raises(InfeasibleBudget, match="nothing is left to allocate"):
        solve(Knapsack([], [], np.array([1.0, -1.0])))


@pytest.mark.parametrize("seed", range(30))
def test_greedy_is_its_rule_step_by_step(seed: int) -> None:
    """Everything computed again at each step, products with partners too."""
    problem = drawn(seed, variables=6, choices=5, limits=1 + seed % 2, pairs=5, share=0.45, whole=False)
    chosen = [int(loss.argmin()) for loss in problem.losses]
    scale = np.maximum(np.abs(problem.limits), np.abs(problem.spent(chosen)))

    def above(choices: list[int]) -> float:
        return float(np.maximum((problem.spent(choices) - problem.limits) / scale, 0).sum())

    while not problem.fits(chosen):
        moves = [[*chosen[:v], c, *chosen[v + 1 :]] for v, loss in enumerate(problem.losses) for c in range(len(loss))]
        moves = [move for move in moves if above(chosen) - above(move) > 1e-12]
        if not moves:
            with pytest.raises(InfeasibleBudget):
                greedy(problem)
            return
        now = problem.loss(chosen)
        chosen = min(moves, key=lambda m: (problem.loss(m) - now) / (above(chosen) - above(m)))
    assert greedy(problem).choices == tuple(chosen)
