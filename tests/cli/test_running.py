"""Where runs leave their work, files of options, what `--set` may name, dry runs, and a run repeated."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from sbs_fx import Config
from sbs_fx.cli.progress import show_progress
from sbs_fx.cli.running import default_directory
from sbs_fx.cli.settings import known_settings, nested
from tests.oracles.commands import MODEL
from tests.oracles.commands import run_command as _run

Captured = pytest.CaptureFixture[str]


def told(text: str) -> str:
    """What a framed error says, on one line."""
    return " ".join(text.replace("│", " ").split())


def test_a_run_is_never_thrown_away_and_can_be_repeated(elsewhere: Path, capsys: Captured) -> None:
    (elsewhere / "run.yaml").write_text("budget: 3%\nmethod: uniform\nset:\n  importance: l1\n")
    command = ["compress", *MODEL, "--config", "run.yaml"]
    assert _run(command) == 0
    assert "policy.json, model.pt2 and the report are in out/test_vit-3pct" in capsys.readouterr().out
    saved = json.loads((elsewhere / "out/test_vit-3pct/run.json").read_text())
    assert saved["arguments"] == command
    assert (saved["budget"], saved["settings"]["importance"], saved["seed"]) == ("3%", "l1", 0)
    assert {"versions", "machine", "seconds", "data", "weights"} <= saved.keys()
    assert default_directory("test_vit", "3%", command) == "out/test_vit-3pct"
    assert default_directory("test_vit", "3%", ["compress", "another"]) == "out/test_vit-3pct-2"
    assert _run(["rerun", "out/test_vit-3pct", "-o", "again"]) == 0
    assert "byte for byte those in out/test_vit-3pct" in capsys.readouterr().out
    path = elsewhere / "out/test_vit-3pct/policy.json"
    path.write_text(path.read_text() + "\n")
    assert _run(["rerun", "out/test_vit-3pct", "-o", "third"]) == 1
    assert "policy.json differ from those in out/test_vit-3pct" in capsys.readouterr().out
    assert _run(["rerun", "out/test_vit-3pct", "-o", "out/test_vit-3pct"]) == 2
    assert _run(["rerun", "nowhere"]) == 2


def test_a_run_that_was_stopped_is_taken_up_in_its_own_directory(elsewhere: Path) -> None:
    command = ["compress", *MODEL, "--budget", "0.01%"]
    for _ in range(2):
        assert _run(command) == 2  # out of reach
        assert [path.name for path in (elsewhere / "out").iterdir()] == ["test_vit-0.01pct"]


def test_names_of_directories() -> None:
    names = {b: default_directory("hf-hub:timm/resnet18.a1", b, []) for b in (None, "1/20", "bops=5%,size=20%", "2MB")}
    assert list(names.values()) == [
        "out/resnet18.a1-5pct",
        "out/resnet18.a1-1-20",
        "out/resnet18.a1-bops-5pct-size-20pct",
        "out/resnet18.a1-2MB",
    ]


def test_what_is_typed_wins_over_the_file(elsewhere: Path, capsys: Captured) -> None:
    (elsewhere / "run.yaml").write_text("budget: 3%\ndry-run: true\n")
    assert _run(["compress", *MODEL, "--config", "run.yaml"]) == 0
    assert "(3.00%)" in capsys.readouterr().out
    assert _run(["compress", *MODEL, "--config", "run.yaml", "--budget", "2%"]) == 0
    assert "(2.00%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("budget: 3%\ndatta: digits\n", "run.yaml:2: there is no option 'datta'; did you mean 'data'?"),
        ("epochs: many\n", "run.yaml:1: epochs: "),
        ("budget: {a: 1}\n", "run.yaml:1: budget is a dict; expected one value"),
        ("- budget\n", "run.yaml: expected names of options and their values, such as 'budget: 5%'"),
        ("budget: [3\n", "run.yaml: while parsing a flow sequence"),
        (
            "set:\n  trainin.ema: 1\n",
            "--set trainin.ema=1: there is no setting 'trainin.ema'; did you mean 'training.ema'?",
        ),
    ],
)
def test_a_file_of_options_names_the_line(text: str, said: str, elsewhere: Path, capsys: Captured) -> None:
    (elsewhere / "run.yaml").write_text(text)
    assert _run(["compress", *MODEL, "--config", "run.yaml"]) == 2
    assert said in told(capsys.readouterr().err)
    assert not (elsewhere / "out").exists()


def test_a_dry_run_says_what_is_in_reach_and_leaves_nothing(elsewhere: Path, capsys: Captured) -> None:
    assert _run(["compress", *MODEL, "--dry-run", "--budget", "3%"]) == 0
    captured = capsys.readouterr()
    assert "method opq" in captured.out
    assert "within reach; nothing was computed or written" in captured.out
    assert _run(["compress", *MODEL, "--dry-run", "--budget", "0.01%"]) == 2
    assert "the least that method 'opq' reaches is bops" in capsys.readouterr().err
    assert _run(["compress", *MODEL, "--dry-run", "--budget", "5ms"]) == 0
    assert "known once layers were timed" in capsys.readouterr().out
    assert not list(elsewhere.iterdir())


def test_settings_are_listed_and_each_can_be_set(capsys: Captured) -> None:
    assert _run(["compress", "--list-settings"]) == 0
    listed = capsys.readouterr().out
    for setting in known_settings():
        assert setting.name in listed
        value = setting.default
        if value is None or isinstance(value, (bool, int, float)):
            Config(**nested([f"{setting.name}={json.dumps(value)}"]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training.emma=1", "there is no setting 'training.emma'; did you mean 'training.ema'?"),
        ("ema=1", "did you mean 'training.ema'?"),
        ("two_stage.judge=3", "did you mean 'two_stage.judged'?"),
        ("importance", "expected NAME=VALUE, such as training.ema=0.999"),
        ("qqqqqq=1", "there is no setting 'qqqqqq'; see --list-settings"),
    ],
)
def test_settings_that_are_none(text: str, said: str, capsys: Captured) -> None:
    assert _run(["compress", *MODEL, "--set", text]) == 2
    assert said in told(capsys.readouterr().err)


def test_in_a_pipe_there_is_a_line_a_stage_and_one_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    clock = iter([0.0, 0.0, 10.0, 20.0, 45.0, 50.0, 51.0])
    monkeypatch.setattr("sbs_fx.cli.progress.time.monotonic", lambda: next(clock))
    with show_progress() as show:
        for stage in ("search", "search 1 of 9", "search 2 of 9, 5 s left", "search 3 of 9, 4 s left", "slim", "done"):
            show(stage, 0.5)
    assert capsys.readouterr().err.splitlines() == ["search ...", "search 3 of 9, 4 s left ...", "slim ..."]


def test_a_dialogue_ends_in_a_command(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    (elsewhere / "mine.pth").write_bytes(b"x")
    (elsewhere / "my pictures").mkdir()
    answers = ["resnet18", "no.pth", "mine.pth", "3", "nowhere", "my pictures", "many", "2", "5 apples", "20x"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(answers) + "\n"))
    assert _run(["init"]) == 0
    said = capsys.readouterr().out
    assert (
        "\n  sbs-fx compress resnet18 --checkpoint mine.pth --num-classes 3 --data 'my pictures' "
        "--epochs 2 --budget 20x\n" in said
    )
    for problem in (
        "there is no file 'no.pth'",
        "there is no folder 'nowhere'",
        "'many' is no whole number",
        "no share",
    ):
        assert problem in said
    monkeypatch.setattr("sys.stdin", io.StringIO("resnet18\n\n\n\n"))
    assert _run(["init"]) == 0
    assert "\n  sbs-fx compress resnet18 --budget 5%\n" in capsys.readouterr().out
