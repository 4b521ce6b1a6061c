"""The zoo benchmark on two tiny networks: its rows say what they should, resume, and name what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.oracles.benchmarks import BENCHMARKS, rows_of

NAMES = ("conv1d_classifier", "two_towers")
COLUMNS = ("build", "trace", "price", "slim", "budget", "static", "file", "unchanged")


def _run(out: Path, *arguments: str) -> list[dict[str, object]]:
    return rows_of("zoo.py", out, *arguments)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _zoo_networks

    return _zoo_networks


def test_two_networks_go_all_the_way_and_are_not_computed_again(tmp_path: Path) -> None:
    out, table = tmp_path / "rows.json", tmp_path / "table.md"
    rows = _run(out, "--models", ",".join(NAMES), "--table", str(table))
    assert [row["model"] for row in rows] == list(NAMES)
    for row in rows:
        assert row["outcome"] == "ok", row
        assert {row[column] for column in COLUMNS} == {"ok"}
        assert row["slim_error"] < 1e-10  # type: ignore[operator]
        assert row["differs_from_dense"] > 1e-6  # type: ignore[operator]
        assert row["shares"]["bops"] <= 0.1  # type: ignore[index]
    assert "| all | 2 | 2 | 0 | 0 |" in table.read_text()
    with out.with_suffix(".jsonl").open("a") as side:
        side.write('{"model": "cut sh')  # what an interrupted run leaves
    assert _run(out, "--models", ",".join(NAMES), "--resume") == rows


def test_there_are_many_rows_and_each_is_called_once(networks: ModuleType) -> None:
    everything = networks.all_networks()
    assert len(everything) >= 160
    assert all(name == row.name and row.kind for name, row in everything.items())


def test_what_is_wrong_is_told_from_what_is_refused(networks: ModuleType) -> None:
    pytest.importorskip("torchvision")
    import _zoo_check as check

    from sbs_fx.plan.errors import InputError

    row: dict[str, object] = {"seconds": {}}
    for column, error in (
        ("trace", InputError("batch is 1")),
        ("price", check.Wrong("off by 3")),
        ("slim", KeyError("x")),
    ):
        with check._column(row, column):
            raise error
    assert row["trace"] == "refused: InputError: batch is 1"
    assert row["price"] == "faulty: off by 3"
    assert str(row["slim"]).startswith("faulty: KeyError: 'x'")
    assert check._worst(row) == "faulty: price: off by 3"


def test_named_inputs_become_plain_ones(networks: ModuleType) -> None:
    import torch
    from torch import Tensor, nn

    class Named(nn.Module):
        def forward(self, *, x: Tensor, times: int, mask: Tensor | None = None) -> dict[str, object]:
            return {"y": x * times, "mask": mask}

    make = networks.by_name(x=networks.images(3), times=lambda batch: 2)
    (x,) = networks.tensors_in(make(4))
    (y,) = networks.PlainCall(Named(), make(2))(x)
    assert torch.equal(networks.called(Named(), make(4))["y"], y)
    assert torch.equal(y, 2 * x)
    assert x.shape == (4, 3)


def test_an_unknown_name_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "zoo.py"), "--out", str(tmp_path / "o.json"), "--models", "nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nope" in done.stderr
