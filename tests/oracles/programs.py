"""Everything that holds of a network, on one with several inputs and outputs; see `agreement` for those of one.

In: a program. Out: what was checked, by name. Holds: each check has two independent ways to the same answer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor, fx, nn

import sbs_fx
from sbs_fx.export import runner
from sbs_fx.export.runtime import flat
from sbs_fx.passes import ChannelGroups, channel_groups, cost_model, finalize, slim, trace
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.passes.graph import attribute, copy_graph
from sbs_fx.passes.oracles.slimming import compare_slim, relative_error
from sbs_fx.passes.oracles.static import compare_static, count_levels
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import BackendError, InfeasibleBudget
from tests.networks.programs import Program
from tests.oracles.agreement import NODE_TOLERANCE, cast, random_plan

aten = torch.ops.aten
BUDGET = 0.3
TIES = 1e-3  # share of codes that fall on the other side of a tie
# Statistics over channels: a zeroed coordinate counts in them, a coordinate that is gone does not.
_STATISTICS = {aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default}


def check_program(program: Program, seed: int, *, whole: bool = True) -> list[str]:
    """Assert all equalities; `whole`: those of `compress` too."""
    graph = trace(program, program.example(2))
    done = ["trace"]
    with torch.no_grad():
        for batch in (1, 3):
            inputs = program.example(batch, seed)
            assert_equal(graph(*inputs), program(*inputs))
    exact = cast(graph, torch.float64)
    groups = channel_groups(exact)
    plan = random_plan(groups, Random(seed))
    inputs = tuple(x.double() for x in program.example(3, seed))
    slimmed = slim(exact, groups, plan)
    report = compare_slim(exact, groups, plan, inputs, slimmed=slimmed)
    assert report.worst_error <= NODE_TOLERANCE, f"{report}; first {report.first_above(NODE_TOLERANCE)}"
    done.append("slim = masked")
    if not any(node.target in _STATISTICS for node in exact.graph.nodes):
        with torch.no_grad():
            expected, found = flat(zeroed(exact, groups, plan)(*inputs)), flat(slimmed(*inputs))
        assert max(relative_error(b, a) for a, b in zip(expected, found, strict=True)) <= NODE_TOLERANCE
        done.append("slim = zeroed")
    cost = cost_model(graph, channel_groups(graph))
    small = slim(graph, channel_groups(graph), plan)
    again = cost_model(small, channel_groups(small)).reference
    evaluated = cost.evaluate(Plan({name: tuple(kept) for name, kept in plan.items()}))
    assert (evaluated.macs, evaluated.params) == (again.macs, again.params)
    done.append("price")
    return done + (check_compressed(program, seed) if whole else [])


def check_compressed(program: Program, seed: int) -> list[str]:
    example = program.example(2)
    try:
        result = sbs_fx.compress(program, example, budget=BUDGET)
    except InfeasibleBudget:
        return ["out of reach"]
    assert sbs_fx.Budget.of(BUDGET).is_satisfied_by(result.cost)
    done, inputs = ["budget"], program.example(3, seed)
    # reason: joins on integer grids round where the gated graph does not; what `finalize` alone gives is compared
    static = finalize(result.gated)
    rows = compare_static(result.gated, static, inputs)
    assert all(row.largest_step <= 1 for row in rows), rows
    assert sum(row.differing for row in rows) <= max(2, TIES * sum(row.positions for row in rows)), rows
    assert all(count.is_real for count in count_levels(static, inputs))
    done.append("static")
    with tempfile.TemporaryDirectory() as directory:
        result.save(directory)
        loaded = sbs_fx.load(Path(directory) / "model.pt2")
    with torch.no_grad():
        assert_equal(loaded(*inputs), result.model(*inputs))
    done.append("saved")
    try:
        ready = runner(result.model, example, "onnxruntime")
    except BackendError as error:
        if "another function" in str(error):
            raise
        return [*done, "not in ONNX Runtime"]
    with torch.no_grad():
        for a, b in zip(flat(ready(*inputs)), flat(result.model(*inputs)), strict=True):
            assert float((a - b).norm() / b.norm().clamp_min(1e-9)) < 0.1
    return [*done, "ONNX Runtime"]


def zeroed(graph: fx.GraphModule, groups: ChannelGroups, plan: dict[str, list[int]]) -> nn.Module:
    """The whole graph with zeros in every parameter and buffer wherever it meets a coordinate that is dropped."""
    result, slices = copy_graph(graph), Slices(groups, plan)
    with torch.no_grad():
        for name, types in groups.inference.tensors.items():
            value = attribute(result, name)
            for dim, of_dim in enumerate(types):
                if slices.changed(of_dim):
                    gone = torch.ones(value.shape[dim], dtype=torch.bool)
                    gone[slices.index(of_dim)] = False
                    value.data.index_fill_(dim, gone.nonzero().flatten(), 1.0 if name.endswith("running_var") else 0.0)
    return result


def assert_equal(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> None:
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(a, b), float((a - b).abs().max())
