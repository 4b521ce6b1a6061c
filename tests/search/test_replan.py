"""Plans from kept losses: equal to a fresh search with the same table, for other budgets and constraints, and refused
where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sbs_fx
from sbs_fx import Budget, Config, Keep, Policy, Result
from sbs_fx.plan.errors import ConstraintError, FileError, InfeasibleBudget, MethodError, PolicyError, PolicyMismatch
from sbs_fx.search import TwoStage
from sbs_fx.search.sensitivities import Sensitivities, replan
from tests.oracles.search_runs import IMAGES, digits, network

SMALL = TwoStage(images=128, judged=64, measured=20, rounds=1)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return network()


@pytest.fixture(scope="module")
def result(net: torch.nn.Module) -> Result:
    config = Config(two_stage=SMALL)  # type: ignore[call-arg]
    return sbs_fx.compress(net, IMAGES, budget=0.03, data=digits(shuffle=False), method="two_stage", config=config)


@pytest.mark.parametrize("budget", ["5%", "2%", "macs=60%", "bops=4%,size=20%"])
def test_a_plan_for_another_budget_is_within_it(net: torch.nn.Module, result: Result, budget: str) -> None:
    policy = result.replan(budget)
    limits = Budget.of(budget)
    assert result.problem is not None
    assert limits.is_satisfied_by(result.problem.cost.evaluate(policy.plan))
    applied = sbs_fx.apply(net, policy, IMAGES, budget=budget, data=digits(shuffle=False))
    assert limits.is_satisfied_by(applied.cost)


def test_a_saved_table_gives_the_same_plan_as_the_result_and_as_a_fresh_problem(
    net: torch.nn.Module, result: Result, tmp_path: Path
) -> None:
    result.save(tmp_path)
    table = tmp_path / "sensitivity.json"
    assert Sensitivities.load(table) == result.sensitivities
    again = sbs_fx.replan(net, table, "2%", IMAGES)
    assert again.plan == result.replan("2%").plan
    assert again.plan == replan(result.problem.under(Budget.of("2%")), result.sensitivities).plan  # type: ignore[union-attr, arg-type]
    assert again.plan != result.replan("5%").plan
    assert Policy.from_json(again.to_json()) == again


def test_no_plan_of_single_choices_has_less_loss(result: Result) -> None:
    """Against all plans with one decision changed: none that is within the limits is better by the same table."""
    problem = result.problem
    assert problem is not None
    assert result.sensitivities is not None
    problem = problem.under(Budget.of("4%"))
    decisions = result.sensitivities.decisions(problem)
    best = replan(problem, result.sensitivities).plan
    loss = sum(d.losses[d.chosen(best)] for d in decisions)
    for decision in decisions:
        for choice in range(len(decision.choices)):
            other = decision.applied(best, choice)
            changed = loss - decision.losses[decision.chosen(best)] + decision.losses[choice]
            assert changed >= loss - 1e-9 or not problem.fits(other)


def test_constraints_that_came_later_are_obeyed(result: Result) -> None:
    assert result.sensitivities is not None
    name = next(r.name for r in result.sensitivities.rows if r.kind == "weight" and len(r.choices) > 1)
    policy = result.replan("5%", constraints=(Keep(name, weight_bits=4, activation_bits=8),))
    assert policy.weight_bits[name] == 4
    whole = result.replan("7%", prune=False)
    assert all(len(kept) == whole.sizes[group] for group, kept in whole.kept.items())
    with pytest.raises(ConstraintError, match=r"may be any of \(3, 6\), of which none was measured"):
        result.replan("5%", candidates=(3, 6))


def test_methods_that_measure_nothing_search_again(net: torch.nn.Module) -> None:
    result = sbs_fx.compress(net, IMAGES, budget=0.05, method="opq")
    ratio = result.baseline_cost.bops / result.cost.bops
    assert repr(result).startswith(f"Result(opq: BOPs {ratio:.1f}x, MACs ")
    assert repr(result).endswith(" kB, 4 layers)")
    chosen = {b for t in (result.policy.weight_bits, result.policy.activation_bits) for b in t.values()}
    assert chosen & {3, 5, 6}  # beside 2, 4 and 8
    asked = sbs_fx.compress(net, IMAGES, budget=0.05, method="opq", config=Config(candidates=(4, 8)))
    assert set(asked.policy.weight_bits.values()) <= {4, 8}
    assert result.replan("3%").plan == sbs_fx.compress(net, IMAGES, budget=0.03, method="opq").policy.plan
    assert result.sensitivities is None


def test_what_cannot_be_planned_is_said(net: torch.nn.Module, result: Result, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleBudget, match="replan"):
        result.replan("0.01%")
    table: Any = result.sensitivities
    with pytest.raises(PolicyMismatch, match="measured on another model"):
        sbs_fx.replan(network(norm=False), table, "5%", IMAGES)
    path = tmp_path / "sensitivity.json"
    fields = json.loads(table.to_json())
    for text, error, message in [
        (table.to_json()[:-40], FileError, "truncated"),
        (json.dumps({**fields, "method": "other"}), FileError, "altered"),
        ("[]", FileError, "expected an object"),
    ]:
        path.write_text(text)
        with pytest.raises(error, match=message):
            Sensitivities.load(path)
    with pytest.raises(FileError, match=r"expected a sensitivity\.json"):
        Sensitivities.load(tmp_path / "none.json")
    with pytest.raises(PolicyError, match="losses; expected one each"):
        Sensitivities(fingerprint="", method="", rows=[{"kind": "weight", "name": "a", "choices": [2], "losses": []}])  # type: ignore[list-item]
    result.problem, kept = None, result.problem
    with pytest.raises(MethodError, match="holds no problem"):
        result.replan("5%")
    result.problem = kept
