"""Metrics files that were cut short, the panel and the lines of a running training, the tables of a finished one."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from sbs_fx.plan.errors import FileError
from sbs_fx.report import monitor as monitor_module
from sbs_fx.report.curves import clock, panel, training_lines
from sbs_fx.report.monitor import DECAY, LiveMonitor, MetricsFile, PlainMonitor, monitor, read_metrics, together
from sbs_fx.training.progress import Progress

MEASURES: dict[str, Any] = {
    "bops": 0.0162,
    "size": 0.11,
    "budget": {"bops": 0.015},
    "pruned": 0.234,
    "multiplier": {"bops": 0.12345},
    "weight_bits": {2: 12, 8: 4},
    "activation_bits": {4: 10, 32: 1},
}


def _step(step: int, loss: float = 1.0, *, epoch: int = 0, steps: int | None = 10, **others: Any) -> Progress:
    values: dict[str, Any] = {"stage": "fine-tune", "epochs": 2, "rate": 0.05, "images": 8, **others}
    return Progress(epoch=epoch, step=step, steps=steps, loss=loss, **values)


class _Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    hand = _Clock()
    monkeypatch.setattr(monitor_module, "time", SimpleNamespace(monotonic=hand.monotonic))
    return hand


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_gives_back_every_field_and_the_seconds(tmp_path: Path, hand: _Clock) -> None:
    steps = [_step(1, 0.1 + 0.2, accuracy=50.0), _step(2, validation=61.5, measures=MEASURES, steps=None)]
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for step in steps:
            hand.now += 1.5
            file(step)
            assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == step.step  # flushed before it is closed
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found == [{**asdict(step), "seconds": 1.5 * (index + 1)} for index, step in enumerate(steps)]


def test_two_sittings_with_a_cut_line_read_as_one_run(tmp_path: Path) -> None:
    """Wherever the kill cut the last line, the steps are those of a run that was never interrupted."""
    whole, path = tmp_path / "whole", tmp_path / "metrics"
    with MetricsFile(whole) as file:
        for step in range(1, 6):
            file(_step(step, measures=MEASURES))
    text = whole.read_bytes()
    last = len(text) - text.rindex(b"\n", 0, len(text) - 1) - 1
    for cut in range(last + 1):
        path.write_bytes(text[: len(text) - cut])
        # a line that lost only its end of line is whole; one that is cut is dropped
        assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3, 4] + [5] * (cut < 2)
        with MetricsFile(path) as file:  # the checkpoint was of step 3
            for step in range(4, 9):
                file(_step(step, loss=2.0, measures=MEASURES))
        found = read_metrics(path)
        assert [(entry["step"], entry["loss"]) for entry in found] == [(s, 1.0 + (s > 3)) for s in range(1, 9)]
        assert all(entry["measures"] == MEASURES for entry in found)


def test_seconds_go_on_in_the_second_sitting(tmp_path: Path, hand: _Clock) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in range(1, 1001):  # longer than the part of the file that is looked at
            hand.now += 1
            file(_step(step, measures=MEASURES))
    with path.open("ab") as raw:
        raw.write(b'{"stage": "fine-tune", "step": 1001, "secon')
    hand.now += 5000
    with MetricsFile(path) as file:
        hand.now += 1
        file(_step(1001))
    assert [entry["seconds"] for entry in read_metrics(path)] == [float(second) for second in range(1, 1002)]


def test_stages_come_as_they_began_and_unreadable_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for stage, step in (("search", 2), ("search", 1), ("fine-tune", 1), ("search", 2), ("fine-tune", 2)):
            file(_step(step, stage=stage))
    with path.open("ab") as raw:
        raw.write(b'\0\0\0\n[1]\n3\n"measures"\nnull\n{}\n{"measures": {}}\n\xff\n{"measures": 1}\n\n')
    found = [(entry["stage"], entry["step"]) for entry in read_metrics(path)]
    assert found == [("search", 1), ("search", 2), ("fine-tune", 1), ("fine-tune", 2)]


def test_numbers_of_numpy_and_torch_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file(_step(1, np.float32(0.5), measures={"bops": torch.tensor(0.25), "weight_bits": {2: np.int64(3)}}))
    (entry,) = read_metrics(path)
    assert (entry["loss"], entry["measures"]) == (0.5, {"bops": 0.25, "weight_bits": {2: 3}})
    assert json.loads(path.read_text())["step"] == 1


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "metrics.jsonl"):
        with pytest.raises(FileError, match=re.escape(repr(str(path)))):
            MetricsFile(path)
        with pytest.raises(FileError, match=re.escape(repr(str(path)))):
            read_metrics(path)


# -- averages, speed, time left ----------------------------------------------------------------------------------------


def _facts(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split()[1:])


def test_averages_are_those_of_a_plain_computation(hand: _Clock) -> None:
    """The loss from the definition of an exponential average, the accuracy from the images of the epoch."""
    draw, lines = np.random.default_rng(0), list[str]()
    losses = draw.uniform(0, 3, 40)
    images = draw.integers(1, 9, 40)
    right = np.minimum(draw.integers(0, 9, 40), images)
    watch = PlainMonitor(lines.append, every=0)
    for index in range(40):
        accuracy = None if index % 7 == 3 else 100 * right[index] / images[index]
        watch(_step(index + 1, losses[index], epoch=index // 20, accuracy=accuracy, images=int(images[index])))
        weights = DECAY ** np.arange(index, -1, -1)
        seen = [i for i in range(index // 20 * 20, index + 1) if i % 7 != 3]
        facts = _facts(lines[-1])
        assert facts["loss"] == f"{(weights * losses[: index + 1]).sum() / weights.sum():.4f}"
        assert facts["training"] == f"{100 * right[seen].sum() / images[seen].sum():.2f}%"
    assert len(lines) == 40


@pytest.mark.parametrize("burst", [1, 20])
def test_speed_leaves_validation_out_and_time_left_counts_it(hand: _Clock, burst: int) -> None:
    """32 images in half a second, ten seconds of validation after each 100 steps; an accelerator tells of 20 steps at
    once, after it has done them."""
    lines: list[str] = []
    watch = PlainMonitor(lines.append, every=0)
    for step in range(1, 601):
        if step % burst == 0:
            hand.now += 0.5 * burst + 10 * (step % 100 == 0)
            for told in range(step - burst + 1, step + 1):
                watch(_step(told, steps=1000, images=32, epoch=(told - 1) // 100, epochs=10))
    facts = _facts(lines[-1])
    assert facts["images/s"] == "64"
    hours, minutes, seconds = map(int, facts["time_left"].split(":"))
    # reason for the tolerance: of six epochs measured, the steps told first were not timed
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(400 * 0.5 + 4 * 10, rel=0.05)


def test_what_is_unknown_is_a_dash(hand: _Clock) -> None:
    lines: list[str] = []
    watch = PlainMonitor(lines.append, every=0)
    for step in (1, 2):
        watch(_step(step, steps=None, images=0))
        hand.now += 1
    assert lines[1] == (
        "fine-tune epoch=1/2 step=2/- loss=1.0000 training=- validation=- learning_rate=0.05 images/s=- time_left=-"
    )


def test_clock() -> None:
    assert [clock(x) for x in (0.0, 59.6, 3723.4, 100 * 3600)] == ["0:00:00", "0:01:00", "1:02:03", "100:00:00"]


# -- plain lines -------------------------------------------------------------------------------------------------------


def test_a_line_has_all_facts_of_a_search(hand: _Clock) -> None:
    lines: list[str] = []
    watch = PlainMonitor(lines.append)
    watch(_step(1, 1.5, stage="search", accuracy=25.0, measures=MEASURES))
    hand.now += 12
    watch(_step(2, 1.5, stage="search", accuracy=75.0, validation=61.5))  # not measured: the last measures stay
    assert lines[1] == (
        "search epoch=1/2 step=2/10 loss=1.5000 training=50.00% validation=61.50% learning_rate=0.05 images/s=1 "
        "time_left=0:01:36 bops=1.62% size=11.00% pruned=23.40% bops_budget=1.50% bops_multiplier=0.123 "
        "weight_bits=2:12,8:4 activation_bits=4:10,32:1"
    )


def _written(steps: list[Progress], hand: _Clock, seconds: float) -> list[str]:
    lines: list[str] = []
    with PlainMonitor(lines.append) as watch:
        for step in steps:
            watch(step)
            hand.now += seconds
    return [f"{line.split()[0]} {_facts(line)['step']}" for line in lines]


def test_lines_come_every_ten_seconds_and_at_the_end_of_an_epoch(hand: _Clock) -> None:
    steps = [_step(s, epoch=(s - 1) // 5) for s in range(1, 11)]
    # by the clock 1, 5, 9 at 3 seconds a step; 5 ends an epoch and is not written twice; 10 is the last
    assert _written(steps, hand, 3.0) == ["fine-tune 1/10", "fine-tune 5/10", "fine-tune 9/10", "fine-tune 10/10"]
    assert _written(steps, hand, 0.0) == ["fine-tune 1/10", "fine-tune 5/10", "fine-tune 10/10"]
    assert _written(steps, hand, 10.0) == [f"fine-tune {s}/10" for s in range(1, 11)]


def test_ends_are_seen_without_a_length(hand: _Clock) -> None:
    """By validation, by the next epoch, by the next stage, by the end of it all."""
    endless = [_step(s, epoch=(s - 1) // 3, steps=None) for s in range(1, 9)]
    judged = [replace(step, validation=50.0 if step.step == 3 else None) for step in endless[:5]]
    assert _written(endless, hand, 0.0) == [f"fine-tune {s}/-" for s in (1, 3, 6, 8)]
    assert _written(judged, hand, 0.0) == [f"fine-tune {s}/-" for s in (1, 3, 5)]
    both = [replace(step, stage="search") for step in endless[:2]] + endless[:2]
    assert _written(both, hand, 0.0) == ["search 1/-", "search 2/-", "fine-tune 2/-"]


def test_averages_begin_anew_with_a_stage(hand: _Clock) -> None:
    lines: list[str] = []
    watch = PlainMonitor(lines.append, every=0)
    for step in (_step(1, 9.0, stage="search", validation=10.0, measures=MEASURES), _step(1, 2.0), _step(1, 3.0)):
        watch(step)
    assert [_facts(line)["loss"] for line in lines] == ["9.0000", "2.0000", "3.0000"]
    assert _facts(lines[1])["validation"] == "-"
    assert "bops" not in _facts(lines[1])


# -- the panel ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def screen() -> Console:
    # reason: a terminal whatever the environment of the tests says; ANSI codes stay out of `export_text`
    return Console(record=True, width=100, file=io.StringIO(), force_terminal=True, _environ={})


def _frames(screen: Console) -> list[str]:
    return screen.export_text().split("╭─")[1:]


def test_the_panel_holds_the_numbers(screen: Console, hand: _Clock) -> None:
    with LiveMonitor(screen) as watch:
        watch(_step(1, 1.5, stage="search", accuracy=25.0, measures=MEASURES))
        hand.now += 12
        watch(_step(2, 1.5, stage="search", accuracy=75.0, validation=61.5))
    last = " ".join(_frames(screen)[-1].replace("│", " ").split())
    for text in (
        "search",
        "epoch 1/2 step 2/10",
        "20 %",
        "loss 1.5000 training 50.00 % validation 61.50 %",
        "learning rate 0.05 images/s 1 time left 0:01:36",
        "bops 1.62 % of float, budget 1.50 %, multiplier 0.123 size 11.00 % of float pruned 23.40 % of the channels",
        f"bits weights activations 2 {'█' * 18} 12 4 {'█' * 22} 10 8 {'█' * 6} 4 32 {'█' * 3} 1",
    ):
        assert text in last
    assert "━" in last


def test_no_bar_without_a_length(screen: Console) -> None:
    with LiveMonitor(screen) as watch:
        for step in (1, 2, 3):
            watch(_step(step, steps=None))
    last = _frames(screen)[-1]
    assert "step 3/- " in last
    assert "━" not in last
    assert "time left -" in last


def test_a_stage_that_ends_leaves_a_line(screen: Console) -> None:
    with LiveMonitor(screen) as watch:
        watch(_step(10, 3.0, stage="search", measures=MEASURES))
        watch(_step(1, 2.0))
    text = screen.export_text()
    assert text.count("search epoch=1/2 step=10/10 loss=3.0000") == 1
    assert text.split("╭─")[-1].startswith(" fine-tune ")


def test_the_panel_is_drawn_at_most_four_times_a_second(screen: Console) -> None:
    begin = time.monotonic()
    with LiveMonitor(screen) as watch:
        for step in range(1, 400):
            watch(_step(step, steps=400))
            time.sleep(0.002)
    assert 2 <= len(_frames(screen)) <= 4 * (time.monotonic() - begin) + 1  # and once at the end


def test_nothing_is_drawn_without_a_step(screen: Console) -> None:
    with LiveMonitor(screen):
        pass
    assert screen.export_text() == ""


def test_bars_are_ascii_where_the_terminal_is() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with LiveMonitor(Console(width=80, file=file, force_terminal=True, _environ={})) as watch:
        watch(_step(1, measures=MEASURES))
    file.flush()
    assert b"##" in file.buffer.getvalue()  # type: ignore[attr-defined]


# -- the choice --------------------------------------------------------------------------------------------------------


def test_a_terminal_gets_the_panel_and_all_else_lines_on_stderr(
    screen: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(monitor(screen), LiveMonitor)
    for console in (
        Console(file=io.StringIO(), force_terminal=False),
        Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}),
    ):
        with monitor(console) as watch:
            watch(_step(1))
        out, err = capsys.readouterr()
        assert isinstance(watch, PlainMonitor)
        assert out == ""
        assert err.startswith("fine-tune epoch=1/2 step=1/10 ")
        assert err.endswith("\n")


def test_together_tells_all_in_order() -> None:
    told: list[tuple[str, int]] = []
    tell = together(lambda p: told.append(("first", p.step)), lambda p: told.append(("second", p.step)))
    for step in (1, 2):
        tell(_step(step))
    assert told == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    together()(_step(1))


# -- the finished run --------------------------------------------------------------------------------------------------


def _run() -> Iterator[tuple[float, Progress]]:
    """A search whose cost falls from 100 to 1.5 % and a fine-tuning, with the seconds since the beginning."""
    for s in range(1, 41):
        share = 0.015 + 0.985 * (40 - s) / 39
        measures = {"bops": share, "macs": 0.5, "budget": {"bops": 0.015}, "weight_bits": {2: s}} if s != 2 else {}
        epoch, validation = (s - 1) // 20, {20: 60.0, 40: 55.0}.get(s)
        yield 2.0 * s, _step(s, 4 - s / 10, epoch=epoch, steps=40, stage="search", accuracy=s + 0.0, images=8,
                             validation=validation, measures=measures)  # fmt: skip
    for s in range(1, 5):
        yield 80 + 300.4 * s, _step(s, 0.5, epoch=0, steps=8)


def test_the_table_of_a_finished_run(tmp_path: Path, hand: _Clock) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for seconds, step in _run():
            hand.now = 1000 + seconds
            file(step)
    # the search: mean of 3.9 ... 3.6 and of 0.3 ... 0; mean accuracy of steps 21 to 40; the best is not the last;
    # shares of steps 1, 11, 21, 30, 40, such as 0.015 + 0.985 * 29 / 39 = 0.7474, step 2 having none
    assert training_lines(read_metrics(tmp_path / "metrics.jsonl")) == [
        "  stage      epochs  steps  first loss  last loss  training     best  validation  seconds",
        "  search        2/2     40      3.7500     0.1500   30.50 %  60.00 %     55.00 %       80",
        "  fine-tune     1/2      4      0.5000     0.5000         -        -           -    1,202",
        "",
        "  share of float     first     25 %     50 %     75 %     last  budget",
        "  search bops     100.00 %  74.74 %  49.49 %  26.76 %   1.50 %  1.50 %",
        "  search macs      50.00 %  50.00 %  50.00 %  50.00 %  50.00 %",
    ]


def test_no_metrics_no_lines() -> None:
    assert training_lines([]) == []


def test_a_histogram_shows_even_one_tensor_of_thousands() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    facts = dict.fromkeys(("epoch", "step", "loss", "training", "validation", "learning_rate", "images/s"), "1")
    console.print(panel("search", facts, 0.5, {"weight_bits": {2: 1, 8: 5000}}, "#"))
    text = console.export_text()
    assert re.search(r"2   # 1 ", text)
    assert re.search(r"8   #{24} 5000 ", text)
