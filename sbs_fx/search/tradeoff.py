"""`tradeoff`: what a report needs to show the plans that a search rejected and to try other budgets by itself.

In: a problem and what a search on it found. Out: rows of plans, and prices as sums of products over the rows of the
table of sensitivities. Holds: at a plan's choices the sums are its exact price, but for what operators that run at full
width store of their kept channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sbs_fx.passes.cost.polynomial import Polynomial, Variable
from sbs_fx.report.data import PlanRow, Tradeoff
from sbs_fx.search.problem import Problem, SearchResult


def tradeoff(problem: Problem, found: SearchResult) -> Tradeoff:
    """Empty of a search that measured no losses."""
    if found.sensitivities is None:
        return Tradeoff()
    plans = [
        PlanRow(name=c.name, estimated=c.estimated, judged=c.predicted, shares=dict(c.shares), reason=c.reason)
        for c in found.considered
    ]
    rows, number = found.sensitivities.rows, problem.cost.number
    places = {number[Variable(row.kind, row.name)]: i for i, row in enumerate(rows)}
    for i, row in enumerate(rows):
        if row.kind == "weight":
            places[number[Variable("quantised", row.name)]] = i + len(rows)
    x, _ = problem.cost.values(problem.space.most)
    terms = {measure: _terms(polynomial, x, places) for measure, polynomial in problem.cost.polynomials.items()}
    return Tradeoff(plans=tuple(plans), whole=dict(problem.cost.whole), terms=terms)


def _terms(polynomial: Polynomial, x: Any, places: Mapping[int, int]) -> tuple[tuple[int | float, ...], ...]:
    """With values of `x` for what has no place."""
    sums: dict[tuple[int, ...], int | float] = {}
    for key, coefficient in polynomial.terms.items():
        value: int | float = coefficient
        for variable in key:
            value *= 1 if variable in places else int(x[variable])
        factors = tuple(places[variable] for variable in key if variable in places)
        sums[factors] = sums.get(factors, 0) + value
    return tuple((value, *factors) for factors, value in sums.items() if value)
