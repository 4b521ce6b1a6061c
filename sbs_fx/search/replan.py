"""A plan for another budget from what an earlier search has learned, without measuring.

In: a problem, the name of the method that searched, the losses that it measured. Out: a policy.
"""

from __future__ import annotations

from typing import Any

from sbs_fx.plan import Policy
from sbs_fx.plan.errors import MethodError
from sbs_fx.search.problem import Problem
from sbs_fx.search.registry import METHODS, Run
from sbs_fx.search.sensitivities import Sensitivities, replan


def replanned(problem: Problem, method: str, table: Sensitivities | None, settings: Any = None) -> Policy:
    """From the table; a method that reads no data has none and searches again with its settings, which takes seconds.

    Raises:
        MethodError: a method that learns from data and leaves no table. InfeasibleBudget, PolicyMismatch,
        ConstraintError: as `replan`.
    """
    if table is not None:
        return problem.policy(replan(problem, table).plan, table.method)
    entry = METHODS[method]
    if entry.needs_data:
        raise MethodError(
            f"method {method!r} leaves no table of losses to plan from; call compress again, or search with "
            "'two_stage', which does"
        )
    return problem.policy(entry.search(problem, Run(settings=settings)).plan, entry.name)
