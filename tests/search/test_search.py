"""Search by gates: budgets, decisions, determinism; killed, interrupted and spread runs end as undisturbed ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import sbs_fx
from sbs_fx.passes import CostModel, insert_gates, slim
from sbs_fx.passes.channels.slim import scatter
from sbs_fx.plan import Budget, Plan, Policy
from sbs_fx.plan.errors import CheckpointMismatch, DataError, InfeasibleBudget
from sbs_fx.search import Keep, Problem, Run, Search, SearchResult, prune_then_quantise, sbs
from sbs_fx.search.gate_search import GateSearch
from sbs_fx.search.repair import BudgetRepair, Harm
from sbs_fx.search.sbs import GateTraining
from sbs_fx.training import Checkpoints
from tests.oracles.problems import cost_of, problem_of
from tests.oracles.search_runs import (
    BUDGET,
    IMAGES,
    INTERRUPTED,
    SEARCH,
    SETTINGS,
    digits,
    network,
    search,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cost() -> CostModel:
    return cost_of(network(), IMAGES)


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return search(None)[1]


def problem(cost: CostModel, budget: Budget = BUDGET, **space: Any) -> Problem:
    return problem_of(cost, IMAGES, budget, **{"block": 1, **space})


def run(data: Any = None, settings: Search = SEARCH, **options: Any) -> Run:
    return Run(digits() if data is None else data, settings, **options)


def share(cost: CostModel, plan: Plan, measure: str = "bops") -> float:
    return Budget(**{measure: 1.0}).shares(cost.evaluate(plan))[measure]


# What a search decides


def test_the_budget_is_used_and_not_exceeded(cost: CostModel, found: SearchResult) -> None:
    # reason: a channel of this network is 3.5 to 6 % of the budget
    assert 0.965 * BUDGET.limits["bops"] <= share(cost, found.plan) <= BUDGET.limits["bops"]


@pytest.mark.parametrize("start_is_better", [True, False])
def test_the_end_is_judged_with_the_weights_from_before_too(
    cost: CostModel, start_is_better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever diverges less with the float weights wins here, the difference being large; with it go the weights."""
    seen: list[Plan] = []
    weight = cost.groups.inference.graph_module.get_parameter("0.weight")

    def judged(self: GateTraining, plan: Plan, ranges: Any) -> float:
        seen.append(plan)
        trained = not torch.equal(self.network.get_parameter("0.weight"), weight)
        assert trained == (len(seen) <= 2)
        if trained:
            return divergence(self, plan, ranges)
        return 1e-12 if (len(seen) == 4) == start_is_better else 1e12  # what gates chose comes first

    divergence = GateTraining._divergence
    monkeypatch.setattr(GateTraining, "_divergence", judged)
    result = sbs(problem(cost), run())
    assert len(seen) == 4
    assert seen[:2] == seen[2:]
    assert result.plan == (seen[1] if start_is_better else seen[0])
    assert torch.equal(result.tensors["0.weight"], weight) == start_is_better


def test_first_and_last_layer_stay_at_eight_bits(found: SearchResult) -> None:
    plan = found.plan
    names, tensors = list(plan.weight_bits), list(plan.activation_bits)
    assert {plan.weight_bits[names[0]], plan.weight_bits[names[-1]]} == {8}
    assert {plan.activation_bits[tensors[0]], plan.activation_bits[tensors[-1]]} == {8}


def test_the_same_seed_gives_the_same_search(found: SearchResult) -> None:
    _, again = search(None)
    assert again.plan == found.plan
    assert all(torch.equal(value, again.tensors[name]) for name, value in found.tensors.items())


@pytest.mark.parametrize(
    ("prune", "quantise", "budget"),
    [
        (False, True, Budget(bops=1 / 50)),
        (True, False, Budget(macs=0.5)),
        (True, True, Budget(bops=1 / 40, size=0.12)),
    ],
)
def test_decisions_can_be_restricted(cost: CostModel, prune: bool, quantise: bool, budget: Budget) -> None:
    plan = sbs(problem(cost, budget, prune=prune, quantise=quantise), run()).plan
    assert all(share(cost, plan, m) <= limit for m, limit in budget.limits.items())
    pruned = any(len(kept) < cost.groups[name].size for name, kept in plan.kept.items())
    bits = {b for table in (plan.weight_bits, plan.activation_bits) for b in table.values()}
    assert pruned or quantise
    assert not pruned or prune
    assert bits <= {2, 4, 8} if quantise else bits == {32}


def test_inner_groups_alone(cost: CostModel) -> None:
    def searched(**space: Any) -> set[str]:
        given = problem(cost, block=4, **space)
        gated = insert_gates(given.graph, given.groups, block=4)
        return set(GateSearch(gated, given, Search()).channels)

    # this network has no residual stream
    assert searched() == searched(inner_only=True) == set(cost.groups)
    assert not searched(prune=False)


def test_a_search_begins_within_its_budget_and_stays_near(cost: CostModel) -> None:
    seen: list[Any] = []
    sbs(problem(cost), run(observer=seen.append))
    limit = BUDGET.limits["bops"]
    assert 0.9 * limit <= seen[0].measures["bops"] <= limit
    assert all(0.5 * limit < progress.measures["bops"] < 2 * limit for progress in seen)


def test_thresholds_move_within_the_budget(cost: CostModel) -> None:
    """On its path the cost stays the same to first order, whatever the loss asks of them; above it, it falls."""
    given = problem(cost, block=4)
    training = GateSearch(insert_gates(given.graph, given.groups, block=4), given, Search())
    training.before_step(0, 0.0)
    training.network(IMAGES)
    generator = torch.Generator().manual_seed(0)
    for over in (0.0, 0.5):
        thresholds = [gate.threshold for gates in training._kinds().values() for gate in gates.values()]
        for threshold in thresholds:
            threshold.grad = torch.randn(threshold.shape, generator=generator)
        assert training.penalty() is None
        training.first, training.last = {"bops": 0.0}, {"bops": over}
        training.before_update(0)
        slopes = training.slopes["bops"]
        change = -sum(float((t.grad * slopes[t]).sum()) for t in thresholds if t.grad is not None)
        size = sum(float((t.grad * slopes[t]).abs().sum()) for t in thresholds if t.grad is not None)
        assert size > 0
        assert abs(change) < 1e-5 * size if over == 0 else change < 0
    training.before_step(0, 0.0)  # harm in proportion to cost, in all kinds of gates: nothing is to be gained
    assert training.penalty() is None
    training.first, training.last = {"bops": 0.0}, {"bops": 0.0}
    for threshold, slope in training.slopes["bops"].items():
        threshold.grad = 3 * slope
    training.before_update(0)
    moved = [t.grad.abs().max() for t in thresholds if t.grad is not None]
    assert moved
    assert max(moved) < 1e-4


def test_gates_close_and_open_under_a_multiplier(cost: CostModel) -> None:
    """A fixed multiplier is kept; a high one closes gates that a low one leaves open, and never a whole group."""
    runs = []
    for lam in (1e-6, 50.0):
        seen: list[Any] = []
        options = SEARCH.model_copy(update={"lam": lam, "threshold_lr": 0.5})
        sbs(problem(cost, Budget(bops=1.0)), run(settings=options, observer=seen.append))
        runs.append(seen)
    few, many = runs
    assert {p.measures["multiplier"]["bops"] for p in many} == {50.0}
    assert few[-1].measures["bops"] > 2 * many[-1].measures["bops"]
    assert min(many[-1].measures["weight_bits"]) == 2
    assert 0 < many[-1].measures["pruned"] < 1


def test_prune_then_quantise(cost: CostModel) -> None:
    groups = cost.groups
    state = groups.inference.graph_module.state_dict()
    found = prune_then_quantise(problem(cost, Budget(bops=1 / 60)), run())
    assert share(cost, found.plan) <= 1 / 60
    assert share(cost, found.plan, "macs") <= 1 / 1.5
    slimmed = slim(groups.inference.graph_module, groups, found.plan.kept)
    assert found.tensors.keys() == state.keys()
    assert all(found.tensors[n].shape == t.shape for n, t in state.items())
    for name, part in slimmed.state_dict().items():
        whole = scatter(groups, found.plan.kept, name, state[name], torch.full_like(part, 7.0))
        assert int((whole == 7.0).sum()) >= part.numel()


# Budget repair


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.004, 0.2))
def test_budget_repair_never_exceeds_the_budget(cost: CostModel, seed: int, limit: float) -> None:
    groups = cost.groups
    generator = torch.Generator().manual_seed(seed)

    def drawn(names: Any) -> dict[str, int]:
        return {n: (2, 4, 8)[int(torch.randint(3, (1,), generator=generator))] for n in names}

    kept = {n: sorted(torch.randperm(g.size, generator=generator)[: g.size // 2].tolist()) for n, g in groups.items()}
    plan = Plan(kept, drawn(cost.weights), drawn(cost.activations))
    scores = {n: torch.rand(g.size, generator=generator) for n, g in groups.items()}
    every = (2, 4, 8)
    ends = Keep(place="ends", weight_bits=every, activation_bits=every)
    given_ = problem(cost, Budget(bops=limit), block=4, constraints=(ends,))
    least = cost.evaluate(
        Plan(
            {n: range(4) for n in groups},
            dict.fromkeys(cost.weights, 2),
            dict.fromkeys(cost.activations, 2),
        )
    )
    gated = insert_gates(given_.graph, groups)
    teacher = torch.full((2, 10), 0.1).log()
    repair = BudgetRepair(given_, Harm(gated, [((IMAGES,), [teacher])], {}), scores)
    budget = Budget(bops=limit)
    if not budget.is_satisfied_by(least):
        with pytest.raises(InfeasibleBudget) as error:
            repair(plan)
        assert error.value.least["bops"] == pytest.approx(budget.shares(least)["bops"])
        return
    done = repair(plan)
    assert budget.shares(cost.evaluate(done))["bops"] <= limit
    assert all(done.kept.values())


# Costs


def test_expected_costs_are_the_exact_ones_at_whole_numbers(cost: CostModel, found: SearchResult) -> None:
    p = found.plan
    sizes = {n: torch.tensor(float(len(k)), dtype=torch.float64) for n, k in p.kept.items()}
    soft = cost.expected(sizes, p.weight_bits, p.activation_bits)
    exact = cost.evaluate(p)
    assert float(soft["bops"]) == exact.bops
    assert float(soft["macs"]) == exact.macs
    assert float(soft["size"]) == exact.stored_bits


# Data that cannot be searched on


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        ([IMAGES], "batch 0 has no labels"),
        ([(IMAGES, torch.tensor([3, 3]))], r"label \{3\} alone"),
    ],
)
def test_data_that_cannot_be_searched_on(cost: CostModel, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sbs(problem(cost), run(data))


# Going on


@pytest.mark.parametrize("seed", range(2))
def test_killed_and_interrupted_runs_end_bit_identical(seed: int, tmp_path: Path) -> None:
    """SIGKILL at 10 random moments, SIGINT or SIGTERM once; the same call again ends as an undisturbed run."""
    command = [sys.executable, "-m", "tests.oracles.search_runs", "kill", str(tmp_path), "10", str(seed)]
    single = {**os.environ, "OMP_NUM_THREADS": "1"}  # reason: a pool of threads does not outlive a fork
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=single)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert [tuple(o[2:]) for o in outcomes["killed"]] == [(0, True)] * 10
    assert sum(code < 0 for code, *_ in outcomes["killed"]) >= 7  # a few may have ended before
    assert sum(kept for _, kept, *_ in outcomes["killed"]) >= 4
    assert outcomes["interrupted"] == [INTERRUPTED, True, 0, True]
    assert "The same command again goes on from there" in done.stderr


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """The same global batch: identical decisions on both, the same plan as in one process, weights to rounding."""
    for count in (1, 2):
        place = tmp_path / str(count)
        place.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [sys.executable, *launch, "-m", "tests.oracles.search_runs", "spread", str(place)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]

    def read(count: int, rank: int) -> tuple[Policy, dict[str, Tensor]]:
        path = tmp_path / str(count) / f"state-{rank}.safetensors"
        with safe_open(path, framework="pt") as file:
            return Policy.from_json(file.metadata()["policy"]), load_file(path)

    one, first, second = read(1, 0), read(2, 0), read(2, 1)
    assert first[0] == second[0] == one[0]
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name])
        assert torch.allclose(value, one[1][name], atol=5e-3), name  # reason: sums in another order flip codes


def test_a_finished_search_is_not_run_again(cost: CostModel, tmp_path: Path, found: SearchResult) -> None:
    _, first = search(tmp_path)
    assert all(torch.equal(value, first.tensors[name]) for name, value in found.tensors.items())
    seen: list[Any] = []
    with Checkpoints(tmp_path / "checkpoints", {"run": "test"}) as checkpoints:
        again = sbs(problem(cost), run(training=SETTINGS, checkpoints=checkpoints, observer=seen.append))
    assert not seen
    assert again.plan == first.plan


# The one call


def test_compress_by_search_end_to_end(tmp_path: Path) -> None:
    """Budget, static = gated, a second call that trains nothing, other settings refused, `restart`."""
    seen: list[Any] = []

    def compressed(**options: Any) -> Any:
        seen.clear()
        arguments: dict[str, Any] = {"budget": BUDGET, "method": "sbs", "output_dir": tmp_path / "out", **options}
        config = sbs_fx.Config(epochs=1, block=1, search=SEARCH.model_copy(update={"epochs": 1}))
        arguments = {"data": digits(), **arguments}
        return sbs_fx.compress(
            arguments.pop("net", network()), IMAGES, config=config, observer=seen.append, **arguments
        )

    first = compressed()
    assert {p.stage for p in seen} == {"search", "fine-tune"}
    assert BUDGET.is_satisfied_by(first.cost)
    assert first.policy.method == "sbs"
    images, labels = next(iter(digits(320, "test", shuffle=False)))
    with torch.no_grad():
        agree = (first.model(images).argmax(1) == first.gated(images).argmax(1)).double().mean()
    assert agree >= 0.96  # one image of 32 may lie on a tie
    again = compressed()
    assert not seen
    assert again.policy == first.policy
    assert all(torch.equal(v, again.model.state_dict()[n]) for n, v in first.model.state_dict().items())
    with pytest.raises(CheckpointMismatch, match="budget was .*0.025.*is .*0.05") as error:
        compressed(budget=Budget(bops=0.05))
    assert error.value.different == ("budget",)
    others = [network(), network()]
    others[0][0].bias.data += 1  # type: ignore[index]
    others[1][8].dilation = (2, 2)  # type: ignore[index]
    others[1][8].padding = (2, 2)  # type: ignore[index]
    for other, name in [
        ({"net": others[0]}, "weights and operators"),
        ({"net": others[1]}, "weights and operators"),
        ({"data": digits(160)}, "data"),
    ]:
        with pytest.raises(CheckpointMismatch, match=f"{name} was ") as error:
            compressed(**other)
        assert name in error.value.different
    compressed(budget=Budget(bops=0.05), restart=True)
    assert seen
    with pytest.raises(DataError, match="'sbs' needs data"):
        sbs_fx.compress(network(), IMAGES, method="sbs")
