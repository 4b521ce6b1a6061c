"""`compress`: one call from a float model to a static quantised graph under a budget; `apply`: a saved policy again.

In: a module or a timm model name, a budget or a policy, maybe data. Out: a `Result`. Holds: the model is not changed; a
result that is returned meets the budget; what is saved is whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from sbs_fx.bisection import LARGEST, within_drop
from sbs_fx.calibration.calibrate import Observations, calibration_batches, observe
from sbs_fx.calibration.reconstruction import reconstruct
from sbs_fx.calibration.synthetic import bounds_of, set_bounds
from sbs_fx.config import Config
from sbs_fx.data.prepared import Prepare, prepared
from sbs_fx.export.latency import latency_model
from sbs_fx.models import create_model, input_config
from sbs_fx.models import example_inputs as derive_inputs
from sbs_fx.passes import (
    CostModel,
    apply_bits,
    channel_groups,
    cost_model,
    finalize,
    insert_gates,
    integer_grid,
    integer_joins,
    slim,
    trace,
)
from sbs_fx.passes.capture.export import Dynamic, own_context
from sbs_fx.passes.capture.inputs import guarded
from sbs_fx.passes.capture.models import unwrapped
from sbs_fx.passes.capture.part import Part
from sbs_fx.passes.capture.part_search import naming_parts
from sbs_fx.passes.capture.signature import Inputs, Signature
from sbs_fx.passes.capture.sound import check_runs, check_weights
from sbs_fx.passes.channels.slim import slim_bits
from sbs_fx.passes.graph import with_tensors
from sbs_fx.plan import Budget, Plan, Policy, current_versions
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.errors import BudgetError, GraphError
from sbs_fx.plan.files import prepare_directory
from sbs_fx.report import Report
from sbs_fx.result import Result
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.search.registry import Method, Run, chosen, methods
from sbs_fx.search.space import Space
from sbs_fx.training import Checkpoints, TrainingStage, fine_tune
from sbs_fx.training.frozen import FrozenMasks
from sbs_fx.training.processes import Processes
from sbs_fx.training.progress import Observer
from sbs_fx.training.randomness import random_state_kept
from sbs_fx.training.task import Task, set_task

Data = Iterable[Any]
Progress = Callable[[str, float], None]
Model = nn.Module | ExportedProgram | str


@own_context()
@random_state_kept()
def compress(
    model: Model,
    example_inputs: Inputs | None = None,
    *,
    part: str | None = None,
    dynamic: Dynamic | None = None,
    task: Task | str | None = None,
    budget: Budget | float | str | None = None,
    max_drop: float | None = None,
    data: Data | None = None,
    prepare: Prepare | None = None,
    method: str = "auto",
    config: Config | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    validation: Data | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> Result:
    """Compress a float model under a budget.

    With `output_dir`, whatever trains leaves checkpoints there, and the same call again goes on from them.

    Args:
        model: a module that `torch.export` can capture, an `ExportedProgram`, or a timm model name. It is not changed.
        example_inputs: a tensor of shape (batch of 2 or more, ...), a tuple of positional arguments or a dict of
            keyword arguments; see `sbs_fx.passes.trace`. Default: images as the model's `pretrained_cfg` has them.
        part: path of a sub-module to compress in place of the whole, such as "backbone" where what follows depends on
            data. Inputs and data are still the whole's, whose forward must call the part once; labels are not used, and
            the part's outputs are matched to the float part's unless `task` says otherwise. See `with_part`.
        dynamic: dimensions that may change, such as ("batch", "height", "width"); default: the batch. See `trace`.
        task: what the outputs mean: "classification", "segmentation", "embedding", "regression", "matching" or a `Task`
            of your own; default: classification where the one output is (batch, classes), else every output is matched
            to the float model's.
        budget: shares of the float model; a number or text means BOPs; default: 5 % of them.
        max_drop: in place of a given budget: the smallest cost whose metric on `validation` is lower than the float
            model's by no more than this, 0.01 being one point of a metric in percent. The measure that `budget` limits
            is bisected from there down, each step a compression of its own; default: from 12.5 % of the BOPs.
        data: iterable of (images, labels) or images, normalised as the model expects; None: data-free. Batches may be
            dicts and dataclasses too, by the names of the model's arguments or usual ones ("pixel_values", "labels").
        prepare: batch -> (arguments of the model, targets or None), for batches of any other form.
        method: the name of a registered method (`sbs_fx.search.registry.methods()` lists them, with what each needs);
            "auto": what suits the data and the epochs of fine-tuning that are asked for.
        config: settings; see `Config`.
        output_dir: also save the result there.
        validation: held-out (images, labels), read at each epoch's end of fine-tuning.
        restart: forget the checkpoints in `output_dir`.
        progress: called with (stage, share of the whole job done).
        observer: called after each training step.

    Raises:
        SbsError: any of `sbs_fx.plan.errors`; nothing is written in that case.
    """
    config = config or Config()
    if output_dir is not None:
        prepare_directory(output_dir)
    if max_drop is not None:
        options: dict[str, Any] = {"example_inputs": example_inputs, "part": part, "dynamic": dynamic, "task": task}
        options |= {"data": data, "prepare": prepare, "method": method, "config": config, "validation": validation}
        options |= {"progress": progress, "observer": observer}
        largest = LARGEST if budget is None else Budget.of(budget)
        result = within_drop(compress, model, largest, max_drop, options)
        if output_dir is not None:
            result.save(output_dir)
        return result
    entry = chosen(method, data is not None, bool(config.epochs))
    budget = Budget.of(0.05 if budget is None else budget)
    job = Job(config, data, validation, progress, observer, part)
    traced = _traced(model, example_inputs, dynamic, task, job)
    job.prepare(traced.graph, prepare)
    problem = Problem.of(_priced(traced, job, budget), budget, traced.inputs, config, config.seed)
    identity = {"model": problem.groups.fingerprint, "method": entry.name, "budget": budget.limits}
    with _checkpoints(output_dir, entry, identity, config, restart) as job.checkpoints:
        job.stage("search", 0.35)
        searched = _searched(problem, entry, job)
        result = _realised(traced, problem.cost, searched, problem.policy(searched.plan, entry.name), job)
        if not budget.is_satisfied_by(result.cost):
            raise GraphError(
                f"the result costs {budget.shares(result.cost)} of the float model, over {budget}", pass_name="compress"
            )
        if output_dir is not None and Processes().is_first:
            job.stage("save", 0.95)
            result.save(output_dir)
    job.stage("done", 1.0)
    return result


@own_context()
@random_state_kept()
def apply(
    model: Model,
    policy: Policy,
    example_inputs: Inputs | None = None,
    *,
    part: str | None = None,
    dynamic: Dynamic | None = None,
    task: Task | str | None = None,
    budget: Budget | float | str | None = None,
    data: Data | None = None,
    prepare: Prepare | None = None,
    config: Config | None = None,
    validation: Data | None = None,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> Result:
    """A saved policy onto the float model again: what `compress` does after its search.

    Args:
        budget: what the policy must keep, such as one that was changed by hand; None: whatever it costs.

    Raises:
        PolicyMismatch: the policy belongs to another model; names what differs. BudgetError: it costs more than that.
    """
    config = config or Config()
    job = Job(config, data, validation, progress, observer, part)
    limits = None if budget is None else Budget.of(budget)
    traced = _traced(model, example_inputs, dynamic, task, job)
    job.prepare(traced.graph, prepare)
    cost = _priced(traced, job, limits)
    _check_policy(cost, policy)
    if limits is not None and not limits.is_satisfied_by(total := cost.evaluate(policy.plan)):
        raise BudgetError(
            f"this policy costs {limits.shares(total)} of the float model; expected at most {limits.limits}"
        )
    entry = methods().get(policy.method)
    tensors: Mapping[str, torch.Tensor] = {}
    if entry is not None and entry.restore is not None:
        space = Space(cost.groups, cost)
        problem = Problem(traced.graph, cost.groups, cost, {}, space, traced.inputs, policy.seed)
        tensors = entry.restore(problem, policy.plan, config.of(entry))
    restored = SearchResult(policy.plan, tensors)
    return _realised(traced, cost, restored, policy, job)


class _Traced(NamedTuple):
    """A float model as a graph; `metadata` has mean and std of images, if the model says so."""

    graph: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    metadata: dict[str, Any]


def _traced(
    model: Model, example_inputs: Inputs | None, dynamic: Dynamic | None, task: Task | str | None, job: Job
) -> _Traced:
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
    set_task(graph, task)
    card = input_config(module)
    _, inputs = Signature.of(module, called)
    check_runs(graph, inputs)
    metadata: dict[str, Any] = {key: list(card[key]) for key in ("mean", "std") if key in card}
    set_bounds(graph, inputs, metadata)
    return _Traced(graph, inputs, metadata)


def _priced(traced: _Traced, job: Job, budget: Budget | None) -> CostModel:
    graph = traced.graph
    job.stage("channel groups", 0.3)
    groups = channel_groups(graph, keep_outputs=job.config.keep_outputs)
    cost = cost_model(graph, groups)
    limits = {} if budget is None else budget.limits
    if cost.uncounted and limits.keys() & {"bops", "macs"} and job.config.uncounted == "error":
        raise BudgetError(
            f"nobody knows what {_listed(cost.uncounted)} costs, so that a budget of BOPs or MACs would be met in name "
            "alone; register a formula with torch.utils.flop_counter.register_flop_formula, limit size or latency, or "
            'leave it out with Config(uncounted="ignore")'
        )
    if "latency" in limits:
        job.stage("latency", 0.32)
        cost = cost_model(graph, groups, latency_model(graph, groups, cost, traced.inputs, job.config.latency))
    return cost


def _searched(problem: Problem, method: Method, job: Job) -> SearchResult:
    """What the method finds; from the checkpoints if they have it already."""
    config, checkpoints = job.config, job.checkpoints if method.resumes else None
    saved = None if checkpoints is None else checkpoints.load("searched")
    if saved is not None:
        plan = Policy.from_json(saved.state["policy"]).plan
        return SearchResult(plan, saved.tensors, tuple(saved.state["notes"]))
    run = Run(
        job.data, config.of(method), config.training, config.ranges, bool(config.epochs), checkpoints, job.observer
    )
    result = method.search(problem, run)
    if checkpoints is not None:
        state = {"policy": problem.policy(result.plan, method.name).to_json(), "notes": result.notes}
        checkpoints.save("searched", result.tensors, state)
    return result


def _realised(traced: _Traced, cost: CostModel, searched: SearchResult, policy: Policy, job: Job) -> Result:
    """Slim, gate, calibrate, maybe fine-tune or reconstruct, finalise."""
    plan, config, data = searched.plan, job.config, job.data
    groups, graph = cost.groups, traced.graph
    _check_policy(cost, policy)
    job.stage("slim", 0.4)
    gated = insert_gates(slim(with_tensors(graph, searched.tensors), groups, plan.kept), groups, channels=False)
    apply_bits(gated, slim_bits(groups, plan), plan.activation_bits)
    observed = None
    if _rounds(plan):
        job.stage("calibrate", 0.5)
        observed = observe(gated, data, inputs=traced.inputs, max_batches=config.calibration_batches)
        observed.set_ranges(config.ranges)
    if config.epochs and data is not None:
        job.stage("fine-tune", 0.6)
        tune(gated, graph, job, frozen_masks=bool(plan.nonzeros))
    elif data is not None and not plan.nonzeros:
        job.stage("reconstruct", 0.6)
        options: dict[str, Any] = {"settings": config.reconstruction, "seed": config.seed}
        reconstruct(gated, graph, data, inputs=traced.inputs, groups=groups, kept=plan.kept, **options)
    job.stage("finalise", 0.9)
    static = finalize(gated, nonzeros=plan.nonzeros)
    if observed is not None:
        static = _integer(static, observed, traced.inputs, job)
    total = cost.evaluate(plan)
    uncounted = [f"not in the cost, as nobody knows it: {_listed(cost.uncounted)}"] if cost.uncounted else []
    of_part = [] if job.part is None else [str(job.part)]
    report = Report.of(groups, cost, policy, total, (*of_part, *searched.notes, *uncounted))
    job.close()
    guarded(static)
    metadata = traced.metadata if job.path is None else {**traced.metadata, "part": job.path}
    return Result(static, policy, total, report, gated, traced.inputs, job.seconds, metadata)


def _listed(operators: Mapping[str, str]) -> str:
    """Operators by node, as "torch.ops.my.op (node my_op, my_op_1)"."""
    nodes: dict[str, list[str]] = {}
    for node, operator in operators.items():
        nodes.setdefault(operator, []).append(node)
    return ", ".join(f"{operator} (node {', '.join(names)})" for operator, names in nodes.items())


def _check_policy(cost: CostModel, policy: Policy) -> None:
    """Raises PolicyMismatch."""
    sizes = {group.name: group.size for group in cost.groups.values()}
    policy.check(cost.groups.fingerprint, sizes, cost.weights, cost.activations)


def _rounds(plan: Plan) -> bool:
    """Whether anything is quantised at all."""
    return any(bits != FLOAT_BITS for table in (plan.weight_bits, plan.activation_bits) for bits in table.values())


def _integer(
    static: fx.GraphModule, observed: Observations, inputs: tuple[torch.Tensor, ...], job: Job
) -> fx.GraphModule:
    """A static graph in the form that compilers for integer kernels keep whole."""
    config, data = job.config, job.data
    if config.integer_joins:
        batches = calibration_batches(data, inputs, config.calibration_batches, bounds=bounds_of(static))
        # reason: synthetic input has no outliers to cut off
        method = config.ranges if data is not None else "minmax"
        static = integer_joins(static, batches, method=method, known=observed.analytic_histograms())
    return integer_grid(static, exact=config.exact)


def tune(gated: fx.GraphModule, teacher: nn.Module, job: Job, *, frozen_masks: bool) -> None:
    """Fine-tune as the settings say, in place; `frozen_masks`: single weights that are zero stay so."""
    config = job.config
    assert job.data is not None
    fine_tune(
        gated,
        job.data,
        epochs=config.epochs,
        lr=config.learning_rate,
        settings=config.training,
        teacher=teacher if config.training.distillation else None,
        validation=job.validation,
        seed=config.seed,
        checkpoints=job.checkpoints,
        progress=job.observer,
        stage=FrozenMasks if frozen_masks else TrainingStage,
    )


@contextmanager
def _checkpoints(
    output_dir: str | os.PathLike[str] | None, method: Method, identity: dict[str, Any], config: Config, restart: bool
) -> Iterator[Checkpoints | None]:
    """Where training saves itself, if it trains and there is a place."""
    if output_dir is None or not (method.resumes or config.epochs):
        yield None
        return
    identity = {**identity, "version": current_versions()["sbs_fx"], **config.model_dump(mode="json")}
    first, directory = Processes().is_first, os.path.join(output_dir, "checkpoints")
    with Checkpoints(directory, identity, restart=restart, writes=first) as checkpoints:
        yield checkpoints


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
        self._since = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def prepare(self, graph: fx.GraphModule, prepare: Prepare | None) -> None:
        """Read the data by the names of the tensors that a graph takes."""
        if self.part is not None:
            self.data, prepare = self.part.data(self.data, prepare, self.validation), None
        names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        self.data, self.validation = (prepared(data, names, prepare) for data in (self.data, self.validation))

    def stage(self, name: str, done: float) -> None:
        self.close()
        self._current = name
        if self.progress is not None:
            self.progress(name, done)

    def close(self) -> None:
        now = time.perf_counter()
        if self._current is not None:
            self.seconds[self._current] = self.seconds.get(self._current, 0.0) + now - self._since
        self._current, self._since = None, now
