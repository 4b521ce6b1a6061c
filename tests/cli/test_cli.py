"""The commands end to end on one tiny model, and every kind of wrong use as one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sbs_fx
from sbs_fx.plan import Policy
from sbs_fx.plan.errors import WeightsError
from sbs_fx.report import Report
from tests.oracles.commands import MODEL
from tests.oracles.commands import run_command as _run

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `compress` leaves behind, with weights kept so that `apply` can be run on the same ones."""
    directory = tmp_path_factory.mktemp("cli")
    from sbs_fx.cli.models import make_model

    torch.manual_seed(0)
    made = make_model("test_vit", None, True, "1,32,32", 10, None)
    torch.save(made.module.state_dict(), directory / "weights.pth")
    arguments = ["compress", *MODEL, "--checkpoint", str(directory / "weights.pth"), "--budget", "4%"]
    arguments += ["--method", "uniform", "--weight-bits", "8", "--activation-bits", "8"]
    assert _run([*arguments, "--data", "digits", "--out", str(directory / "out")]) == 0
    return directory


def test_inspect_prints_text_and_json(capsys: Captured) -> None:
    assert _run(["inspect", *MODEL]) == 0
    text = capsys.readouterr()
    assert "Layers by BOPs" in text.out
    assert "model output" in text.out
    assert "trace" in text.err
    assert _run(["inspect", *MODEL, "--json"]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert report.method is None
    assert sum(row.bops for row in report.layers) == report.cost.bops


def test_compress_leaves_policy_model_and_report(output: Path, capsys: Captured) -> None:
    assert sorted(p.name for p in (output / "out").iterdir()) == [
        "model.pt2",
        "policy.json",
        "report.html",
        "report.json",
        "report.txt",
        "run.json",
    ]
    policy = Policy.load(output / "out" / "policy.json")
    assert any(len(kept) < policy.sizes[name] for name, kept in policy.kept.items())
    report = Report.from_json((output / "out" / "report.json").read_text())
    assert report.cost.reference is not None
    assert report.cost.bops <= 0.04 * report.cost.reference.bops
    assert report.accuracy is not None
    assert len(report.accuracy) == 2
    assert _run(["report", str(output / "out")]) == 0
    told = capsys.readouterr()
    assert told.out == (output / "out" / "report.txt").read_text()
    assert told.err.splitlines()[-1] == f"page: {output / 'out' / 'report.html'}"
    assert "test_vit: report" in (output / "out" / "report.html").read_text(), "as run.json names it"


def test_a_report_becomes_a_page_a_difference_and_a_card(output: Path, tmp_path: Path, capsys: Captured) -> None:
    out = str(output / "out")
    files = ["--html", str(tmp_path / "page.html"), "--node-data", str(tmp_path / "nodes.json")]
    assert _run(["report", out, *files]) == 0
    assert (tmp_path / "page.html").read_text() == (output / "out" / "report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir())[:3] == ["nodes.bits.json", "nodes.kept.json", "nodes.sqnr.json"]
    capsys.readouterr()
    assert _run(["report", out, out, "--html", str(tmp_path / "difference.html")]) == 0
    assert "first" in capsys.readouterr().out.splitlines()[0]
    assert '"labels":["out","out"]' not in (tmp_path / "difference.html").read_text(), "paths, as the names are equal"
    assert _run(["report", out, "--card"]) == 0
    card = capsys.readouterr().out
    assert card.startswith("---\nlibrary_name: sbs-fx\n")
    assert _run(["report", out, "--card", "--out", str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_text() == card
    assert _run(["report", out, "--out", str(tmp_path / "text")]) == 2
    assert _run(["report", out, out, "--json"]) == 2


def test_a_part_is_saved_as_one(output: Path, tmp_path: Path, capsys: Captured) -> None:
    """What is measured is the whole with the part in its place, there and by `evaluate`; the file says what it is."""
    model = [*MODEL, "--checkpoint", str(output / "weights.pth")]
    made, out = ["--data", "digits", "--part", "blocks.0"], str(tmp_path / "out")
    saved = str(tmp_path / "out" / "model.pt2")
    assert _run(["compress", *model, *made, "--budget", "5%", "--method", "uniform", "--out", out]) == 0
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert report.notes[0].startswith("this is the part 'blocks.0' (")
    assert report.notes[-2] == "the accuracy is the whole model's, with the part in its place"
    assert report.accuracy is not None
    capsys.readouterr()
    assert _run(["evaluate", *model, "--data", "digits", "--with-part", saved, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == report.accuracy[1]
    assert _run(["export", saved, "--format", "pt2", "--out", str(tmp_path / "again.pt2")]) == 0
    assert "again.pt2: the part 'blocks.0' of the model, computes what torch computes" in capsys.readouterr().out
    assert _run(["apply", *model, str(tmp_path / "out" / "policy.json"), *made]) == 0
    assert "the accuracy is the whole model's" in capsys.readouterr().out
    assert _run(["sweep", *model, *made, "--methods", "uniform", "--budgets", "10%"]) == 0
    assert capsys.readouterr().out.startswith("this is the part 'blocks.0'")
    for path, said in [(str(tmp_path / "again.pt2"), "'blocks.0' of a model and gives no classes by itself; give"),
                       (str(output / "out" / "model.pt2"), "is no part of a model")]:  # fmt: skip
        arguments = [*model, "--with-part", path] if "no part" in said else [path]
        assert _run(["evaluate", *arguments, "--data", "digits"]) == 2
        assert said in capsys.readouterr().err


def test_sweep_prints_a_table_and_leaves_its_points(output: Path, tmp_path: Path, capsys: Captured) -> None:
    arguments = ["sweep", *MODEL, "--checkpoint", str(output / "weights.pth"), "--data", "digits"]
    arguments += ["--methods", "uniform", "--budgets", "10%,5%"]
    assert _run([*arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith((tmp_path / "comparison.txt").read_text())
    assert shown.count("uniform") == 2
    assert _run([*arguments, "--out", str(tmp_path), "--json"]) == 0
    again = capsys.readouterr()
    assert "uniform at" not in again.err, "points that are there are not computed again"
    assert [p["outcome"] for p in json.loads(again.out)["points"]] == ["ok", "ok"]


def test_evaluate_reads_what_compress_wrote(output: Path, capsys: Captured) -> None:
    assert _run(["evaluate", str(output / "out" / "model.pt2"), "--data", "digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = Report.from_json((output / "out" / "report.json").read_text())
    assert report.accuracy is not None
    assert found["accuracy"] == report.accuracy[1], "same file, same data, same normalisation"


def test_apply_gives_the_same_cost_again(output: Path, capsys: Captured) -> None:
    arguments = ["apply", *MODEL, "--checkpoint", str(output / "weights.pth"), "--json"]
    assert _run([arguments[0], *MODEL, str(output / "out" / "policy.json"), *arguments[-3:]]) == 0
    again = Report.from_json(capsys.readouterr().out)
    first = Report.from_json((output / "out" / "report.json").read_text())
    assert again.cost == first.cost


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["inspect", "no_such_model"], "no_such_model"),
        (["compress", "test_vit", "--budget", "0"], "Budget"),
        (["compress", "test_vit", "--budget", "nan"], "Budget"),
        (["compress", "test_vit", "--budget", "120%"], "Budget"),
        (["compress", "test_vit", "--method", "magic"], "magic"),
        (["compress", "test_vit", "--weight-bits", "7"], "--weight-bits 7"),
        (["compress", "test_vit", "--lr", "-1"], "--lr -1"),
        (["compress", "test_vit", "--device", "cuda:99"], "--device cuda:99"),
        (["compress", "test_vit", "--device", "gpu"], "--device gpu"),
        (["evaluate", "model.pt2", "--data", "digits", "--device", "cuda"], "--device cuda"),
        (["compress", *MODEL, "--data", "no/such/folder"], "no/such/folder"),
        (["compress", *MODEL, "--checkpoint", "no_such_file.pth"], "no_such_file.pth"),
        (["inspect", "test_vit", "--input-size", "3,x"], "3,x"),
        (["inspect", "test_vit", "--input-size", "3,32,32", "--in-chans", "1"], "disagree"),
        (["apply", "test_vit", "no_such_policy.json"], "no_such_policy.json"),
        (["evaluate", "no_such_file.pt2", "--data", "digits"], "no_such_file.pt2"),
        (["report", "no_such_directory"], "no_such_directory"),
        (["compress"], "MODEL"),
    ],
)
def test_wrong_use_is_told_and_ends_in_2(arguments: list[str], expected: str, capsys: Captured) -> None:
    assert _run(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_an_output_directory_that_is_a_file_is_told_before_any_work(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "taken").write_text("mine")
    assert _run(["compress", *MODEL, "--out", str(tmp_path / "taken")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, "one line"
    assert (tmp_path / "taken").read_text() == "mine"


def test_weights_of_another_model_are_told(output: Path, capsys: Captured) -> None:
    assert _run(["inspect", "test_resnet", "--checkpoint", str(output / "weights.pth")]) == 2
    assert "do not fit" in capsys.readouterr().err


def test_an_altered_policy_is_told(output: Path, tmp_path: Path, capsys: Captured) -> None:
    text = (output / "out" / "policy.json").read_text()
    (tmp_path / "policy.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    assert _run(["apply", *MODEL, str(tmp_path / "policy.json")]) == 2
    assert "altered" in capsys.readouterr().err


def test_an_interrupt_ends_in_130(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sbs_fx.cli.models.make_model", interrupted)
    assert _run(["inspect", "test_vit"]) in (1, 130)
    assert "Traceback" not in capsys.readouterr().err


def test_short_forms(capsys: Captured) -> None:
    assert _run(["-h"]) == _run(["compress", "-h"]) == _run(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"sbs-fx {sbs_fx.__version__}"


def test_the_installed_command_answers() -> None:
    done = subprocess.run([sys.executable, "-m", "sbs_fx.cli", "--help"], capture_output=True, text=True, check=True)
    for command in ("inspect", "compress", "apply", "evaluate", "report"):
        assert command in done.stdout


def test_a_search_leaves_metrics_and_is_not_run_again(tmp_path: Path, capsys: Captured) -> None:
    out = str(tmp_path / "out")
    arguments = ["compress", *MODEL, "--budget", "3%", "--data", "digits", "--batch-size", "128", "--method", "sbs"]
    arguments += ["--search-epochs", "1", "--epochs", "1", "--set", "training.ema=0.5", "--out", out]
    torch.manual_seed(0)
    assert _run(arguments) == 0
    first = capsys.readouterr()
    assert "search epoch=1/1" in first.err
    assert "bops_budget=3.00%" in first.err
    assert "accuracy %" in first.out
    steps = len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert _run(["report", out]) == 0
    assert "search bops" in capsys.readouterr().out
    torch.manual_seed(0)  # the weights of the model, which is made anew
    assert _run(arguments) == 0
    assert "epoch=" not in capsys.readouterr().err
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == steps
    assert _run([*arguments, "--set", "training.ema=0.6"]) == 2
    assert "training was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.ema", "expected NAME=VALUE"),
        ("training.none=1", "none"),
        ("search.epochs=0", "epochs: Input should be greater"),
    ],
)
def test_settings_that_mean_nothing(setting: str, message: str, capsys: Captured) -> None:
    assert _run(["compress", *MODEL, "--set", setting]) == 2
    assert message in capsys.readouterr().err


def test_replan_takes_up_what_a_run_measured(output: Path, tmp_path: Path, capsys: Captured) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    weights = ["--checkpoint", str(output / "weights.pth")]
    search = ["--method", "two_stage", "--set", "two_stage.images=64", "--set", "two_stage.measured=4"]
    search += ["--set", "two_stage.rounds=0", "--data", "digits", "--out", str(first)]
    assert _run(["compress", *MODEL, *weights, "--budget", "5%", *search]) == 0
    capsys.readouterr()
    assert _run(["replan", str(first), "--budget", "3%", "--out", str(second)]) == 0
    said = capsys.readouterr().out
    assert "plan:" in said
    assert f"sbs-fx apply test_vit {second / 'policy.json'} --checkpoint {output / 'weights.pth'} " in said
    assert "--random-weights --input-size 1,32,32 --num-classes 10 --out" in said
    arguments = [*MODEL, str(second / "policy.json"), *weights, "--budget", "3%", "--json"]
    assert _run(["apply", arguments[0], arguments[6], *arguments[1:6], *arguments[7:]]) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert report.cost.reference is not None
    assert report.cost.bops <= 0.03 * report.cost.reference.bops
    (first / "sensitivity.json").unlink()
    for directory, message in [(first, "leaves one only where it measures losses"), (tmp_path, "cannot read")]:
        assert _run(["replan", str(directory), "--budget", "3%"]) == 2
        assert message in capsys.readouterr().err
    (first / "run.json").write_text('{"format": 1, "model": 3}')
    assert _run(["replan", str(first), "--budget", "3%"]) == 2
    assert "is no run.json of this version" in capsys.readouterr().err


def test_a_name_means_published_weights(capsys: Captured) -> None:
    """Which cannot be had offline: the error says which flag to give; weights and data are told as a run begins."""
    assert _run(["compress", "test_vit"]) == 2
    said = capsys.readouterr().err
    assert "the published weights of 'test_vit' cannot be had" in said
    assert "--random-weights" in said
    assert "--checkpoint" in said
    with pytest.raises(WeightsError, match=r"a module for 'test_vit'"):
        sbs_fx.compress("test_vit")


def test_pictures_of_other_classes_are_refused_before_any_work(tmp_path: Path, capsys: Captured) -> None:
    for name in ("circle", "square", "triangle"):
        (tmp_path / "shapes" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (32, 32), 40 * i).save(tmp_path / "shapes" / name / f"{i}.png")
    shapes = ["--data", str(tmp_path / "shapes")]
    assert _run(["compress", *MODEL, *shapes]) == 2
    assert "has 3 classes (circle, square, triangle) and the model has 10" in capsys.readouterr().err
    model = [value if value != "10" else "3" for value in MODEL]
    assert _run(["compress", *model, *shapes]) == 2
    assert "has no folders train/ and test/" in capsys.readouterr().err
    (tmp_path / "split").mkdir()
    (tmp_path / "shapes").rename(tmp_path / "split" / "train")
    (tmp_path / "split" / "val" / "circle").mkdir(parents=True)
    Image.new("L", (40, 32)).save(tmp_path / "split" / "val" / "circle" / "0.png")
    arguments = ["--data", str(tmp_path / "split"), "--budget", "8%", "--method", "uniform"]
    assert _run(["compress", *model, *arguments]) == 0
    said = capsys.readouterr()
    assert "data: 12 train, 1 test pictures, 3 classes: circle, square, triangle" in said.err
    assert "no test picture of square, triangle" in said.err
    assert "weights: random (sha256 " in said.err


def test_help_imports_neither_torch_nor_us() -> None:
    """What `--help` and `import sbs_fx` take is what Python and the parser of options take."""
    code = "import sys; from sbs_fx.cli import main\ntry: main(['compress', '--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'timm', 'numpy', 'networkx', 'scipy'} & set(sys.modules); assert not heavy, heavy\n"
    code += "import sbs_fx; assert callable(sbs_fx.compress) and callable(sbs_fx.compare) and sbs_fx.__version__"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0
