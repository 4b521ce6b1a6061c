"""A package of somebody else's adds a method, an export target and an operator's rule, one file each, and finds them in
`compress`, help and reports; one that is broken is an error that names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sbs_fx

METHOD = """
from sbs_fx.search import SearchResult, method

@method("thirds", help="the least of everything", needs="nothing")
def thirds(problem, run):
    problem.check_feasible("thirds")
    return SearchResult(problem.space.least, notes=("nothing was searched",))
"""
TARGET = """
from pathlib import Path
from sbs_fx.export import Runner, target

@target("listing", suffix=".txt", help="the graph as text", options=("loud",))
def listing(static, inputs, path, options):
    text = str(static.graph)
    Path(path).write_text(text.upper() if options.get("loud") else text)
    return Runner("listing", static)
"""
RULE = """
import torch
from sbs_fx.passes import Facts, Term, keeps, rule

@torch.library.custom_op("somebody::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

@double.register_fake
def _(x):
    return torch.empty_like(x)

@rule(torch.ops.somebody.double.default, facts=Facts(keeps(0), elementwise=True))
def _double(t, node):
    return t[node.args[0]]

@torch.library.custom_op("somebody::project", mutates_args=())
def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T

@project.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])

@rule("somebody::project", facts=Facts())
def _project(t, node):
    x, weight = t[node.args[0]], t[node.args[1]]
    t.unify(node, x[1], weight[1])
    batch, width = node.meta["val"].shape[0], weight[1].size
    operands = ((0,), (1,))
    t.layer(node, "linear", Term(((x[0], batch), (weight[0], weight[0].size), (weight[1], width)), operands))
    return x[0], weight[0]
"""
CALLS = """
import sys
import torch, sbs_fx
from torch import nn
from somebody import rule

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Linear(24, 4)
        self.weight = nn.Parameter(torch.randn(24, 32))

    def forward(self, x):
        x = torch.ops.somebody.double(self.first(x).relu())
        x = torch.ops.somebody.project(self.second(x).relu().mean((2, 3)), self.weight)
        return self.last(x.relu())

x = torch.randn(2, 3, 12, 12)
result = sbs_fx.compress(Net().eval(), x, method="thirds", budget=0.1)
assert result.policy.method == result.report.method == "thirds"
assert "note: nothing was searched" in str(result.report)
assert not result.report.unknown_operators
assert len(result.policy.kept["first.weight:0"]) < 32, "the rule lets channels through"
rows = {row.name: row.macs for row in result.baseline_cost.layers}
assert rows["weight (project)"] == 32 * 24, rows

from sbs_fx.passes import channel_groups, trace
from sbs_fx.passes.oracles.slimming import compare_slim
graph = trace(Net().double().eval(), x.double())
groups = channel_groups(graph)
assert "weight:0" in groups
kept = {name: list(range(0, group.size, 2)) for name, group in groups.items()}
report = compare_slim(graph, groups, kept, [x.double()])
assert report.worst_error < 1e-10 < report.differs_from_dense, report

runner = result.export("listing", sys.argv[1] + "/a.txt", loud=True)
assert runner.name == "listing" and "CONV2D" in open(sys.argv[1] + "/a.txt").read()
try:
    result.export("lisitng", sys.argv[1] + "/a.txt")
except sbs_fx.SbsError as error:
    assert "did you mean 'listing'" in str(error), error
from sbs_fx.cli import main
main(["methods"])
"""


def package(folder: Path, **files: str) -> dict[str, str]:
    """A package `somebody` with its entry points, as pip would have installed it; the environment that finds it."""
    (folder / "somebody").mkdir()
    (folder / "somebody" / "__init__.py").write_text("")
    points = ""
    for name, text in files.items():
        (folder / "somebody" / f"{name}.py").write_text(text)
        points += f"[sbs_fx.{name}s]\n{name} = somebody.{name}\n"
    information = folder / "somebody-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(points)
    path = os.pathsep.join([str(folder), str(Path(sbs_fx.__file__).parents[1])])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def test_a_method_a_target_and_a_rule_of_another_package(tmp_path: Path) -> None:
    environment = package(tmp_path, method=METHOD, target=TARGET, rule=RULE)
    done = subprocess.run([sys.executable, "-c", CALLS, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if "thirds" in line)
    assert "the least of everything" in row
    assert "nothing" in row


@pytest.mark.parametrize(
    ("files", "call", "message"),
    [
        (
            {"method": "import not_there"},
            "sbs_fx.compress('resnet18')",
            "MethodError: 'method' of another package cannot be loaded",
        ),
        (
            {"method": METHOD.replace("thirds", "opq")},
            "sbs_fx.compress('resnet18')",
            "MethodError: there are two methods of the name 'opq'",
        ),
        (
            {"rule": "import not_there"},
            "import torch; sbs_fx.passes.trace(torch.nn.Linear(2, 2), torch.ones(2, 2))",
            "GraphError: 'rule' of another package cannot be loaded",
        ),
    ],
)
def test_a_package_that_is_broken_is_named(tmp_path: Path, files: dict[str, str], call: str, message: str) -> None:
    environment = package(tmp_path, **files)
    done = subprocess.run(
        [sys.executable, "-c", f"import sbs_fx, sbs_fx.passes; {call}"], env=environment, capture_output=True, text=True
    )
    assert done.returncode
    assert message in done.stderr


def test_the_table_of_methods_is_the_registry() -> None:
    from sbs_fx.search.registry import methods

    text = (Path(sbs_fx.__file__).parents[1] / "docs" / "methods.md").read_text()
    for entry in methods().values():
        needs = f"{entry.needs}{', training' if entry.trains else ''}"
        assert f"| `{entry.name}` | {entry.help} | {needs} | {entry.automatic or ''} |" in text
