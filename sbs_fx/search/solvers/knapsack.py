"""Multiple-choice knapsack with product terms: one choice for each variable, the least loss within every limit.

In: losses and costs as plain arrays. Out: an `Allocation` with its loss, a lower bound on the best possible one and the
gap between the two. Source: MPQCO (arXiv 2110.06554), section 3.3, for the knapsack and the greedy rule; solved with
HiGHS. A product of two variables (weight bits x activation bits) has a table of its own, with one column a pair of
choices, whose sums along either side are the two variables: exact, as the columns are whole where the variables are.
Holds: an allocation keeps every limit; nothing here knows of networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # reason: not its parts, which take 37 MB: they load when they are read
from numpy.typing import NDArray

from sbs_fx.plan.errors import InfeasibleBudget

Array = NDArray[np.float64]
_NOTHING = 1e-9  # a share, or a difference of losses, that is rounding
_SCALE = 1e3  # of limits in the solver, whose own tolerance is 1e-6


@dataclass(frozen=True)
class Pair:
    """Costs that two variables have together: `costs` (limits, choices of first, choices of second)."""

    first: int
    second: int
    costs: Array


@dataclass(frozen=True)
class Knapsack:
    """Choose one of `losses[v]` for each variable v so that all costs together keep all `limits`.

    Attributes:
        losses: for each variable (choices,). costs: for each variable (limits, choices), of any sign.
        limits: (limits,). pairs: costs of two variables together.
    """

    losses: Sequence[Array]
    costs: Sequence[Array]
    limits: Array
    pairs: Sequence[Pair] = ()

    def loss(self, choices: Sequence[int]) -> float:
        return float(sum(loss[c] for loss, c in zip(self.losses, choices, strict=True)))

    def spent(self, choices: Sequence[int]) -> Array:
        """Costs (limits,) of one choice for each variable."""
        total = np.zeros(len(self.limits))
        for cost, c in zip(self.costs, choices, strict=True):
            total = total + cost[:, c]
        for pair in self.pairs:
            total = total + pair.costs[:, choices[pair.first], choices[pair.second]]
        return total

    def fits(self, choices: Sequence[int]) -> bool:
        return bool((self.spent(choices) <= self.limits).all())


@dataclass(frozen=True)
class Allocation:
    """One choice for each variable.

    Attributes:
        loss: of the choices. bound: no allocation within the limits has less. proven: the solver ran to its end.
    """

    choices: tuple[int, ...]
    loss: float
    bound: float
    proven: bool

    @property
    def gap(self) -> float:
        """How far the loss may be above the least one, as a share of it; 0 if proven optimal."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / max(abs(self.loss), 1e-300)


def undominated(problem: Knapsack) -> list[list[int]]:
    """For each variable the choices that may be in a best allocation: none other is as good and as cheap everywhere,
    whatever its partners choose. Of equal choices the first stays."""
    parts: list[list[Array]] = [[cost] for cost in problem.costs]
    for pair in problem.pairs:
        parts[pair.first].append(pair.costs.transpose(0, 2, 1).reshape(-1, pair.costs.shape[1]))
        parts[pair.second].append(pair.costs.reshape(-1, pair.costs.shape[2]))
    kept = []
    for loss, costs in zip(problem.losses, parts, strict=True):
        table = np.concatenate([loss[None], *costs]).T  # (choices, loss and costs)
        no_worse = (table[:, None] <= table[None]).all(2)  # [i, j]: i is no worse than j
        first = np.tri(len(loss), k=-1, dtype=bool).T  # i < j
        dominated = (no_worse & (~no_worse.T | first)).any(0)
        kept.append(np.flatnonzero(~dominated).tolist())
    return kept


def allocate(problem: Knapsack, time_limit: float = 60.0) -> Allocation:
    """The best allocation, proven optimal unless `time_limit` (seconds) ends the solver: then the best one found so
    far, or that of `greedy`, with the gap that is left.

    Raises:
        InfeasibleBudget: no allocation keeps the limits, or none was found in time.
    """
    if not problem.losses:
        return _of_nothing(problem)
    kept = undominated(problem)
    starts = np.cumsum([0, *(len(k) for k in kept)])
    tables = [p.costs[:, kept[p.first]][:, :, kept[p.second]] for p in problem.pairs]
    ends = starts[-1] + np.cumsum([0, *(t[0].size for t in tables)])
    columns, binary = int(ends[-1]), int(starts[-1])
    objective = np.zeros(columns)
    objective[:binary] = np.concatenate([loss[k] for loss, k in zip(problem.losses, kept, strict=True)])
    budget = np.concatenate(
        [
            *(cost[:, k] for cost, k in zip(problem.costs, kept, strict=True)),
            *(t.reshape(len(problem.limits), -1) for t in tables),
        ],
        axis=1,
    )
    scale = np.maximum(np.abs(problem.limits), np.abs(budget).max(1)).clip(1e-300) / _SCALE
    rows, places, values = [], [], []

    def add(row: int, columns_: Array, value: float) -> None:
        rows.append(np.full(len(columns_), row))
        places.append(columns_)
        values.append(np.full(len(columns_), value))

    row = len(kept)
    for v in range(len(kept)):
        add(v, np.arange(starts[v], starts[v + 1]), 1.0)
    for pair, table, start in zip(problem.pairs, tables, ends, strict=False):
        grid = start + np.arange(table[0].size).reshape(table[0].shape)
        for v, lines in ((pair.first, grid), (pair.second, grid.T)):
            for choice, line in enumerate(lines):
                add(row, line, 1.0)
                add(row, np.array([starts[v] + choice]), -1.0)
                row += 1
    equal = scipy.sparse.csr_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(places))), shape=(row, columns)
    )
    equal_to = np.concatenate([np.ones(len(kept)), np.zeros(row - len(kept))])
    within = budget / scale[:, None], problem.limits / scale
    relaxed = scipy.optimize.linprog(
        objective, A_ub=within[0], b_ub=within[1], A_eq=equal, b_eq=equal_to, bounds=(0, 1)
    )
    upper = np.ones(columns)
    rounded = _rounded(problem, kept, starts, relaxed.x)
    if rounded is not None:
        # reason: a column that costs more than is open between the relaxation and this is in no better allocation
        gap = problem.loss(rounded) - relaxed.fun + _NOTHING * (1 + abs(relaxed.fun))
        dear = relaxed.lower.marginals[:binary] > gap
        upper[:binary][dear] = 0
    solution = scipy.optimize.milp(
        objective,
        integrality=np.arange(columns) < binary,
        bounds=scipy.optimize.Bounds(0, upper),
        constraints=[
            scipy.optimize.LinearConstraint(equal, equal_to, equal_to),
            scipy.optimize.LinearConstraint(within[0], -np.inf, within[1]),
        ],
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    if solution.status == 2:
        raise InfeasibleBudget(f"no allocation keeps the limits {problem.limits.tolist()}")
    bound = -np.inf if solution.mip_dual_bound is None else float(solution.mip_dual_bound)
    best: tuple[int, ...] | None = None
    if solution.x is not None:
        parts = np.split(solution.x[:binary], starts[1:-1])
        best = tuple(k[int(part.argmax())] for k, part in zip(kept, parts, strict=True))
    proven = solution.status == 0 and best is not None and problem.fits(best)
    if best is None or not problem.fits(best):
        best = rounded or greedy(problem).choices
    loss = problem.loss(best)
    return Allocation(best, loss, loss if proven else min(bound, loss), proven)


def _of_nothing(problem: Knapsack) -> Allocation:
    """The one allocation of no variables. Raises InfeasibleBudget."""
    if not problem.fits(()):
        raise InfeasibleBudget(
            f"nothing is left to allocate, and some of the limits {problem.limits.tolist()} are below 0"
        )
    return Allocation((), 0.0, 0.0, True)


def _rounded(problem: Knapsack, kept: list[list[int]], starts: Array, x: Array | None) -> tuple[int, ...] | None:
    """The relaxed solution with, for each variable, the cheapest of the choices that it mixes; None if that is over."""
    if x is None:
        return None
    choices = []
    for v, options in enumerate(kept):
        mixed = [c for c, share in zip(options, x[starts[v] : starts[v + 1]], strict=True) if share > _NOTHING]
        total = problem.costs[v].sum(0)
        for pair in problem.pairs:
            if v in (pair.first, pair.second):
                total = total + pair.costs.sum((0, 2 if v == pair.first else 1))
        choices.append(min(mixed, key=lambda c: total[c]))
    return tuple(choices) if problem.fits(choices) else None


def greedy(problem: Knapsack) -> Allocation:
    """The paper's rule: from the choices of least loss, again and again the change that costs least loss for what it
    frees, until all limits are kept. What it frees is how much less is above the limits, each counted by its size.

    Raises:
        InfeasibleBudget: nothing is left that frees anything.
    """
    if not problem.losses:
        return _of_nothing(problem)
    choices = [int(loss.argmin()) for loss in problem.losses]
    spent = problem.spent(choices)
    partners: list[list[Pair]] = [[] for _ in choices]
    for pair in problem.pairs:
        partners[pair.first].append(pair)
        partners[pair.second].append(pair)
    shape = len(choices), max(len(loss) for loss in problem.losses)
    harm, added = np.full(shape, np.inf), np.zeros((len(spent), *shape))  # against the choices of the moment

    def renew(v: int) -> None:
        costs, loss, c = problem.costs[v], problem.losses[v], choices[v]
        for p in partners[v]:
            costs = costs + (p.costs[:, :, choices[p.second]] if p.first == v else p.costs[:, choices[p.first]])
        harm[v, : len(loss)], added[:, v, : len(loss)] = loss - loss[c], costs - costs[:, [c]]

    for v in range(len(choices)):
        renew(v)
    scale = np.maximum(np.abs(problem.limits), np.abs(spent)).clip(1e-300)

    def above(costs: Array) -> Array:
        """Costs (limits, ...) above the limits, in all."""
        trailing = (-1, *[1] * (costs.ndim - 1))
        return ((costs - problem.limits.reshape(trailing)) / scale.reshape(trailing)).clip(min=0).sum(0)

    while not problem.fits(choices):
        freed = above(spent) - above(spent[:, None, None] + added)
        rate = np.divide(harm, freed, out=np.full(shape, np.inf), where=freed > 1e-12)
        v, c = divmod(int(rate.argmin()), shape[1])
        if rate[v, c] == np.inf:
            raise InfeasibleBudget(f"no allocation that greedy moves reach keeps the limits {problem.limits.tolist()}")
        spent = spent + added[:, v, c]
        choices[v] = c
        for changed in {v, *(w for p in partners[v] for w in (p.first, p.second))}:
            renew(changed)
    return Allocation(tuple(choices), problem.loss(choices), -np.inf, False)
