"""Steps of training in a tracker of accelerate's form, and the digits without what ships them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest

from sbs_fx.data.datasets import open_data
from sbs_fx.plan.errors import DataError, InputError
from sbs_fx.report.trackers import Tracker
from sbs_fx.training.progress import Progress
from tests.oracles.commands import MODEL, run_command


class Kept(accelerate.tracking.GeneralTracker):
    """Keeps what it is told."""

    name = "kept"
    requires_logging_directory = True
    told: list[Any] = []

    def __init__(self, run: str, logging_dir: str) -> None:
        super().__init__()
        self.told[:] = [(run, logging_dir)]

    tracker = property(lambda self: None)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("end")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "kept", Kept)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["kept"])
    return Kept.told


def test_steps_of_stages_go_on_from_one_another(kept: list[Any], tmp_path: Path) -> None:
    with Tracker("kept", "run", str(tmp_path), {"seed": 1, "nested": {}}) as tracker:
        for stage, step in (("search", 1), ("search", 2), ("fine-tune", 1)):
            measures = {"bops": 0.1, "budget": {"bops": 0.05}} if stage == "search" else {}
            tracker(Progress(stage, 0, 1, step, None, loss=2.0, rate=0.1, measures=measures))
    assert kept[:2] == [("run", str(tmp_path)), {"seed": 1}]
    assert [entry[0] for entry in kept[2:5]] == [1, 2, 3]
    assert kept[2][1] == {"search/loss": 2.0, "search/rate": 0.1, "search/epoch": 0.0, "search/bops": 0.1}
    assert kept[-1] == "end"


def test_one_that_is_not_there_is_known_before_work(
    kept: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="'wandb' is not installed; installed: kept"):
        Tracker("wandb", "run", str(tmp_path), {})
    monkeypatch.chdir(tmp_path)
    assert run_command(["compress", *MODEL, "--tracker", "none", "--out", "out"]) == 2
    assert "tracker 'none' is none that accelerate knows" in capsys.readouterr().err


def test_digits_say_which_extra_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'sbs-fx\[demo\]'"):
        open_data("digits")
