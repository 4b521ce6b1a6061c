"""Files are whole, of one kind, and nothing is left over, wherever what writes them is stopped or refused."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sbs_fx
from sbs_fx.export.formats import export
from sbs_fx.export.registry import TARGETS, Target
from sbs_fx.export.runtime import Runner
from sbs_fx.plan import files as plan_files
from sbs_fx.plan import write_atomic
from sbs_fx.plan.errors import FileError
from sbs_fx.plan.files import prepare_directory
from sbs_fx.training import Checkpoints
from tests.oracles.kills import full_disk_at, killed_at


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_files, "_YOUNG", -1.0)  # reason: no other process makes files here


@pytest.fixture(scope="module")
def result() -> sbs_fx.Result:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return sbs_fx.compress(net, torch.randn(2, 3, 8, 8), budget=0.1)


def hidden(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


def test_a_file_is_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for number in itertools.count(1):
        path.write_bytes(b"old")
        killed = killed_at(number, lambda: write_atomic(path, b"a new one"))
        assert path.read_bytes() in (b"old", b"a new one")
        if not killed:
            break
    assert number >= 4
    assert len(hidden(tmp_path)) >= 2
    prepare_directory(tmp_path)
    assert not hidden(tmp_path)


def test_what_a_process_holds_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner: list[list[str]] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (prepare_directory(tmp_path), inner.append(hidden(tmp_path)))[0] and real(file)
    )
    write_atomic(tmp_path / "file", b"data")
    assert len(inner[0]) == 1
    assert (tmp_path / "file").read_bytes() == b"data"
    mine = tmp_path / ".mine.tmp"
    mine.write_text("no file of ours")
    monkeypatch.setattr(plan_files, "_YOUNG", 60.0)
    (tmp_path / ".file.0123abcd.tmp").write_text("young")
    prepare_directory(tmp_path)
    assert len(hidden(tmp_path)) == 2
    os.utime(tmp_path / ".file.0123abcd.tmp", (time.time() - 100,) * 2)
    prepare_directory(tmp_path)
    assert hidden(tmp_path) == [".mine.tmp"]


# -- several files of one export ---------------------------------------------------------------------------------------


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """A target of two files, each of which says what was exported."""
    content = [b"old"]

    def write(static: fx.GraphModule, inputs: Any, path: str, options: Any) -> Runner:
        for name in (path, os.path.splitext(path)[0] + ".bin"):
            with open(name, "wb") as file:
                file.write(content[0])
        return Runner("pair", lambda *x: static(*x))

    monkeypatch.setitem(TARGETS._entries, "pair", (Target("pair", write, ".xml", ""), __name__))
    return content


def test_pairs_are_never_mixed(result: sbs_fx.Result, tmp_path: Path, pairs: list[bytes]) -> None:
    """Killed: both of one export, or no model; refused: both as they were."""
    model, weights = tmp_path / "m.xml", tmp_path / "m.bin"
    inputs: tuple[Tensor, ...] = result.example_inputs

    def write() -> None:
        export(result.model, inputs, "pair", model)

    def old() -> None:
        pairs[0] = b"old"
        write()
        pairs[0] = b"new"
        assert model.read_bytes() == weights.read_bytes() == b"old"

    states = set()
    for number in itertools.count(1):
        old()
        killed = killed_at(number, write)
        if model.exists():
            assert model.read_bytes() == weights.read_bytes()
        states.add(model.read_bytes() if model.exists() else b"")
        if not killed:
            break
    assert states == {b"old", b"new", b""}
    for number in itertools.count(1):
        old()
        assert not hidden(tmp_path)
        with full_disk_at(number) as reached:
            try:
                write()
                break
            except FileError:
                assert len(reached) >= number
        assert model.read_bytes() == weights.read_bytes() == b"old"
    assert number > 4


# -- whole results -----------------------------------------------------------------------------------------------------


def test_results_are_never_mixed(result: sbs_fx.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each state that a kill leaves is loaded: one result, or a set that is refused."""
    other = sbs_fx.compress(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), result.example_inputs
    )
    new, old, place = tmp_path / "new", tmp_path / "old", tmp_path / "place"
    result.save(new)
    other.save(old)
    data = (new / "model.pt2").read_bytes()
    monkeypatch.setattr("sbs_fx.result.save_pt2", lambda static, inputs, path, metadata: write_atomic(path, data))
    states = set()
    for number in itertools.count(1):
        shutil.copytree(old, place, dirs_exist_ok=True)
        killed = killed_at(number, lambda: result.save(place))
        state = tuple((place / name).read_bytes() for name in ("model.pt2", "policy.json", "report.json"))
        if state not in states:
            states.add(state)
            try:
                ends = sbs_fx.load(place).policy.checksum
            except FileError as error:
                ends = str(error)
            assert ends in (result.policy.checksum, other.policy.checksum) or "belong to different results" in ends
        if not killed:
            break
    assert len(states) == 4
    assert ends == result.policy.checksum
    assert not hidden(place)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_checkpoint_before_is_kept_and_offered(tmp_path: Path) -> None:
    def save(step: int) -> None:
        with Checkpoints(tmp_path, {}) as checkpoints:
            checkpoints.save("search", {"x": torch.full((9,), step)}, {"step": step})

    save(1)
    for number in itertools.count(2):
        if not killed_at(number - 1, partial(save, number)):
            break
        with Checkpoints(tmp_path, {}) as checkpoints:
            saved = checkpoints.load("search")
            assert saved is not None
            assert bool((saved.tensors["x"] == saved.state["step"]).all())
            assert saved.state["step"] >= number - 1
            checkpoints.save("search", {"x": torch.full((9,), number)}, {"step": number})
            assert not hidden(tmp_path)
    with Checkpoints(tmp_path, {}) as checkpoints:
        last = Path(checkpoints.path("search"))
        last.write_bytes(last.read_bytes()[:50])
        with pytest.raises(FileError, match=r"delete it to go on from the one before \(.*previous.*whole"):
            checkpoints.load("search")
        last.unlink()
        assert checkpoints.load("search").state["step"] == number - 1  # type: ignore[union-attr]
        Path(checkpoints.previous("search")).write_bytes(b"cut")
        last.write_bytes(b"cut")
        with pytest.raises(FileError, match="; start again") as caught:
            checkpoints.load("search")
        assert "the one before" not in str(caught.value)
