"""Every public name has an example that runs.

In examples `net` is a small network of four classes, `images` two images for it, `batches` an iterable of (images,
labels), `graph`, `groups`, `cost` and `problem` what the passes make of it, `result` what `compress` does, saved in
"out", and `measured` the same by a method that keeps its losses.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sbs_fx
from sbs_fx.export import BACKENDS, TARGETS
from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.passes.channels.facts import FACTS
from sbs_fx.passes.channels.inference import RULES, load_rules
from sbs_fx.search import Problem, TwoStage
from sbs_fx.search.registry import METHODS

MODULES = ("sbs_fx", "sbs_fx.passes", "sbs_fx.search", "sbs_fx.export", "sbs_fx.plan", "sbs_fx.training")
PUBLIC = {
    f"{module}.{name}": value
    for module in MODULES
    for name in importlib.import_module(module).__all__
    if callable(value := getattr(importlib.import_module(module), name))
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    importlib.import_module("sbs_fx.training")
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    images = torch.randn(2, 3, 16, 16)
    graph = trace(net, images)
    groups = channel_groups(graph)
    cost = cost_model(graph, groups)
    batches = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 4)]
    quick = sbs_fx.Config(two_stage=TwoStage(images=8, measured=1, rounds=0))
    return {
        **vars(sbs_fx),
        **{name.rpartition(".")[2]: value for name, value in PUBLIC.items()},
        "sbs_fx": sbs_fx,
        "torch": torch,
        "BACKENDS": BACKENDS,
        "TARGETS": TARGETS,
        "net": net,
        "images": images,
        "batches": batches,
        "graph": graph,
        "groups": groups,
        "cost": cost,
        "problem": Problem.of(cost, sbs_fx.Budget(bops=0.05), (images,)),
        "result": sbs_fx.compress(net, images, budget="5%"),
        "measured": sbs_fx.compress(net, images, budget="5%", data=batches, method="two_stage", config=quick),
    }


@pytest.fixture
def registries() -> Iterator[None]:
    METHODS.entries(), TARGETS.entries(), load_rules()
    tables: list[dict[Any, Any]] = [METHODS._entries, TARGETS._entries, BACKENDS._entries, RULES, FACTS]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(
    name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None
) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    example = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    assert example.examples, f"{name} has no example"
    monkeypatch.chdir(tmp_path)
    if '"out' in text:
        names["result"].save("out")
    told: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=told.append, clear_globs=False)
    assert not told, "".join(told)
