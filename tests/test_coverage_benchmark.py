"""The coverage benchmark on tiny models: its rows say what they should, resume, and survive a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.oracles.benchmarks import BENCHMARKS, rows_of


def _run(out: Path, *arguments: str) -> list[dict[str, object]]:
    return rows_of("coverage.py", out, "--jobs", "1", *arguments)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _coverage_workers

    return _coverage_workers


def test_one_family_goes_all_the_way(tmp_path: Path) -> None:
    (row,) = _run(tmp_path / "rows.json", "--models", "test_resnet", "--table", str(tmp_path / "table.md"))
    assert row["outcome"] == "ok", row
    assert (row["family"], row["model"]) == ("resnet", "test_resnet")
    assert row["slim_error"] < 1e-10  # type: ignore[operator]
    assert row["prunable_share"] == 1.0
    assert row["mac_reduction"] > 0.3  # type: ignore[operator]
    assert row["cost_error"] == 0
    assert row["bops_share"] <= 0.1  # type: ignore[operator]
    seconds = row["seconds"]
    assert isinstance(seconds, dict)
    assert {"export", "trace", "groups", "gates", "slim", "finalise", "compress", "save", "load"} <= seconds.keys()
    assert "| resnet | test_resnet | ok |" in (tmp_path / "table.md").read_text()


def test_graph_work_alone_resumes(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    (first,) = _run(out, "--all", "--models", "test_vit")
    assert first["outcome"] == "ok", first
    assert first["device"] == "meta"
    with out.with_suffix(".jsonl").open("a") as side:
        side.write('{"family": "cut sh')  # what an interrupted run leaves
    assert _run(out, "--all", "--resume", "--models", "test_vit") == [first], "not computed again"


def test_an_unknown_family_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "coverage.py"), "--out", str(tmp_path / "o.json"), "--families", "nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nope" in done.stderr


def test_a_crash_and_a_hang_cost_one_task_each(workers: ModuleType) -> None:
    import os
    import time

    tasks = [(os._exit, 3), (time.sleep, 60), (abs, -2)]
    results = dict(workers.run_tasks(workers.call, tasks, jobs=1, timeout=8))
    assert "ended with code 3" in str(results[tasks[0]])
    assert "out of time" in str(results[tasks[1]])
    assert results[tasks[2]] == 2
