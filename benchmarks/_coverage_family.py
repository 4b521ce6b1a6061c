"""The whole way, on one real model: compress, save, load, run; every pass timed; every equality checked.

In: a task; it expects a process of its own, since it reports peak memory. Out: a row of plain data whose `outcome` is
"ok" or the first error. A stage that fails does not stop the next one, so that a row says as much as it can.
"""

from __future__ import annotations

import copy
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _coverage_graph import count_error, describe_groups, first_line, random_plan, timed, to_meta
from _coverage_models import Task
from _coverage_weights import randomise
from _unchanged import difference, state
from torch import fx
from torch.utils import _pytree as pytree

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.compression import compress
from sbs_fx.export import load_pt2
from sbs_fx.models import create_model, example_inputs
from sbs_fx.passes import channel_groups, cost_model, finalize, insert_gates, slim, trace
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.gates.insertion import apply_bits
from sbs_fx.passes.oracles.slimming import compare_slim
from sbs_fx.passes.oracles.static import compare_static, count_levels
from sbs_fx.plan import Budget, Plan

BUDGET = Budget(bops=0.10)
RUN_BATCH = 3  # not the batch that is exported
LARGE = 150_000_000  # parameters of a model from which on one image is run: most of the time goes into these runs
SLIM_TOLERANCE = 1e-10  # of float64; errors of wrong indices are 1e-3 and more
OUTPUT_TOLERANCE = 1e-5  # of float32; beyond it the row is marked as badly conditioned, not as wrong
CODE_TOLERANCE = 1e-4  # share of codes that may differ by a step: rounding ties after batch norm is folded
JOINS_TOLERANCE = 0.2  # of the output's norm
FILE_SLACK = 200_000  # bytes of graph and names beside the weights
MEMORY_SLACK = 2**30  # bytes; importing torch and timm takes three quarters of it
GROUPS_REPEATS = 5


def check_product(task: Task) -> dict[str, Any]:
    """The row of one model, only of what a user does."""
    return check_family(task, stages=(_product,))


def check_family(task: Task, stages: tuple[Callable[..., None], ...] | None = None) -> dict[str, Any]:
    """The row of one model."""
    row: dict[str, Any] = {"family": task.family, "model": task.model, "outcome": "ok", "seconds": {}, "errors": []}
    begun = time.perf_counter()
    model = create_model(task.model, pretrained=False)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["run_batch"] = 1 if row["parameters"] > LARGE else RUN_BATCH
    images = example_inputs(model, RUN_BATCH)
    row["float_bytes"] = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    randomise(model, images[:2])
    for stage in stages or (_product, _passes, _oracle):
        _collect(row, lambda stage=stage: stage(row, model, images))
    row["outcome"] = row["errors"][0] if row["errors"] else "ok"
    row["wall_seconds"] = round(time.perf_counter() - begun, 1)
    return row


def _collect(row: dict[str, Any], stage: Callable[[], None]) -> None:
    try:
        stage()
    except Exception as error:
        row["errors"].append(first_line(error))


def expect(row: dict[str, Any], holds: bool, problem: str) -> None:
    if not holds:
        row["errors"].append(problem)


# -- stages ------------------------------------------------------------------------------------------------------------


def _product(row: dict[str, Any], model: torch.nn.Module, images: torch.Tensor) -> None:
    """What a user does: compress without data, save, load, run. Peak memory is that of all this but the run."""
    before = state(model)
    with timed(row, "compress"):
        result = compress(model, images[:2], budget=BUDGET, method="uniform")
    row["changed"] = difference(before, state(model))
    expect(row, not row["changed"], f"the float model is not as it was: {row['changed']}")
    row["stages"] = {name: round(seconds, 3) for name, seconds in result.seconds.items()}
    row["bops_share"] = BUDGET.shares(result.cost)["bops"]
    row["method"] = result.policy.method
    row["bits"] = sorted({str(b) for b in result.policy.weight_bits.values()})
    expect(row, BUDGET.is_satisfied_by(result.cost), f"over budget: {row['bops_share']}")
    with tempfile.TemporaryDirectory() as directory:
        with timed(row, "save"):
            result.save(directory)
        path = os.path.join(directory, "model.pt2")
        row["file_bytes"], row["stored_bytes"] = os.path.getsize(path), result.cost.stored_bits // 8
        with timed(row, "load"):
            loaded = load_pt2(path)
    row["peak_bytes"] = _peak_bytes()
    row["memory_share"] = round(row["peak_bytes"] / (6 * row["float_bytes"] + MEMORY_SLACK), 3)
    expect(row, row["memory_share"] <= 1, f"peak memory {row['peak_bytes']} bytes")
    row["file_excess"] = round((row["file_bytes"] - FILE_SLACK) / row["stored_bytes"] - 1, 4)
    expect(
        row,
        0.9 * row["stored_bytes"] <= row["file_bytes"] <= 1.1 * row["stored_bytes"] + FILE_SLACK,
        f"file has {row['file_bytes']} bytes, cost states {row['stored_bytes']}",
    )
    run = images[: row["run_batch"]]
    with torch.no_grad():
        expect(row, equal(loaded(run), result.model(run)), "loaded graph differs from the saved one")
    del loaded
    plain = finalize(result.gated)
    row["codes"] = compare_codes(row, result.gated, plain, [run])
    _compare_joins(row, model, plain, result.model, run)


def _compare_joins(
    row: dict[str, Any],
    model: torch.nn.Module,
    plain: fx.GraphModule,
    integer: fx.GraphModule,
    images: torch.Tensor,
) -> None:
    """The graph that is saved, with integer joins, against the one without: it may move the output by no more than
    quantisation has moved it already, or a little."""
    row["joins"] = len(static_of(integer).activations) - len(static_of(plain).activations)
    with torch.no_grad():
        exact, static, joined = (pytree.tree_leaves(graph(images)) for graph in (model, plain, integer))
    row["joins_error"] = _error(joined, static)
    row["static_error"] = _error(static, exact)
    expect(
        row,
        row["joins_error"] <= max(JOINS_TOLERANCE, 2 * row["static_error"]),
        f"integer joins change the output by {row['joins_error']:.2f}, quantisation by {row['static_error']:.2f}",
    )
    unreal = [level for level in count_levels(integer, [images]) if not level.is_real]
    expect(row, not unreal, f"more levels than bits allow, with integer joins: {unreal[:1]}")


def _error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference of any output, as a share of its norm."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs)


def compare_codes(
    row: dict[str, Any], gated: fx.GraphModule, static: fx.GraphModule, inputs: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Static against gated graph, each layer fed the same codes; no more levels in use than bits allow."""
    codes = compare_static(gated, static, inputs)
    differing, positions = sum(c.differing for c in codes), sum(c.positions for c in codes)
    unreal = [level for level in count_levels(static, inputs) if not level.is_real]
    found = {
        "tensors": len(codes),
        "share": differing / max(1, positions),
        "worst_share": max((c.differing / c.positions for c in codes), default=0.0),
        "step": max((c.largest_step for c in codes), default=0),
        "bits_real": not unreal,
    }
    expect(
        row,
        found["step"] <= 1 and found["share"] <= CODE_TOLERANCE,
        f"static and gated codes differ on {found['share']:.1e} of positions by up to {found['step']} steps",
    )
    expect(row, not unreal, f"more levels than bits allow: {unreal[:1]}")
    return found


def _passes(row: dict[str, Any], model: torch.nn.Module, images: torch.Tensor) -> None:
    """Each pass timed alone, in float32, beside `torch.export` alone; trace and open gates compared bit for bit; a
    randomly pruned graph with random bits compared with its static form."""
    _warm_up()
    with timed(row, "export"), torch.no_grad():
        torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False)
    with timed(row, "trace"):
        graph = trace(model, images[:2])
    repeats: list[float] = []
    for _ in range(GROUPS_REPEATS):
        with timed(row, "groups"):
            groups = channel_groups(graph)
        repeats.append(row["seconds"]["groups"])
    row["seconds"]["groups"], row["seconds"]["groups_max"] = statistics.median(repeats), max(repeats)
    cost, plan = cost_model(graph, groups), random_plan(groups)
    describe_groups(row, groups, cost, plan)
    expect(row, not groups.inference.unknown, f"operators without a rule: {row['unknown_operators']}")
    with timed(row, "gates"):
        gated = insert_gates(graph, groups)
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = torch.randn(batch, *images.shape[1:], generator=torch.Generator().manual_seed(batch))
            expected = model(x)
            actual = graph(x)
            expect(row, equal(actual, expected), f"trace is not bitwise at batch {batch}")
            if batch == 2:
                expect(row, equal(gated(x), actual), "open gates are not bitwise")
    del gated
    with timed(row, "slim"):
        slimmed = slim(graph, groups, plan)
    quantised = insert_gates(slimmed, groups, channels=False)
    draw = random.Random(0)
    apply_bits(
        quantised,
        {name: draw.choice((2, 4, 8)) for name in cost.weights},
        {name: draw.choice((2, 4, 8)) for name in cost.activations},
    )
    calibrate(quantised, None, inputs=(images[:2],), method="minmax", max_batches=1)
    with timed(row, "finalise"):
        static = finalize(quantised)
    row["mixed_codes"] = compare_codes(row, quantised, static, [images[: row["run_batch"]]])
    del quantised, static
    seconds = row["seconds"]
    row["compile_seconds"] = round(sum(seconds[k] for k in ("trace", "groups", "gates", "slim", "finalise")), 3)
    row["compile_to_export"] = round(row["compile_seconds"] / seconds["export"], 2)
    row["cost_error"] = count_error(to_meta(slimmed), images[:1].to("meta"), cost.evaluate(Plan(plan)))
    expect(row, row["cost_error"] == 0, f"symbolic MACs differ from counted ones by {row['cost_error']}")
    report = compare_slim(graph, groups, plan, [images[: row["run_batch"]]])
    row["slim_output_error_float32"] = report.output_error
    row["badly_conditioned"] = report.output_error > OUTPUT_TOLERANCE


def _oracle(row: dict[str, Any], model: torch.nn.Module, images: torch.Tensor) -> None:
    """Mask = slim, node by node, in float64."""
    double = copy.deepcopy(model).double()
    graph = trace(double, images[:2].double())
    groups = channel_groups(graph)
    report = compare_slim(graph, groups, random_plan(groups), [images[: row["run_batch"]].double()])
    row["nodes_compared"] = report.nodes
    row["slim_error"], row["slim_error_at"] = report.worst_error, report.worst_node
    row["slim_output_error"] = report.output_error
    row["differs_from_dense"] = report.differs_from_dense
    first = report.first_above(SLIM_TOLERANCE)
    expect(row, not first, f"slim differs from masked by {report.worst_error:.1e}, first at {first}")
    expect(row, report.differs_from_dense > 1e-6, "the random plan changes nothing at the output")


# -- measures ----------------------------------------------------------------------------------------------------------


def equal(a: Any, b: Any) -> bool:
    """Whether two outputs are the same bit for bit; NaN equals nothing."""
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def _peak_bytes() -> int:
    """Most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # reason: kilobytes except on macOS


def _warm_up() -> None:
    """Export something once, so that imports on first use are not counted."""
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(2, 2),), strict=False)
