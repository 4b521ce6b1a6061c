"""Losses measured by workers are those measured here, and none is measured twice."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import sbs_fx
from sbs_fx import Config, Task
from sbs_fx.plan import Budget, Plan
from sbs_fx.plan.errors import InputError
from sbs_fx.search import TwoStage
from sbs_fx.search.measuring import Measuring
from sbs_fx.training import Checkpoints
from tests.oracles.search_runs import IMAGES, digits, network

BRIEF = TwoStage(images=64, judged=32, measured=20, rounds=1)
BUDGET = Budget(bops=1 / 40)


def table(executor: Any, **settings: Any) -> tuple[str, str]:
    """The measured losses and the plan, as text."""
    model = network()
    with torch.random.fork_rng():
        config = Config(two_stage=BRIEF, executor=executor, **settings)
        result = sbs_fx.compress(
            model, IMAGES, budget=BUDGET, data=digits(shuffle=False), method="two_stage", config=config
        )
    return result.sensitivities.to_json(), result.policy.to_json()


@pytest.fixture(scope="module")
def here() -> tuple[str, str]:
    return table(None)


class Counted(Executor):
    """Runs what it is given in this process, and counts."""

    def __init__(self) -> None:
        self.plans = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.plans += len(args[1])
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_what_is_read_again_measures_the_same(here: tuple[str, str]) -> None:
    executor = Counted()
    assert table(executor) == here
    assert executor.plans > 10


def test_threads_have_a_predictor_each(here: tuple[str, str]) -> None:
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        assert table(pool) == here


def test_one_process_and_two(here: tuple[str, str]) -> None:
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    for workers in (1, 2):
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
            assert table(pool) == here


def test_two_workers_of_dask(here: tuple[str, str]) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, protocol="tcp", host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run(torch.set_num_threads, torch.get_num_threads())
        assert table(client.get_executor()) == here


class Dying(Executor):
    """Its worker is gone."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(RuntimeError("a process was terminated"))
        return future


def test_what_executors_cannot_do_is_said() -> None:
    with pytest.raises(InputError, match=r"a worker of the executor failed \(RuntimeError: a process was terminated\)"):
        table(Dying())
    with pytest.raises(ValueError, match="a int is no executor; expected one of concurrent.futures"):
        Config(executor=2)
    task = Task(outputs=lambda output: (output,))
    with pytest.raises(InputError, match="cannot be sent to the executor's workers"):
        sbs_fx.compress(
            network(), IMAGES, budget=BUDGET, data=digits(), method="two_stage", task=task,
            config=Config(two_stage=BRIEF, executor=Counted()),
        )  # fmt: skip


# -- a run that goes on ------------------------------------------------------------------------------------------------


class Predicted:
    """Losses by one weight's bits; gives up after so many."""

    images = 8

    def __init__(self, most: int) -> None:
        self.most, self.calls = most, list[int]()

    def __call__(self, plan: Plan) -> float:
        if len(self.calls) == self.most:
            raise KeyboardInterrupt
        self.calls.append(int(plan.weight_bits["a"]))  # type: ignore[call-overload]
        return 1 / self.calls[-1]


def plans(bits: Sequence[int]) -> Iterator[Plan]:
    return (Plan(weight_bits={"a": b}) for b in bits)


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbs_fx.search.measuring._SECONDS", -1.0)
    wanted = [1 / b for b in (2, 3, 4, 2, 5)]
    first, second = Predicted(3), Predicted(10)
    with Checkpoints(tmp_path, {"run": 1}) as checkpoints, pytest.raises(KeyboardInterrupt):
        Measuring(first, None, checkpoints).of([*plans((2, 3, 4, 2, 5))])  # type: ignore[arg-type]
    with Checkpoints(tmp_path, {"run": 1}) as checkpoints:
        measuring = Measuring(second, None, checkpoints)  # type: ignore[arg-type]
        assert measuring.of([*plans((2, 3, 4, 2, 5))]) == wanted
    assert (first.calls, second.calls) == ([2, 3, 4], [5])
    assert len(measuring.asked) == 4


def test_steps_are_told_with_the_time_that_is_left() -> None:
    said: list[str] = []
    config = Config(two_stage=BRIEF)
    sbs_fx.compress(
        network(), IMAGES, budget=BUDGET, data=digits(shuffle=False), method="two_stage", config=config,
        progress=lambda stage, share: said.append(stage),
    )  # fmt: skip
    steps = [re.fullmatch(r"(\w+) (\d+) of (\d+)(, \d+ s left)?", stage) for stage in said]
    for stage in ("search", "reconstruct"):
        found = [(int(s[2]), int(s[3])) for s in steps if s is not None and s[1] == stage]
        assert found[0][0] == 1
        assert found[-1][0] == found[-1][1] > 1
