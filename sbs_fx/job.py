"""What a call on a float model begins with: the model traced and priced, and what the call brings along.

In: a module or a name, example inputs, settings. Out: `Traced`, a `CostModel`, and the `Job`, which reports stages and
keeps their times. Holds: the model is not changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from sbs_fx.calibration.calibrate import calibration_batches
from sbs_fx.calibration.synthetic import bounds_of, set_bounds
from sbs_fx.config import Config
from sbs_fx.data.batches import Tensors, in_cache, split_inputs
from sbs_fx.data.prepared import Prepare, prepared
from sbs_fx.export.latency import latency_model
from sbs_fx.models import create_model, input_config
from sbs_fx.models import example_inputs as derive_inputs
from sbs_fx.passes import CostModel, channel_groups, cost_model, equalise, explicit_attention, trace
from sbs_fx.passes.capture.export import Dynamic
from sbs_fx.passes.capture.inputs import inputs_of
from sbs_fx.passes.capture.models import unwrapped
from sbs_fx.passes.capture.part import Part
from sbs_fx.passes.capture.part_search import naming_parts
from sbs_fx.passes.capture.signature import Inputs, Signature
from sbs_fx.passes.capture.sound import check_graph, check_weights
from sbs_fx.plan import Budget
from sbs_fx.plan.errors import BudgetError, InputError
from sbs_fx.training import Checkpoints
from sbs_fx.training.progress import Observer
from sbs_fx.training.task import Task, set_task

Data = Iterable[Any]
Progress = Callable[[str, float], None]
Model = nn.Module | ExportedProgram | str


_FEWEST_LOOKED_AT, _MOST_LOOKED_AT, _NUMBERS = 8, 256, 1 << 21


class Job:
    """What a call brings along; reports stages and keeps their times."""

    def __init__(
        self,
        config: Config,
        data: Data | None = None,
        validation: Data | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
        path: str | None = None,
    ) -> None:
        self.config, self.data, self.validation = config, data, validation
        self.progress, self.observer = progress, observer
        self.path = path
        self.part: Part | None = None
        self.checkpoints: Checkpoints | None = None
        self._current: str | None = None
        self._share, self._first = 0.0, 0.0
        self._since = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def prepare(self, graph: fx.GraphModule, prepare: Prepare | None) -> None:
        """Read the data by the names of the tensors that a graph takes."""
        if self.part is not None:
            self.data, prepare = self.part.data(self.data, prepare, self.validation), None
        names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        self.data, self.validation = (prepared(data, names, prepare) for data in (self.data, self.validation))

    def looked_at(self, graph: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> list[Tensors]:
        """A few examples for what a report measures, of the data or made up, in batches that the graph takes."""
        spec = inputs_of(graph)
        batch = next(calibration_batches(self.data, inputs, 1, bounds=bounds_of(graph)))
        batch = tuple(x.to(e.device, e.dtype) for x, e in zip(batch, inputs, strict=True))
        if self.data is None and spec is not None:  # reason: what is made up has as many rows everywhere
            batch = tuple(
                e if t.shape and isinstance(t.shape[0], int) else x
                for x, e, t in zip(batch, inputs, spec.tensors, strict=True)
            )
        count = min(_MOST_LOOKED_AT, max(_FEWEST_LOOKED_AT, _NUMBERS // max(x[:1].numel() for x in inputs)))
        for parts in (in_cache(split_inputs(batch, count)[0]), [batch], [inputs]):
            with suppress(InputError):
                for part in parts:
                    if spec is not None:
                        spec.check(part)
                return parts
        return []

    def stage(self, name: str, done: float) -> None:
        self.close()
        self._current, self._share = name, done
        if self.progress is not None:
            self.progress(name, done)

    def step(self, done: int, total: int) -> None:
        """A part of the stage has begun: the number of it, of so many."""
        now = time.perf_counter()
        if done == 1:
            self._first = now
        if self.progress is not None and total > 1:
            left = (now - self._first) / (done - 1) * (total - done + 1) if done > 1 else 0.0
            told = f", {left:.0f} s left" if left >= 1 else ""
            self.progress(f"{self._current} {done} of {total}{told}", self._share)

    def close(self) -> None:
        now = time.perf_counter()
        if self._current is not None:
            self.seconds[self._current] = self.seconds.get(self._current, 0.0) + now - self._since
        self._current, self._since = None, now


class Traced(NamedTuple):
    """A float model as a graph; `metadata` has mean and std of images, if the model says so; `name`: of its class, or
    its own."""

    graph: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    metadata: dict[str, Any]
    name: str = ""


def traced_model(
    model: Model, example_inputs: Inputs | None, dynamic: Dynamic | None, task: Task | str | None, job: Job
) -> Traced:
    job.stage("trace", 0.0)
    given: Any = create_model(model) if isinstance(model, str) else model
    if job.path is not None:
        job.part = Part(given, job.path, derive_inputs(given) if example_inputs is None else example_inputs)
        given, example_inputs, task = job.part.module, job.part.call, task or "matching"
    module = unwrapped(given)
    check_weights(module)
    called = derive_inputs(module) if example_inputs is None else example_inputs
    with naming_parts(module, called, dynamic, job.part):
        graph = trace(module, called, dynamic=dynamic)
    if job.config.quantise:
        graph = explicit_attention(equalise(graph))
    set_task(graph, task)
    card = input_config(module)
    _, inputs = Signature.of(module, called)
    check_graph(graph)
    metadata: dict[str, Any] = {key: list(card[key]) for key in ("mean", "std") if key in card}
    set_bounds(graph, inputs, metadata)
    return Traced(graph, inputs, metadata, model if isinstance(model, str) else type(module).__name__)


def priced(traced: Traced, job: Job, budget: Budget | None) -> CostModel:
    graph = traced.graph
    job.stage("channel groups", 0.3)
    groups = channel_groups(graph, keep_outputs=job.config.keep_outputs)
    cost = cost_model(graph, groups)
    limits = {} if budget is None else {**budget.limits, **budget.amounts}
    if cost.uncounted and limits.keys() & {"bops", "macs"} and job.config.uncounted == "error":
        raise BudgetError(
            f"nobody knows what {listed(cost.uncounted)} costs, so that a budget of BOPs or MACs would be met in name "
            "alone; register a formula with torch.utils.flop_counter.register_flop_formula, limit size or latency, or "
            'leave it out with Config(uncounted="ignore")'
        )
    if "latency" in limits:
        job.stage("latency", 0.32)
        cost = cost_model(graph, groups, latency_model(graph, groups, cost, traced.inputs, job.config.latency))
    return cost


def told(data: Data | None) -> str:
    """What can be told of data without reading them: what they say of themselves, or their kind and length."""
    own = getattr(data, "identity", None)
    if isinstance(own, str):
        return own
    length = f" of {len(data)} batches" if isinstance(data, Sized) else ""
    return "none" if data is None else type(data).__qualname__ + length


def listed(operators: Mapping[str, str]) -> str:
    """Operators by node, as "torch.ops.my.op (node my_op, my_op_1)"."""
    nodes: dict[str, list[str]] = {}
    for node, operator in operators.items():
        nodes.setdefault(operator, []).append(node)
    return ", ".join(f"{operator} (node {', '.join(names)})" for operator, names in nodes.items())
