"""The report adds up, names what it should, and comes back from JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sbs_fx.passes import ChannelGroups, CostModel
from sbs_fx.plan import Budget, Policy
from sbs_fx.plan.errors import FileError
from sbs_fx.report import Report
from sbs_fx.report.text import closing_table, columns
from sbs_fx.search import Run, uniform
from tests.oracles.problems import cost_of, problem_of

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Two convs and a head; `unknown` adds an operator that no rule knows."""

    def __init__(self, unknown: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 5)
        self.unknown = unknown

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        if self.unknown:
            x = torch.renorm(x, 2, 1, 1.0)
        return self.head(self.second(x).mean((2, 3)))


def _analysed(unknown: bool = False) -> tuple[ChannelGroups, CostModel]:
    cost = cost_of(Small(unknown), IMAGES)
    return cost.groups, cost


def _planned() -> tuple[Report, Policy]:
    groups, cost = _analysed()
    problem = problem_of(cost, IMAGES, Budget(bops=0.02), weight_bits=8, activation_bits=8, round_to=4)
    plan = uniform(problem, Run()).plan
    policy = problem.policy(plan, "uniform")
    return Report.of(groups, cost, policy, cost.evaluate(plan)), policy


def test_layers_add_up_to_the_cost() -> None:
    report, _ = _planned()
    assert sum(row.bops for row in report.layers) == report.cost.bops
    assert sum(row.macs for row in report.layers) == report.cost.macs
    assert [row.bops for row in report.layers] == sorted((row.bops for row in report.layers), reverse=True)


def test_channels_and_groups_follow_the_policy() -> None:
    report, policy = _planned()
    assert {row.name: row.kept for row in report.groups} == {name: len(kept) for name, kept in policy.kept.items()}
    assert any(row.kept < row.size for row in report.groups)
    first = next(row for row in report.layers if row.name.startswith("first"))
    assert (first.channels, first.channels_before) == (len(policy.kept["first.weight:0"]), 16)
    assert (first.weight_bits, first.activation_bits) == (8, 8)


def test_totals_before_and_after() -> None:
    report, _ = _planned()
    reference = report.cost.reference
    assert reference is not None
    totals = {name: (before, after) for name, before, after in report.with_accuracy(90.0, 89.5).totals()}
    assert totals["BOPs"] == (reference.bops, report.cost.bops)
    assert totals["MACs"] == (8 * 8 * (3 * 9 * 16 + 16 * 32) + 32 * 5, report.cost.macs)
    assert totals["accuracy %"] == (90.0, 89.5)
    assert closing_table(report).row_count == 4


def test_a_float_model_has_one_column() -> None:
    groups, cost = _analysed()
    report = Report.of(groups, cost, None, cost.reference)
    assert report.method is None
    assert all(after is None for _, _, after in report.totals())
    assert "after" not in str(report)
    assert report.prunable_share == 1.0
    assert [(row.kept, row.size) for row in report.groups] == [(32, 32), (16, 16)]


def test_pins_are_channels_with_their_causes() -> None:
    groups, cost = _analysed()
    pins = {row.cause: row for row in Report.of(groups, cost, None, cost.reference).pins}
    assert pins.keys() == {"model input", "model output"}, "kernel positions are no channels"
    assert pins["model input"].channels == 3
    assert pins["model output"].sides == ("head (linear): out",)


def test_an_operator_without_a_rule_comes_first() -> None:
    groups, cost = _analysed(unknown=True)
    report = Report.of(groups, cost, None, cost.reference)
    assert list(report.unknown_operators) == ["aten.renorm.default"]
    assert str(report).startswith("!! operator without a rule: aten.renorm.default")
    pinned = {row.cause: row.sides for row in report.pins}
    assert pinned["renorm: operator without a rule"] == ("first (conv2d): out",)


def test_text_names_layers_groups_and_pins() -> None:
    report, _ = _planned()
    text = str(report)
    for expected in ("before", "BOPs", "first (conv2d)", "first.weight:0", "model input"):
        assert expected in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_json_comes_back_equal(tmp_path: Path) -> None:
    report = _planned()[0].with_accuracy(90.0, 89.5)
    assert Report.from_json(report.to_json()) == report
    report.save(tmp_path / "report.json")
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    report.save(tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text() == str(report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.txt"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"method": 3}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(FileError, match="no whole report|report is|report was altered"):
        Report.from_json(text)


def test_a_truncated_report_is_refused() -> None:
    text = _planned()[0].to_json()
    assert json.loads(text)["method"] == "uniform"
    with pytest.raises(FileError):
        Report.from_json(text[:-20])


def test_columns_align() -> None:
    lines = columns(["name", "n"], [["a", "1"], ["long", "100"]], left=1)
    assert lines == ["  name    n", "  a       1", "  long  100"]
