"""`compress`: one call from a float model to a static quantised graph under a budget; `apply`: a saved policy again.

In: a module or a timm model name, a budget or a policy, maybe data. Out: a `Result`. Holds: the model is not changed; a
result that is returned meets the budget; what is saved is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import fx, nn

from sbs_fx.bisection import LARGEST, within_drop
from sbs_fx.calibration.calibrate import Observations, calibration_batches, observe
from sbs_fx.calibration.data_free import reconstruct_without_data
from sbs_fx.calibration.reconstruction import reconstruct
from sbs_fx.calibration.synthetic import bounds_of
from sbs_fx.config import Config
from sbs_fx.data.prepared import Prepare
from sbs_fx.job import Data, Job, Model, Progress, Traced, listed, priced, told, traced_model
from sbs_fx.passes import CostModel, apply_bits, finalize, insert_gates, integer_grid, integer_joins, slim
from sbs_fx.passes.capture.export import Dynamic, own_context
from sbs_fx.passes.capture.inputs import guarded
from sbs_fx.passes.capture.signature import Inputs
from sbs_fx.passes.channels.slim import slim_bits
from sbs_fx.passes.graph import digest, with_tensors
from sbs_fx.plan import Budget, Plan, Policy, current_versions
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import BudgetError, GraphError
from sbs_fx.plan.files import prepare_directory
from sbs_fx.report import Report
from sbs_fx.report.measured import Fidelity, tensors_of, weight_noise
from sbs_fx.result import Result
from sbs_fx.search.problem import Considered, Problem, SearchResult
from sbs_fx.search.registry import Method, Run, chosen, methods
from sbs_fx.search.replan import replanned
from sbs_fx.search.sensitivities import Sensitivities
from sbs_fx.search.space import Space
from sbs_fx.search.tradeoff import tradeoff
from sbs_fx.training import Checkpoints, TrainingStage, fine_tune
from sbs_fx.training.frozen import FrozenMasks
from sbs_fx.training.processes import Processes
from sbs_fx.training.progress import Observer
from sbs_fx.training.randomness import random_state_kept
from sbs_fx.training.task import Task


@own_context()
@random_state_kept()
@boundary("compress")
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
    target: str | None = None,
    config: Config | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    validation: Data | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> Result:
    """Compress a float model under a budget.

    With `output_dir`, whatever takes long leaves checkpoints there, and the same call again goes on from them.

    >>> result = sbs_fx.compress(net, images, budget="5%", data=batches)
    >>> result.model(images).shape
    torch.Size([2, 4])

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
            is bisected from there down, each step planned anew (by `replan` where the method allows it) and measured;
            default: from 12.5 % of the BOPs.
        data: iterable of (images, labels) or images, normalised as the model expects; None: data-free. Batches may be
            dicts and dataclasses too, by the names of the model's arguments or usual ones ("pixel_values", "labels").
        prepare: batch -> (arguments of the model, targets or None), for batches of any other form.
        method: the name of a registered method (`sbs_fx.search.registry.methods()` lists them, with what each needs);
            "auto": what suits the data and the epochs of fine-tuning that are asked for.
        target: the format that the result is for, such as "litert"; in place of `Config(target=)`.
        config: settings; see `Config`.
        output_dir: also save the result there.
        validation: held-out (images, labels), read at each epoch's end of fine-tuning.
        restart: forget the checkpoints in `output_dir`.
        progress: called with (stage, share of the whole job done).
        observer: called after each training step.

    Raises:
        SbsError: any of `sbs_fx.plan.errors`; nothing is written in that case.
    """
    config = (config or Config()).for_target(target)
    if output_dir is not None:
        prepare_directory(output_dir)
    if max_drop is not None:
        options: dict[str, Any] = {"example_inputs": example_inputs, "part": part, "dynamic": dynamic, "task": task}
        options |= {"data": data, "prepare": prepare, "method": method, "config": config, "validation": validation}
        options |= {"progress": progress, "observer": observer}
        largest = LARGEST if budget is None else Budget.of(budget)
        result = within_drop(compress, apply, model, largest, max_drop, options)
        if output_dir is not None:
            result.save(output_dir)
        return result
    entry = chosen(method, data is not None, bool(config.epochs))
    budget = Budget.of(0.05 if budget is None else budget)
    job = Job(config, data, validation, progress, observer, part)
    traced = traced_model(model, example_inputs, dynamic, task, job)
    job.prepare(traced.graph, prepare)
    problem = Problem.of(priced(traced, job, budget), budget, traced.inputs, config.space_of(entry), config.seed)
    identity = {"model": problem.groups.fingerprint, "method": entry.name, "budget": budget.asked}
    if output_dir is not None:
        identity |= {"weights and operators": digest(traced.graph.state_dict(), traced.graph.code), "data": told(data)}
    with _checkpoints(output_dir, entry, identity, config, restart) as job.checkpoints:
        job.stage("search", 0.35)
        searched = _searched(problem, entry, job)
        searched = replace(searched, notes=(*searched.notes, *problem.slack(searched.plan)))
        result = _realised(traced, problem.cost, searched, problem.policy(searched.plan, entry.name), job)
        result.sensitivities, result.problem = searched.sensitivities, problem
        result.settings = config.of(entry)
        result.report = result.report.under(problem.shares).with_tradeoff(tradeoff(problem, searched))
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
@boundary("apply")
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

    >>> result = sbs_fx.apply(net, sbs_fx.Policy.load("out/policy.json"), images)

    Args:
        budget: what the policy must keep, such as one that was changed by hand; None: whatever it costs.

    Raises:
        PolicyMismatch: the policy belongs to another model; names what differs. BudgetError: it costs more than that.
    """
    config = config or Config()
    job = Job(config, data, validation, progress, observer, part)
    limits = None if budget is None else Budget.of(budget)
    traced = traced_model(model, example_inputs, dynamic, task, job)
    job.prepare(traced.graph, prepare)
    cost = priced(traced, job, limits)
    _check_policy(cost, policy)
    if limits is not None and not limits.is_satisfied_by(total := cost.evaluate(policy.plan)):
        raise BudgetError(
            f"this policy costs {limits.shares(total)} of the float model; expected at most {limits.asked}"
        )
    entry = methods().get(policy.method)
    tensors: Mapping[str, torch.Tensor] = {}
    if entry is not None and entry.restore is not None:
        space = Space(cost.groups, cost)
        problem = Problem(traced.graph, cost.groups, cost, {}, space, traced.inputs, policy.seed)
        tensors = entry.restore(problem, policy.plan, config.of(entry))
    restored = SearchResult(policy.plan, tensors)
    return _realised(traced, cost, restored, policy, job)


@own_context()
@random_state_kept()
@boundary("replan")
def replan(
    model: Model,
    sensitivities: Sensitivities | str | os.PathLike[str],
    budget: Budget | float | str,
    example_inputs: Inputs | None = None,
    *,
    part: str | None = None,
    dynamic: Dynamic | None = None,
    config: Config | None = None,
) -> Policy:
    """A plan for another budget, or other constraints, from losses that an earlier search has measured; for `apply`.

    >>> policy = sbs_fx.replan(net, measured.sensitivities, "4%", images)

    Args:
        sensitivities: of an earlier result, or the path of its `sensitivity.json`. config: what may be decided.

    Raises:
        PolicyMismatch: measured on another model. ConstraintError: what is asked for was not measured.
        InfeasibleBudget: out of reach; says of what.
    """
    table = sensitivities if isinstance(sensitivities, Sensitivities) else Sensitivities.load(sensitivities)
    job, limits = Job(config or Config(), path=part), Budget.of(budget)
    traced = traced_model(model, example_inputs, dynamic, None, job)
    cost = priced(traced, job, limits)
    return replanned(Problem.of(cost, limits, traced.inputs, job.config, job.config.seed), table.method, table)


@own_context()
@random_state_kept()
@boundary("refresh")
def refresh(result: Result, data: Data | None = None, *, config: Config | None = None) -> Result:
    """The result with `model` made again from `result.gated`, after training of one's own.

    Args:
        result: whose `gated` was trained: its weights, biases, norms and ranges may have changed, its bits not.
        data: images on which joins are calibrated, as for `compress`; None: made up. config: as for `compress`.

    >>> sbs_fx.training.fine_tune(result.gated, batches, epochs=1, lr=0.001)
    >>> result = sbs_fx.refresh(result)

    Raises:
        DataError, InputError: as `compress`. GraphError: a gate still searches.
    """
    job, inputs = Job(config or Config(), data), result.example_inputs
    job.prepare(result.gated, None)
    job.stage("finalise", 0.0)
    static = finalize(result.gated, nonzeros=result.policy.nonzeros)
    looked_at = job.looked_at(result.gated, inputs)
    if _rounds(result.policy.plan):
        observed = observe(result.gated, job.data, inputs=inputs, max_batches=job.config.calibration_batches)
        static = _integer(static, observed, inputs, job)
    job.close()
    stages = list(result.report.stages)
    if result.problem is not None:
        fidelity = Fidelity(result.problem.graph, looked_at)
        fidelity.add("refreshed", static)
        stages += fidelity.rows
    tensors = tensors_of(result.gated, looked_at)
    spent, noise = {**result.seconds, **job.seconds}, weight_noise(result.gated, looked_at)
    report = result.report.with_measures(tensors, stages, spent, result.report.model, noise)
    return replace(result, model=guarded(static), report=report)


def _searched(problem: Problem, method: Method, job: Job) -> SearchResult:
    """What the method finds; from the checkpoints if they have it already."""
    config, checkpoints = job.config, job.checkpoints if method.resumes else None
    saved = None if checkpoints is None else checkpoints.load("searched")
    if saved is not None:
        plan, table = Policy.from_json(saved.state["policy"]).plan, saved.state["sensitivities"]
        measured = None if table is None else Sensitivities.from_json(table)
        considered = tuple(Considered(**fields) for fields in saved.state.get("considered", ()))
        return SearchResult(plan, saved.tensors, tuple(saved.state["notes"]), considered, measured)
    run = Run(
        job.data,
        config.of(method),
        config.training,
        config.ranges,
        bool(config.epochs),
        checkpoints,
        job.observer,
        config.executor,
        job.step,
    )
    result = method.search(problem, run)
    if checkpoints is not None:
        state = {
            "policy": problem.policy(result.plan, method.name).to_json(),
            "notes": result.notes,
            "considered": [asdict(each) for each in result.considered],
            "sensitivities": None if result.sensitivities is None else result.sensitivities.to_json(),
        }
        checkpoints.save("searched", result.tensors, state)
    return result


def _realised(traced: Traced, cost: CostModel, searched: SearchResult, policy: Policy, job: Job) -> Result:
    """Slim, gate, calibrate, maybe fine-tune or reconstruct, finalise."""
    plan, config, data = searched.plan, job.config, job.data
    groups, graph = cost.groups, traced.graph
    _check_policy(cost, policy)
    job.stage("slim", 0.4)
    looked_at = job.looked_at(graph, traced.inputs)
    fidelity = Fidelity(graph, looked_at)
    whole = with_tensors(graph, searched.tensors)
    pruned = any(len(kept) < groups[name].size for name, kept in plan.kept.items())
    whole = slim(whole, groups, plan.kept) if pruned else whole
    if plan.nonzeros or pruned:
        fidelity.add("pruned", whole)
    gated = insert_gates(whole, groups, channels=False, zero_points=config.numerics.zero_points)
    apply_bits(gated, slim_bits(groups, plan), plan.activation_bits)
    observed = None
    if _rounds(plan):
        job.stage("calibrate", 0.5)
        observed = observe(gated, data, inputs=traced.inputs, max_batches=config.calibration_batches)
        observed.set_ranges(config.ranges)
        fidelity.add("quantised", gated)
    if config.epochs and data is not None:
        job.stage("fine-tune", 0.6)
        tune(gated, graph, job, frozen_masks=bool(plan.nonzeros))
        fidelity.add("fine-tuned", gated)
    elif not plan.nonzeros:
        job.stage("reconstruct", 0.6)
        settings = config.reconstruction
        options: dict[str, Any] = {"inputs": traced.inputs, "groups": groups, "kept": plan.kept, "settings": settings}
        options["step"] = job.step
        if data is None:
            reconstruct_without_data(gated, graph, **options)
        else:
            reconstruct(gated, graph, data, seed=config.seed, **options)
        fidelity.add("refitted", gated)
    job.stage("finalise", 0.9)
    static = finalize(gated, nonzeros=plan.nonzeros)
    if observed is not None:
        static = _integer(static, observed, traced.inputs, job)
    fidelity.add("static", static)
    total = cost.evaluate(plan)
    uncounted = [f"not in the cost, as nobody knows it: {listed(cost.uncounted)}"] if cost.uncounted else []
    of_part = [] if job.part is None else [str(job.part)]
    report = Report.of(groups, cost, policy, total, (*of_part, *searched.notes, *uncounted))
    job.close()
    tensors, noise = tensors_of(gated, looked_at), weight_noise(gated, looked_at)
    report = report.with_measures(tensors, fidelity.rows, job.seconds, traced.name, noise)
    guarded(static)
    metadata = traced.metadata if job.path is None else {**traced.metadata, "part": job.path}
    return Result(static, policy, total, report, gated, traced.inputs, job.seconds, metadata)


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
    if config.integer_joins and config.numerics.joins:
        batches = calibration_batches(data, inputs, config.calibration_batches, bounds=bounds_of(static))
        # reason: synthetic input has no outliers to cut off
        method = config.ranges if data is not None else "minmax"
        options: dict[str, Any] = {"known": observed.analytic_histograms(), "zero_points": config.numerics.zero_points}
        static = integer_joins(static, batches, method=method, **options)
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
    versions = {f"version of {name}": current_versions()[name] for name in ("sbs_fx", "torch")}
    identity = {**identity, **versions, **config.model_dump(mode="json")}
    first, directory = Processes().is_first, os.path.join(output_dir, "checkpoints")
    with Checkpoints(directory, identity, restart=restart, writes=first) as checkpoints:
        yield checkpoints
