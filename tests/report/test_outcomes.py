"""What exports, benchmarks and comparisons leave for the page, and the page in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import sbs_fx
from sbs_fx.plan.errors import FileError
from sbs_fx.report.comparison import Comparison, Point
from sbs_fx.report.page import Extras, comparison_page, page
from sbs_fx.report.targets import TargetRow, compared, read_targets, record_targets
from tests.oracles.commands import run_command
from tests.report.browser import Browser
from tests.report.pages import HOSTILE, WITH_BROWSER, compressed, panels, shown


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    out = tmp_path_factory.mktemp("saved") / "out"
    sbs_fx.compress(net, torch.randn(2, 3, 8, 8), budget="10%", method="uniform").save(out)
    return out


def comparison() -> Comparison:
    def point(method: str, share: float, accuracy: float, bops: int) -> Point:
        ratio = 1e9 / bops
        return Point(
            method=method,
            budget={"bops": share},
            accuracy=accuracy,
            seconds=1.0,
            bops=bops,
            bops_ratio=ratio,
            size_ratio=4.0,
            macs_share=0.9,
        )

    failed = Point(method="opq", budget={"bops": 0.01}, outcome=f"InfeasibleBudget: cannot be met {HOSTILE}")
    points = (
        point("uniform", 0.05, 70.0, 50_000_000),
        point("sbs", 0.05, 72.0, 49_000_000),
        point("sbs", 0.03, 69.0, 30_000_000),
        failed,
    )
    return Comparison(float_accuracy=75.0, held_out=True, epochs=0, points=points)


def test_two_readings_of_equality() -> None:
    """Counted again by hand on the same numbers."""
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    examples, same, difference = compared(lambda x: x @ weight.T + 0.25, lambda x: x @ weight.T, [torch.zeros(4, 3)])
    assert (examples, same) == (32, 1.0)
    assert difference == pytest.approx(0.25, abs=1e-6)
    assert compared(lambda x: -(x @ weight.T), lambda x: x @ weight.T, [torch.zeros(4, 3)])[1] == 0.0
    assert compared(lambda x: [x], lambda x: [x], [torch.zeros(4, 3, 2)]) == (32, None, 0.0)


def test_rows_of_one_tool_are_one(tmp_path: Path) -> None:
    record_targets(tmp_path, [TargetRow(tool="a", reason="not installed"), TargetRow(tool="b", same=1.0)])
    record_targets(tmp_path, [TargetRow(tool="a", milliseconds={"1": 2.0}), TargetRow(tool="b", kernels="1 of 2")])
    first, second = read_targets(tmp_path)
    assert (first.reason, first.milliseconds) == ("", {"1": 2.0})
    assert (second.same, second.kernels) == (1.0, "1 of 2")
    (tmp_path / "targets.json").write_text('{"rows": [{}]}')
    with pytest.raises(FileError, match="is no table of targets"):
        read_targets(tmp_path)


def test_commands_leave_what_they_found(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.pt2"
    assert run_command(["export", str(saved), "-o", str(copy), "-q"]) == 0
    assert run_command(["bench", str(saved), "--backends", "eager", "--batch-sizes", "1", "--rounds", "2", "-q"]) == 0
    exported, timed = read_targets(saved)
    assert (exported.tool, exported.file, exported.same, exported.difference) == ("pt2", "copy.pt2", 1.0, 0.0)
    assert exported.stored == copy.stat().st_size
    assert timed.tool == "eager"
    assert timed.milliseconds["1"] > 0
    assert '"copy.pt2"' in (saved / "report.html").read_text()
    sbs_fx.load(saved)
    nothing = tmp_path / "alone"
    nothing.mkdir()
    (nothing / "model.pt2").write_bytes((saved / "model.pt2").read_bytes())
    assert run_command(["export", str(nothing), "-o", str(tmp_path / "again.pt2"), "-q"]) == 0
    assert [p.name for p in nothing.iterdir()] == ["model.pt2"], "no report, nothing to add to"


def test_why_a_plan_is_not_on_the_front() -> None:
    rows = comparison().rows()["points"]
    assert [row["front"] for row in rows] == [False, True, True, False]
    assert rows[0]["reason"].startswith("sbs at bops 5 % has 72.00 % at 20.4 times fewer BOPs, this 70.00 % at 20.0")
    assert rows[1]["reason"] == ""
    assert rows[3]["reason"].startswith("InfeasibleBudget")


@WITH_BROWSER
def test_targets_are_a_table(browser: Browser, tmp_path: Path) -> None:
    rows = [
        TargetRow(tool="onnxruntime", file="m.onnx", stored=2_000_000, kernels="3 of 4", examples=32, same=0.96875,
                  difference=0.012, milliseconds={"1": 1.5, "8": 9.0}),
        TargetRow(tool="openvino", reason="openvino is not installed"),
    ]  # fmt: skip
    targets = [row.model_dump() for row in rows]
    for width, theme in ((1280, "light"), (390, "dark")):
        shown(browser, tmp_path, page(compressed(8), Extras(targets=targets)), width=width, theme=theme)
        assert browser.value("document.documentElement.scrollWidth") <= width
    (first,) = browser.value("[...document.querySelectorAll('#targets tbody tr')].map((r) => r.innerText)")
    assert all(text in first for text in ("onnxruntime", "96.9", "0.012", "1.5", "9", "3 of 4"))
    told = browser.value("document.querySelector('#targets li').innerText")
    assert told == "openvino, not run: openvino is not installed"


@WITH_BROWSER
def test_a_front_is_drawn_and_what_fell_is_told(browser: Browser, tmp_path: Path) -> None:
    text = comparison_page(comparison().rows())
    for width, theme in ((1280, "light"), (390, "dark")):
        shown(browser, tmp_path, text, width=width, theme=theme)
        assert browser.value("document.documentElement.scrollWidth") <= width
    assert panels(browser) == {"front", "points", "rejected"}
    assert browser.value("document.querySelectorAll('#front circle.point').length") == 3
    assert browser.value("document.querySelectorAll('#points tbody tr').length") == 4
    assert "InfeasibleBudget: cannot be met </script>" in browser.value("document.getElementById('rejected').innerText")
    assert browser.value("window.hacked ?? null") is None
    heights = browser.value(
        "[...document.querySelectorAll('#front circle.point')].map((c) => Number(c.getAttribute('cy')))"
    )
    assert heights[1] < heights[0] < heights[2], "the more accurate, the higher"
