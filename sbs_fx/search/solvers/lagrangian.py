"""One multiplier over many discrete decisions whose costs multiply: least damage within limits.

In: per decision its values and what damage each does; per measure, the cost as a polynomial in the values. Out: one
value per decision. Holds: every limit is met; no single decision can be raised without breaking one; the same input
gives the same output.

For a multiplier lambda, sum_i D_i(x_i) + lambda * load(x) is minimised decision by decision until none changes, with
load the p-norm of cost over limit of the measures (of one measure, that ratio itself); lambda is bisected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_NORM = 8.0  # close to the largest of the measures' loads, and smooth
_FULL = 1 + 1e-12  # reason: sums of products that are exactly a limit may be a rounding above it
_SWEEPS = 20
_BISECTIONS = 32
_ROUNDS = 100  # of exchanges
_REACH, _TRIED = 3, 60  # steps of a decision in an exchange, and decisions that are raised
_CLOSE = 0.999  # of a limit that should be used at least
_NEGLIGIBLE = 2e-3  # share of all damage, which no model of it tells from none


class Polynomial:
    """Sum of coefficient * product of variables; `terms` maps the sorted numbers of the variables to a coefficient."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[tuple[int, ...], float]) -> None:
        self.terms = terms

    @classmethod
    def variable(cls, number: int) -> Polynomial:
        return cls({(number,): 1.0})

    def __add__(self, other: Polynomial | float) -> Polynomial:
        total = dict(self.terms)
        for key, value in _terms(other).items():
            total[key] = total.get(key, 0.0) + value
        return Polynomial(total)

    def __mul__(self, other: Polynomial | float) -> Polynomial:
        total: dict[tuple[int, ...], float] = {}
        for left, a in self.terms.items():
            for right, b in _terms(other).items():
                key = tuple(sorted(left + right))
                total[key] = total.get(key, 0.0) + a * b
        return Polynomial(total)

    __radd__, __rmul__ = __add__, __mul__


def _terms(value: Polynomial | float) -> Mapping[tuple[int, ...], float]:
    return value.terms if isinstance(value, Polynomial) else {(): float(value)}


@dataclass(frozen=True)
class Decision:
    """Values that one variable may take, ascending, and the damage of each, descending."""

    values: Array
    damage: Array


class Load:
    """Cost over limit of each measure, as a function of all variables, one of which may run over its values.

    Args:
        costs: polynomial per measure, divided by its limit. variables: how many there are.
    """

    def __init__(self, costs: Sequence[Polynomial], variables: int) -> None:
        terms = [(m, key, value) for m, cost in enumerate(costs) for key, value in cost.terms.items()]
        widest = max((len(key) for _, key, _ in terms), default=0)
        self.measures = len(costs)
        self.owner = np.array([m for m, _, _ in terms], int)
        self.scale = np.array([value for _, _, value in terms])
        self.index = np.full((len(terms), widest), variables)  # reason: one variable more, which is always 1
        rows: list[list[int]] = [[] for _ in range(variables)]
        for row, (_, key, _) in enumerate(terms):
            self.index[row, : len(key)] = key
            for i in set(key):
                rows[i].append(row)
        self.rows = [
            (np.array(found, int), (self.index[found] == i).sum(1) if found else np.zeros(0, int))
            for i, found in enumerate(rows)
        ]

    def __call__(self, x: Array) -> Array:
        """Shape (measures,)."""
        values = self.scale * np.append(x, 1.0)[self.index].prod(1)
        return np.bincount(self.owner, values, self.measures).astype(float)

    def along(self, x: Array, i: int, values: Array, here: Array) -> Array:
        """Loads with variable i at each of its values, shape (measures, values); `here` is the load at x."""
        rows, degree = self.rows[i]
        ones = np.append(x, 1.0)
        ones[i] = 1.0
        others = self.scale[rows] * ones[self.index[rows]].prod(1)
        change = np.zeros((self.measures, len(values)))
        for k in range(1, int(degree.max(initial=0)) + 1):
            chosen = degree == k
            per_measure = np.bincount(self.owner[rows[chosen]], others[chosen], self.measures)
            change += per_measure[:, None] * (values**k - x[i] ** k)
        return here[:, None] + change


def minimise(decisions: Sequence[Decision], load: Load) -> list[int] | None:
    """The position of the value that each decision takes; None if even the lowest values are over a limit."""
    problem = _Problem(decisions, load)
    least = [0] * len(decisions)
    if not problem.fits(problem.loads(least)):
        return None
    best = least
    most = [len(d.values) - 1 for d in decisions]
    if problem.fits(problem.loads(most)):
        return most
    spread = sum(float(d.damage[0] - d.damage[-1]) for d in decisions)
    low, high = np.log(max(spread, 1e-30)) - 16.0, np.log(max(spread, 1e-30)) + 16.0
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        found = problem.descend(most, float(np.exp(price)))
        if problem.fits(problem.loads(found)):
            high = price
            best = min(best, found, key=problem.damage)
        else:
            low = price
    return problem.exchange(problem.raise_(best))


class _Problem:
    def __init__(self, decisions: Sequence[Decision], load: Load) -> None:
        self.decisions, self.load = decisions, load
        self.free = [i for i, d in enumerate(decisions) if len(d.values) > 1]

    def values(self, chosen: Sequence[int]) -> Array:
        return np.array([d.values[c] for d, c in zip(self.decisions, chosen, strict=True)])

    def loads(self, chosen: Sequence[int]) -> Array:
        return self.load(self.values(chosen))

    @staticmethod
    def fits(loads: Array) -> bool:
        return bool((loads <= _FULL).all())

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
                loads = self.load.along(x, i, d.values, here)
                norm = (np.maximum(loads, 0) ** _NORM).sum(0) ** (1 / _NORM) if len(loads) > 1 else loads[0]
                chosen[i] = int((d.damage + price * norm).argmin())
                x[i], here = d.values[chosen[i]], loads[:, chosen[i]]
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
            which.append(np.full(len(d.values), i))
            where.append(np.arange(len(d.values)))
            harm.append(d.damage - d.damage[chosen[i]])
            after.append(self.load.along(x, i, d.values, here).max(0))
        if not which:
            return np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros(0)
        return np.concatenate(which), np.concatenate(where), np.concatenate(harm), np.concatenate(after)

    def raise_(self, chosen: list[int]) -> list[int]:
        """Spend what is left: the change that saves most damage for what it takes first."""
        chosen = list(chosen)
        while True:
            which, where, harm, after = self.moves(chosen)
            here = float(self.loads(chosen).max())
            useful = (harm < 0) & (after <= _FULL)
            if not useful.any():
                up = (where > np.array(chosen)[which]) & (harm <= 0) & (after <= _FULL)
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
                found = self.loads(changed)
                if self.fits(found) and self.damage(changed) <= most and (not close or found.max() > load + 1e-6):
                    return changed
        return None
