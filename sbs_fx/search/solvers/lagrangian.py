"""One multiplier over many discrete decisions whose costs multiply: least damage within limits.

In: per decision its choices and what damage each does; per measure, the cost as a polynomial. Out: one choice per
decision. Holds: every limit is met; no single decision can be raised without breaking one; the same input
gives the same output.

For a multiplier lambda, sum_i D_i(x_i) + lambda * load(x) is minimised decision by decision until none changes, with
load the p-norm of cost over limit of the measures (of one measure, that ratio itself); lambda is bisected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbs_fx.passes.cost.polynomial import Polynomial, Together

Array = NDArray[np.float64]

_NEXT_TO_NOTHING = 1e-9  # in the place of a limit of 0, which nothing can be divided by
_NORM = 8.0  # close to the largest of the measures' loads, and smooth
_SWEEPS = 20
_BISECTIONS = 32
_ROUNDS = 100  # of exchanges
_REACH, _TRIED = 3, 60  # steps of a decision in an exchange, and decisions that are raised
_CLOSE = 0.999  # of a limit that should be used at least
_NEGLIGIBLE = 2e-3  # share of all damage, which no model of it tells from none


@dataclass(frozen=True)
class Decision:
    """What one decision may be: values (choices,) of the variables that it moves, ascending in what they cost, and the
    damage of each, descending."""

    values: Mapping[int, Array]
    damage: Array


class Load:
    """Cost over limit of each measure, as a function of all variables, one decision of which may run over its choices.

    Args:
        costs: polynomial per measure. limits: one for each; prices that are whole numbers are compared as such.
        start: (variables + 1,), values of the variables that no decision moves, and 1.
    """

    def __init__(
        self, costs: Sequence[Polynomial], limits: Sequence[float], start: Array, decisions: Sequence[Decision]
    ) -> None:
        self.together, self.start = Together(costs), start.astype(float)
        self.limits = np.array([limit or _NEXT_TO_NOTHING for limit in limits], float)
        self.rows = [self._rows(list(decision.values)) for decision in decisions]

    def _rows(self, numbers: list[int]) -> list[tuple[tuple[int, ...], NDArray[np.int64]]]:
        """Terms that hold any of these variables, by how often they hold each."""
        powers = np.stack([(self.together.index == number).sum(1) for number in numbers], 1)
        kinds = sorted(set(map(tuple, powers[powers.any(1)].tolist())))
        return [(kind, np.flatnonzero((powers == kind).all(1))) for kind in kinds]

    def __call__(self, x: Array) -> Array:
        """Costs, (measures,)."""
        return self.together.sums(x)

    def along(self, x: Array, i: int, decision: Decision, at: int, here: Array) -> Array:
        """Costs with decision i at each of its choices, (measures, choices); `here` are the costs at x, where it is
        `at`."""
        ones = x.copy()
        ones[list(decision.values)] = 1.0
        change = np.zeros((len(self.limits), len(decision.damage)))
        for kind, rows in self.rows[i]:
            powers = np.ones(len(decision.damage))
            for values, power in zip(decision.values.values(), kind, strict=True):
                powers = powers * values**power
            change += self.together.sums(ones, rows)[:, None] * (powers - powers[at])
        return here[:, None] + change


def minimise(decisions: Sequence[Decision], load: Load) -> list[int] | None:
    """The position of the value that each decision takes; None if even the lowest values are over a limit."""
    problem = _Problem(decisions, load)
    least = [0] * len(decisions)
    if not problem.fits(problem.loads(least)):
        return None
    best = least
    most = [len(d.damage) - 1 for d in decisions]
    if problem.fits(problem.loads(most)):
        return most
    spread = sum(float(d.damage[0] - d.damage[-1]) for d in decisions)
    low, high = np.log(max(spread, 1e-30)) - 16.0, np.log(max(spread, 1e-30)) + 16.0
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        chosen = problem.descend(most, float(np.exp(price)))
        if problem.fits(problem.loads(chosen)):
            high = price
            best = min(best, chosen, key=problem.damage)
        else:
            low = price
    return problem.exchange(problem.raise_(best))


class _Problem:
    def __init__(self, decisions: Sequence[Decision], load: Load) -> None:
        self.decisions, self.load = decisions, load
        self.free = [i for i, d in enumerate(decisions) if len(d.damage) > 1]

    def values(self, chosen: Sequence[int]) -> Array:
        x = self.load.start.copy()
        for decision, choice in zip(self.decisions, chosen, strict=True):
            for number, values in decision.values.items():
                x[number] = values[choice]
        return x

    def loads(self, chosen: Sequence[int]) -> Array:
        return self.load(self.values(chosen)) / self.load.limits

    @staticmethod
    def fits(loads: Array) -> bool:
        return bool((loads <= 1).all())

    def damage(self, chosen: Sequence[int]) -> float:
        return float(sum(d.damage[c] for d, c in zip(self.decisions, chosen, strict=True)))

    def descend(self, start: Sequence[int], price: float) -> list[int]:
        """Decision by decision to a minimum of damage + price * load."""
        chosen = list(start)
        for _ in range(_SWEEPS):
            before = list(chosen)
            x = self.values(chosen)
            here = self.load(x)
            for i in self.free:
                d = self.decisions[i]
                costs = self.load.along(x, i, d, chosen[i], here)
                loads = costs / self.load.limits[:, None]
                norm = (np.maximum(loads, 0) ** _NORM).sum(0) ** (1 / _NORM) if len(loads) > 1 else loads[0]
                chosen[i] = int((d.damage + price * norm).argmin())
                here = costs[:, chosen[i]]
                for number, values in d.values.items():
                    x[number] = values[chosen[i]]
            if chosen == before:
                break
        return chosen

    def moves(self, chosen: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64], Array, Array]:
        """Every change of one decision: its number, its new position, change of damage, largest load afterwards."""
        x = self.values(chosen)
        here = self.load(x)
        which, where, harm, after = [], [], [], []
        for i in self.free:
            d = self.decisions[i]
            which.append(np.full(len(d.damage), i))
            where.append(np.arange(len(d.damage)))
            harm.append(d.damage - d.damage[chosen[i]])
            costs = self.load.along(x, i, d, chosen[i], here)
            after.append((costs / self.load.limits[:, None]).max(0))
        if not which:
            return np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros(0)
        return np.concatenate(which), np.concatenate(where), np.concatenate(harm), np.concatenate(after)

    def raise_(self, chosen: list[int]) -> list[int]:
        """Spend what is left: the change that saves most damage for what it takes first."""
        chosen = list(chosen)
        while True:
            which, where, harm, after = self.moves(chosen)
            here = float(self.loads(chosen).max())
            useful = (harm < 0) & (after <= 1)
            if not useful.any():
                up = (where > np.array(chosen)[which]) & (harm <= 0) & (after <= 1)
                if not up.any():
                    break
                useful = up
            rate = np.where(useful, (-harm + 1e-300) / np.maximum(after - here, 1e-12), -1.0)
            best = int(rate.argmax())
            chosen[which[best]] = int(where[best])
        return chosen

    def exchange(self, chosen: list[int]) -> list[int]:
        """One decision up and one or two others down, while that is less damage in all; then, while the limit is not
        close, also where it is as good as none and uses more. `raise_` after each."""
        for close in (False, True):
            for _ in range(_ROUNDS):
                if close and self.loads(chosen).max() >= _CLOSE:
                    break
                better = self._exchanged(chosen, close)
                if better is None:
                    break
                chosen = self.raise_(better)
        return chosen

    def _exchanged(self, chosen: list[int], close: bool) -> list[int] | None:
        which, where, harm, _ = self.moves(chosen)
        damage, load = self.damage(chosen), float(self.loads(chosen).max())
        most = damage + (_NEGLIGIBLE if close else -1e-9) * abs(damage)
        before = np.array(chosen)
        ups = np.flatnonzero((harm < 0) & (where > before[which]) & (where <= before[which] + _REACH))
        for up in ups[harm[ups].argsort(kind="stable")][:_TRIED]:
            raised = list(chosen)
            raised[which[up]] = int(where[up])
            w, p, h, after = self.moves(raised)
            down = np.flatnonzero((w != which[up]) & (p <= before[w]) & (p >= before[w] - _REACH))
            w, p, h, after = w[down], p[down], h[down], after[down]
            # reason: two changes are added up here, though costs multiply; the best sums are computed after
            loads = after[:, None] + after - float(self.loads(raised).max())
            harms = damage + harm[up] + h[:, None] + h
            useful = np.flatnonzero((loads <= 1) & (harms <= most) & (not close or loads > load))
            rank = -loads.flat[useful] if close else harms.flat[useful]
            for k in useful[rank.argsort(kind="stable")[:4]].tolist():
                changed = list(raised)
                for i in divmod(k, len(w)):
                    changed[w[i]] = int(p[i])
                loads_after = self.loads(changed)
                if (
                    self.fits(loads_after)
                    and self.damage(changed) <= most
                    and (not close or loads_after.max() > load + 1e-6)
                ):
                    return changed
        return None
