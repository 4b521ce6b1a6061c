"""Accuracy as the wish: the smallest budget at which no more is lost than asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sbs_fx
from sbs_fx.bisection import smallest
from sbs_fx.plan import Budget
from sbs_fx.plan.errors import BudgetError, DataError, InfeasibleBudget, InputError
from sbs_fx.training import evaluate
from tests.oracles.search_runs import IMAGES, network


def at(budget: Budget) -> Any:
    """A network whose loss is 1 % of the inverse share, that nothing brings under 1 %."""
    if budget.limits["bops"] < 0.01:
        raise InfeasibleBudget("no")
    return budget.limits["bops"]


@pytest.mark.parametrize(("most", "expected"), [(0.2, 0.05), (0.5, 0.02), (5.0, 0.01)])
def test_the_smallest_is_found_and_every_step_told(most: float, expected: float) -> None:
    found: Any
    found, steps = smallest(at, lambda share: 0.01 / share, Budget(bops=0.125), most)  # type: ignore[operator,arg-type,return-value]
    assert expected <= found <= 1.2 * expected
    assert len(steps) == 6
    assert steps[0].share == 0.125
    assert found == min(step.share for step in steps if step.lost is not None and step.lost <= most)
    assert all((step.lost is None) == (step.share < 0.01) for step in steps)


def test_what_cannot_be_had_is_said() -> None:
    with pytest.raises(BudgetError, match=r"bops 12.500% -0.08, where -0.05 was asked for; give a larger budget"):
        smallest(at, lambda share: 0.01 / share, Budget(bops=0.125), 0.05)  # type: ignore[operator,arg-type,return-value]
    with pytest.raises(BudgetError, match="expected one measure"):
        smallest(at, lambda share: 0.0, Budget(bops=0.1, size=0.1), 0.05)


def test_compress_takes_a_drop_for_a_budget() -> None:
    net: nn.Module = network()
    with torch.no_grad():
        images = torch.randn(256, 1, 8, 8)
        batches = [(x, net(x).argmax(1)) for x in images.split(64)]  # the network is right about all of them
    result = sbs_fx.compress(net, IMAGES, max_drop=0.1, data=batches, validation=batches, method="uniform")
    real, given = evaluate(net, batches), evaluate(result.model, batches)
    assert given >= real - 10
    assert result.report.accuracy == pytest.approx((real, given))
    assert "the smallest within 10.00%" in result.report.notes[-1]
    assert result.cost.bops < 0.125 * result.baseline_cost.bops


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_drop": 2.0}, InputError, "a share of the metric's scale"),
        ({"max_drop": 0.01, "part": "0"}, InputError, "measures a whole model"),
        ({"max_drop": 0.01}, DataError, "measured on validation="),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sbs_fx.compress(network(), IMAGES, **options)
