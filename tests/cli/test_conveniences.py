"""What is typed less, and shown less or more: completion, folders in place of files, formats by suffix, -q and -v."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from sbs_fx.cli.completion import by_comma, format_names, method_names, model_names, setting_names
from sbs_fx.cli.exporting import format_of
from sbs_fx.cli.results import saved_file
from sbs_fx.export import load_saved
from sbs_fx.export.registry import TARGETS, Target
from sbs_fx.export.runtime import Runner
from sbs_fx.search.registry import METHODS
from tests.oracles.commands import MODEL, run_command

Captured = pytest.CaptureFixture[str]
PLAIN = ["--budget", "8%", "--method", "uniform"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of 32 x 32."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        folder = root / ("train" if i < 20 else "test") / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (32, 32), np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("saved") / "out"
    assert run_command(["compress", *MODEL, *PLAIN, "--data", str(pictures), "--out", str(out), "-q"]) == 0
    return out


def test_words_are_completed_from_the_registries() -> None:
    assert method_names("op") == ["opq"]
    assert set(method_names("")) == {"auto", *METHODS.entries()}
    assert set(format_names("")) == set(TARGETS.entries())
    assert "resnet18" in model_names("resnet1")
    assert model_names("torchvision/resnet18") == ["torchvision/resnet18"]
    assert setting_names("training.em") == ["training.ema="]
    assert by_comma(method_names)("uniform,two") == ["uniform,two_stage"]


def test_a_shell_is_answered() -> None:
    words = {"_SBS_FX_COMPLETE": "complete_bash", "COMP_WORDS": "sbs-fx compress --only q", "COMP_CWORD": "3"}
    code = "import sys; sys.argv = ['sbs-fx']; from sbs_fx.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["quantise"], done.stderr


def test_a_folder_stands_for_the_file_in_it(saved: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    for place in (saved, saved / "model.pt2"):
        assert run_command(["evaluate", str(place), "--data", str(pictures), "--json", "-q"]) == 0
        assert run_command(["bench", str(place), "--backends", "eager", "--rounds", "2", "--json", "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    first, second = (json.loads(line)["accuracy"] for line in shown.out.splitlines() if line.startswith('{"model"'))
    assert first == second
    assert saved_file(str(saved), "policy.json") == str(saved / "policy.json")
    out = tmp_path / "copy.pt2"
    assert run_command(["export", str(saved), "-o", str(out)]) == 0
    steps = capsys.readouterr().err
    assert out.exists()
    assert steps.splitlines() == ["read ...", "write pt2 ...", "run and compare ...", "compare outputs ..."]
    assert run_command(["evaluate", str(tmp_path), "--data", str(pictures)]) == 2, "nothing of ours is in it"


def test_pictures_are_an_option_of_formats_that_need_them(
    saved: Path, pictures: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def write(static: Any, inputs: Any, path: str, options: Any) -> Runner:
        given.append(options["calibration"])
        Path(path).touch()
        return Runner("mirror", static)

    mirror = Target("mirror", write, ".mirror", "itself", options=("calibration",))
    monkeypatch.setitem(TARGETS._entries, "mirror", (mirror, __name__))
    for name, code in (("a.mirror", 0), ("a.pt2", 2)):
        out = ["-o", str(tmp_path / name), "--data", str(pictures)]
        assert run_command(["export", str(saved), *out, "-q"]) == code
    assert given[0].shape == (20, *load_saved(saved / "model.pt2")[1][0].shape[1:])
    assert "format 'pt2' has no option 'calibration'" in capsys.readouterr().err


def test_the_suffix_says_the_format() -> None:
    for name, target in TARGETS.entries().items():
        if sum(other.suffix == target.suffix for other in TARGETS.entries().values()) == 1:
            assert format_of(f"some/model{target.suffix}") == name
    assert format_of("model.pt2") == "pt2"
    with pytest.raises(typer.BadParameter, match=r"ends in no suffix of .*\.onnx \(onnx\)"):
        format_of("model")


def test_quiet_and_verbose(capsys: Captured) -> None:
    assert run_command(["inspect", *MODEL, "-q"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert "BOPs" in quiet.out, "the result is shown"
    assert run_command(["inspect", *MODEL, "-v"]) == 0
    verbose = capsys.readouterr().err
    times = [float(m[1]) for m in re.finditer(r"^ +(\d+\.\d) s  ", verbose, re.M)]
    assert len(times) == 2
    assert times == sorted(times)
    assert run_command(["inspect", "no_such", "-q"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: timm has no model 'no_such'")
    assert "Traceback" not in told
    assert run_command(["inspect", "no_such", "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_workers_read_the_same_pictures(saved: Path, pictures: Path, capsys: Captured) -> None:
    found = []
    for workers in ("0", "2"):
        assert run_command(["evaluate", str(saved), "--data", str(pictures), "--workers", workers, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["accuracy"])
    assert found[0] == found[1]


def test_a_result_for_a_target_loses_nothing_in_its_file(saved: Path, tmp_path: Path, capfd: Captured) -> None:
    out = str(tmp_path / "out")
    assert run_command(["compress", *MODEL, *PLAIN, "--target", "tensorrt", "--out", out, "-q"]) == 0
    lost = []
    for place in (out, str(saved)):
        capfd.readouterr()
        assert run_command(["export", place, "--format", "tensorrt", "--out", str(tmp_path / "model.onnx"), "-q"]) == 0
        lost.append("not kept, by tensor:" in capfd.readouterr().out)
    assert lost == [False, True]
    assert run_command(["compress", *MODEL, "--target", "tensort", "--out", out]) == 2
    assert "did you mean 'tensorrt'?" in capfd.readouterr().err
