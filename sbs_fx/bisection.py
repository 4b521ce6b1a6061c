"""The smallest result that loses no more than asked, by bisection over budgets.

In: what compresses at a budget and what measures a result. Out: the smallest result that was good enough, and the steps
on the way. Holds: what is returned was measured; the largest budget is tried first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from sbs_fx.models import create_model
from sbs_fx.plan import Budget
from sbs_fx.plan.errors import BudgetError, DataError, InfeasibleBudget, InputError
from sbs_fx.result import Result
from sbs_fx.training import evaluate
from sbs_fx.training.task import task_of

LARGEST = Budget(bops=0.125)
_STEPS, _WIDEST = 5, 16.0  # of bisection; how far below the largest budget it looks


class Step(NamedTuple):
    """A budget and what is lost there, in points of the metric; None where no plan reaches it."""

    share: float
    lost: float | None

    def __str__(self) -> str:
        return f"{self.share:.3%} " + ("out of reach" if self.lost is None else f"{-self.lost:+.2f}")


def smallest(
    compressed: Callable[[Budget], Result], lost: Callable[[Result], float], largest: Budget, most: float
) -> tuple[Result, tuple[Step, ...]]:
    """Bisect, on a logarithmic scale, the one measure that a budget limits.

    Args:
        largest: the budget tried first. lost: points of the metric; most: of them that may be lost.

    Raises:
        BudgetError: more than one measure is limited, or even at the largest budget more is lost.
    """
    if len(largest.limits) != 1 or largest.amounts:
        raise BudgetError(f"max_drop with limits {largest.asked}; expected one measure, whose smallest share is sought")
    ((measure, high),) = largest.limits.items()
    steps: list[Step] = []

    def attempt(share: float) -> Result | None:
        try:
            result = compressed(largest.model_copy(update={measure: share}))
        except InfeasibleBudget:
            steps.append(Step(share, None))
            return None
        steps.append(Step(share, lost(result)))
        return result if steps[-1].lost <= most else None  # type: ignore[operator]

    best = attempt(high)
    if best is None:
        raise BudgetError(
            f"{measure} {steps[0]}, where {-most:+.2f} was asked for; give a larger budget, data, epochs of "
            "fine-tuning, or a larger max_drop"
        )
    low = high / _WIDEST
    for _ in range(_STEPS):
        share = math.sqrt(low * high)
        result = attempt(share)
        if result is None:
            low = share
        else:
            best, high = result, share
    return best, tuple(steps)


def within_drop(
    compress: Callable[..., Result],
    apply: Callable[..., Result],
    model: Any,
    largest: Budget,
    max_drop: float,
    options: dict[str, Any],
) -> Result:
    """`compress(max_drop=)`: the smallest result by the metric of its task on `validation`; its report has the steps.
    What the first compression measured is planned from again, where it left that.

    Raises:
        InputError: a share that is none, or a part of a model. DataError: nothing to measure on. As `smallest`.
    """
    if not 0 <= max_drop < 1:
        raise InputError(f"max_drop={max_drop}; expected a share of the metric's scale, such as 0.01 for one point")
    if options["part"] is not None:
        raise InputError("max_drop measures a whole model; compress a part under a budget, or the whole")
    if options["validation"] is None:
        raise DataError("max_drop is measured on validation=, held-out batches of (inputs, targets); give them")
    module: nn.Module = create_model(model) if isinstance(model, str) else model
    cached: dict[str, float] = {}
    first: list[Result] = []

    def compressed(budget: Budget) -> Result:
        if not first or first[0].sensitivities is None:
            first[:] = [compress(module, budget=budget, **options)]
            return first[0]
        replanned = {name: value for name, value in options.items() if name != "method"}
        result = apply(module, first[0].replan(budget), budget=budget, **replanned)
        return replace(
            result, sensitivities=first[0].sensitivities, problem=first[0].problem, settings=first[0].settings
        )

    def metric(of: nn.Module, task: Any) -> float:
        reference = module if task.is_of_reference else None
        return evaluate(of, options["validation"], task=task, prepare=options["prepare"], reference=reference)

    def lost(result: Result) -> float:
        task = task_of(result.gated)
        if "float" not in cached:
            cached["float"] = metric(module, task)
        return cached["float"] - metric(result.model, task)

    result, steps = smallest(compressed, lost, largest, 100 * max_drop)
    taken = [step for step in steps if step.lost is not None and step.lost <= 100 * max_drop][-1]
    note = f"the smallest within {max_drop:.2%} of {cached['float']:.2f}: {', '.join(map(str, steps))}"
    report = result.report.model_copy(update={"notes": (*result.report.notes, note)})
    result.report = report.with_accuracy(cached["float"], cached["float"] - taken.lost)  # type: ignore[operator]
    return result
