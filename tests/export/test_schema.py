"""A file written and read without `torch.export`: the same as through it, on programs of every kind."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import sbs_fx
from sbs_fx.export import load_pt2, pt2
from sbs_fx.export.packing import pack
from sbs_fx.export.program_members import program_members
from sbs_fx.export.schema import read_graph
from sbs_fx.passes.capture.export import quiet_torch
from tests.networks.programs import Program

GRAPH = "models/model.json"


def values(members: dict[str, bytes]) -> Counter[str]:
    """Sizes and dtypes of all values; symbols and strides are each writer's own."""
    table = json.loads(members[GRAPH])["graph_module"]["graph"]["tensor_values"].values()
    return Counter(re.sub(r"'s\d+'", "s", json.dumps([row["dtype"], row["sizes"]])) for row in table)


def said(members: dict[str, bytes]) -> Any:
    program = json.loads(members[GRAPH])
    nodes = Counter(row["target"] for row in program["graph_module"]["graph"]["nodes"])
    ranges = [*program["range_constraints"].values()]
    return nodes, program["graph_module"]["module_call_graph"][0]["signature"], ranges, program["verifiers"]


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_written_and_read_as_torch_does(steps: int) -> None:
    program = Program(steps, 10 + steps)
    result = sbs_fx.compress(program, program.example(2), budget=0.5, method="uniform")
    packed, x = pack(result.model), program.example(3)
    with quiet_torch():
        written = program_members(packed, result.example_inputs)
        captured = pt2._captured(packed, result.example_inputs)
        assert written is not None
        assert values(written) == values(captured)
        assert said(written) == said(captured)
        expected = pytree.tree_leaves(result.model(*x))
        for members in (written, captured):
            read = read_graph(members)
            assert read is not None
            for model in (read, torch.export.load(pt2.archive_of(members)).module()):
                for a, b in zip(pytree.tree_leaves(model(*x)), expected, strict=True):
                    assert torch.equal(a.nan_to_num(), b.nan_to_num())


class _Parts(nn.Module):
    """Several results of one operator, arithmetic on sizes, named outputs, numbers among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        a, b = torch.relu(self.conv(x)).chunk(2, 1)
        flat = (a * b.sigmoid()).permute(0, 2, 3, 1).reshape(x.shape[0] * x.shape[2], -1, 8)
        return {"logits": self.head(flat).unflatten(0, (x.shape[0], -1)), "parts": [a.amax((2, 3)), None]}


def test_parts_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 8, 8)
    result = sbs_fx.compress(_Parts(), x, budget=0.5, method="uniform")
    monkeypatch.setattr(pt2, "_captured", lambda *_: pytest.fail("torch captured the graph again"))
    result.save(tmp_path)
    by_torch = torch.export.load(tmp_path / "model.pt2").module()
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch read the file"))
    loaded = load_pt2(tmp_path / "model.pt2")
    y = torch.randn(5, 3, 8, 8)
    for model in (loaded, by_torch):
        assert torch.equal(model(y)["logits"], result.model(y)["logits"])
        assert torch.equal(model(y)["parts"][0], result.model(y)["parts"][0])


def test_inputs_of_another_size_are_captured_again() -> None:
    """What was fixed when the model was traced is what the example inputs have."""
    result = sbs_fx.compress(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(2, 3, 8, 8), budget=0.5, method="uniform"
    )
    assert program_members(pack(result.model), (torch.randn(2, 3, 6, 6),)) is None
    assert program_members(pack(result.model), (torch.randn(2, 3, 8, 8),)) is not None
    assert program_members(pack(result.model), ()) is None
    assert not pt2._captured(pack(result.model), (torch.randn(2, 3, 6, 6),))["data/sample_inputs/model.pt"]
