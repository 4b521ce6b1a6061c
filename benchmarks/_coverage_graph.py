"""Graph work alone, on one model without weights: trace, groups, random plan, slim, shapes.

In: a task. Out: a row of plain data whose `outcome` is "ok" or the first error. Everything happens on the meta device,
so that neither memory nor arithmetic limits the size of a model; one that needs real values to be captured is made for
real.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _coverage_models import Task, meta_model
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from sbs_fx.models import create_model, input_config
from sbs_fx.passes import ChannelGroups, CostModel, channel_groups, cost_model, slim, trace
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.plan import Cost, Plan
from sbs_fx.plan.errors import TraceError

KEPT_SHARE = 0.7
RUN_BATCH = 3  # not the batch that was exported
REAL_PARAMETERS = 400_000_000  # the largest model that is made for real if the meta device does not do


def check_graph(task: Task) -> dict[str, Any]:
    """The row of one model; see `_fill` for its keys."""
    row: dict[str, Any] = {"family": task.family, "model": task.model, "outcome": "ok", "seconds": {}}
    begun = time.perf_counter()
    try:
        _fill(row)
    except Exception as error:
        row["outcome"] = first_line(error)
    row["wall_seconds"] = round(time.perf_counter() - begun, 2)
    return row


def _fill(row: dict[str, Any]) -> None:
    with timed(row, "create"):
        model = meta_model(row["model"])
    row["parameters"] = sum(p.numel() for p in model.parameters())
    size = input_config(model)["input_size"]
    graph = _trace(model, size, row)
    del model
    row["nodes"] = len(graph.graph.nodes)
    with timed(row, "groups"):
        groups = channel_groups(graph)
    plan = random_plan(groups)
    with timed(row, "slim"):
        slimmed = slim(graph, groups, plan)
    with timed(row, "cost"):
        cost = cost_model(graph, groups)
        describe_groups(row, groups, cost, plan)
    images = torch.empty(RUN_BATCH, *size, device="meta")
    with timed(row, "run"):
        row["nodes_checked"] = check_shapes(to_meta(slimmed), groups, plan, images)
    row["cost_error"] = count_error(slimmed, images[:1], cost.evaluate(Plan(plan)))
    if row["cost_error"]:
        raise AssertionError(f"symbolic MACs differ from counted ones by {row['cost_error']}")


def _trace(model: torch.nn.Module, size: tuple[int, ...], row: dict[str, Any]) -> fx.GraphModule:
    row["device"] = "meta"
    try:
        with timed(row, "trace"):
            return trace(model, torch.empty(2, *size, device="meta"))
    except (TraceError, NotImplementedError, RuntimeError) as error:
        if row["parameters"] > REAL_PARAMETERS:
            raise
        row["device"], row["meta_error"] = "cpu", first_line(error)
    with timed(row, "trace"):
        return trace(create_model(row["model"], pretrained=False), torch.zeros(2, *size))


def random_plan(groups: ChannelGroups, share: float = KEPT_SHARE, seed: int = 0) -> dict[str, list[int]]:
    """`share` of the channels of every group, minor factors included, drawn at random, at least one."""
    generator = random.Random(seed)
    return {name: sorted(generator.sample(range(g.size), max(1, round(share * g.size)))) for name, g in groups.items()}


def describe_groups(row: dict[str, Any], groups: ChannelGroups, cost: CostModel, plan: dict[str, list[int]]) -> None:
    """What the analysis found, and what the plan saves."""
    row["groups"] = len(groups)
    row["minor_groups"] = sum(not g.primary for g in groups.values())
    row["unknown_operators"] = sorted(set(groups.inference.unknown.values()))
    row["adapters"] = len(groups.inference.adapters)
    row["macs"] = cost.reference.macs
    row["prunable_share"] = round(cost.prunable_share(), 6)
    row["mac_reduction"] = round(1 - cost.evaluate(Plan(plan)).macs / max(1, cost.reference.macs), 4)


def check_shapes(
    slimmed: fx.GraphModule, groups: ChannelGroups, plan: dict[str, list[int]], images: torch.Tensor
) -> int:
    """Run the slim graph and compare every shape with its type's size under the plan; returns how many were compared.

    Raises:
        AssertionError: a tensor has another shape than its type says.
    """
    value = next(n for n in slimmed.graph.find_nodes(op="placeholder") if n.meta["val"].ndim).meta["val"]
    symbols = {str(value.shape[0].node.expr): images.shape[0]}
    sized = channel_groups(groups.inference.graph_module, symbol_sizes=symbols)
    index = Slices(sized, plan)
    types = {
        node.name: dims for node, dims in sized.inference.dims.items() if isinstance(node.meta["val"], torch.Tensor)
    }
    interpreter = _ShapeChecker(slimmed)
    with torch.no_grad():
        interpreter.run(images)
    checked = 0
    for name, shape in interpreter.shapes.items():
        if name in types and name not in sized.inference.adapters:
            expected = tuple(index.size(dim) for dim in types[name])
            if shape != expected:
                raise AssertionError(f"slim: {name} has shape {shape}, its type says {expected}")
            checked += 1
    return checked


class _ShapeChecker(fx.Interpreter):
    """Keeps the shape of every tensor that a graph computes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def to_meta(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph object without values: tensors, and whatever the graph creates, on the meta device."""

    def moved(value: Any) -> Any:
        return torch.device("meta") if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    graph.recompile()
    return graph.to("meta")


def count_error(slimmed: fx.GraphModule, image: torch.Tensor, cost: Cost) -> int:
    """Symbolic MACs minus those that torch's own counter sees while the graph runs on one image.

    On the meta device an LSTM is made of the products that it stands for, so nothing is left uncounted.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        slimmed(image)
    return cost.macs - counter.get_total_flops() // 2


def first_line(error: BaseException) -> str:
    """An error as one line of a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


@contextmanager
def timed(row: dict[str, Any], name: str) -> Iterator[None]:
    """CPU seconds of a block, into `row["seconds"][name]`."""
    begun = time.process_time()
    try:
        yield
    finally:
        row["seconds"][name] = round(time.process_time() - begun, 4)
