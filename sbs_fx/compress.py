"""`compress` and `apply`: a float model in, a static quantised graph out, under a budget that is met.

In: a module (or a timm model name), a budget or a saved policy, maybe data. Out: a `Result` with the graph, the plan
and what both cost. Read `compress` top to bottom for the list of passes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sbs_fx.calibration.calibrate import calibrate, calibration_batches
from sbs_fx.calibration.reconstruction import refine
from sbs_fx.config import Config
from sbs_fx.export import Runner, export, runner, save_pt2
from sbs_fx.export.benchmark import Benchmark, benchmark
from sbs_fx.export.latency import latency_model
from sbs_fx.models import create_model, input_config
from sbs_fx.models import example_inputs as derive_inputs
from sbs_fx.passes import (
    ChannelGroups,
    CostModel,
    apply_bits,
    channel_groups,
    cost_model,
    finalize,
    insert_gates,
    integer_grid,
    integer_joins,
    on_device,
    slim,
    trace,
)
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.passes.graph import with_tensors
from sbs_fx.plan import Budget, Cost, Policy, current_versions
from sbs_fx.plan.errors import FileError, GraphError, WeightsError
from sbs_fx.report import Report
from sbs_fx.search import Searched
from sbs_fx.search.methods import QUICK, Traced, chosen_method, find_plan, with_norms
from sbs_fx.training import Checkpoints, TrainingStage, fine_tune
from sbs_fx.training.frozen import FrozenMasks
from sbs_fx.training.processes import Processes
from sbs_fx.training.progress import Observer

Data = Iterable[Any]
Progress = Callable[[str, float], None]


@dataclass
class Result:
    """What `compress` gives back.

    Attributes:
        model: the static quantised graph, eval mode, plain ATen and `quantized_decomposed` operators, on the device of
            the float model; what is saved, exported, compiled or timed is on the CPU.
        policy: the plan it was made from. cost, baseline_cost: of the graph and of the float model.
        report: layers, groups and pins as text and as data.
        gated: the same network with fake quantisation, for further training; `finalize` turns it into `model` again.
        masked: single weights are zero, and stay so in fine-tuning; `cost` counts them as coded.
        metadata: kept in files: "mean" and "std" of images, where the model's configuration has them.
        seconds: time spent per stage.
    """

    model: fx.GraphModule
    policy: Policy
    cost: Cost
    report: Report
    gated: fx.GraphModule
    example_inputs: tuple[torch.Tensor, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    masked: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def baseline_cost(self) -> Cost:
        assert self.cost.reference is not None
        return self.cost.reference

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `policy.json`, `model.pt2` and the report (`.txt`, `.json`) into `directory`, each whole or not at all.

        Raises:
            FileError: the directory is a file or cannot be written, or the disk is full.
        """
        path = prepare_directory(directory)
        save_pt2(*self._on_cpu(), os.path.join(path, "model.pt2"), self.metadata)
        self.policy.save(os.path.join(path, "policy.json"))
        for name in ("report.txt", "report.json"):
            self.report.save(os.path.join(path, name))

    def export(self, format: str, path: str | os.PathLike[str], **options: Any) -> Runner:
        """Write `model` as a file of another tool; see `sbs_fx.export.export`."""
        return export(*self._on_cpu(), format, path, **{"metadata": self.metadata, **options})

    def compiled(self) -> Runner:
        """`model` under torch's compiler with int8 kernels; `kernels` says which layers reached one.

        Raises:
            BackendError: torchao is not installed, or the compiler fails or computes something else.
        """
        return runner(*self._on_cpu(), "inductor")

    def benchmark(self, **options: Any) -> Benchmark:
        """Latency on the backends at hand and the fastest of them; see `sbs_fx.export.benchmark.benchmark`."""
        return benchmark(*self._on_cpu(), **options)

    def _on_cpu(self) -> tuple[fx.GraphModule, tuple[torch.Tensor, ...]]:
        if all(x.device.type == "cpu" for x in self.example_inputs):
            return self.model, self.example_inputs
        return on_device(self.model, "cpu"), tuple(x.cpu() for x in self.example_inputs)

    def __str__(self) -> str:
        return str(self.report)


def compress(
    model: nn.Module | str,
    example_inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    budget: Budget | float | str = 0.05,
    data: Data | None = None,
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
        model: a module that `torch.export` can capture, or a timm model name. It is not changed.
        example_inputs: tensor(s) of shape (batch of 2 or more, ...); default: from the model's `pretrained_cfg`.
        budget: shares of the float model; a number or text means BOPs.
        data: iterable of (images, labels) or images, normalised as the model expects; None: data-free.
        method: "opq" and "uniform" need no data, "two_stage" images, "ajpq" labelled ones; "sbs" trains on them, as do
            the methods that papers compare it with ("prune_then_quantise", "multi_path", "bayesian_bits").
            "auto": "opq" without data, "two_stage" with it, "sbs" if epochs of fine-tuning are asked for.
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
    method = chosen_method(method, data is not None, config.epochs)
    budget = budget if isinstance(budget, Budget) else Budget.parse(str(budget))
    if output_dir is not None:
        prepare_directory(output_dir)
    job = _Job(progress, observer)
    traced = _traced(model, example_inputs, config, job, timed="latency" in budget.limits)
    with _checkpoints(output_dir, traced, method, budget, config, restart) as checkpoints:
        job.stage("search", 0.35)
        searched = find_plan(traced, method, budget, data, config, checkpoints, observer)
        result = _realise(traced, searched, data, config, job, validation, checkpoints)
        if not budget.is_satisfied_by(result.cost):
            raise GraphError(
                f"the result costs {budget.shares(result.cost)} of the float model, over {budget}", pass_name="compress"
            )
        if output_dir is not None and Processes().is_first:
            job.stage("save", 0.95)
            result.save(output_dir)
    job.stage("done", 1.0)
    return result


def apply(
    model: nn.Module | str,
    policy: Policy,
    example_inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    data: Data | None = None,
    config: Config | None = None,
    validation: Data | None = None,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> Result:
    """A saved policy onto the float model again: what `compress` does after its search.

    Raises:
        PolicyMismatch: the policy belongs to another model; names what differs.
    """
    config = config or Config()
    job = _Job(progress, observer)
    traced = _traced(model, example_inputs, config, job)
    return _realise(traced, with_norms(traced, policy, config), data, config, job, validation, None)


def _traced(
    model: nn.Module | str,
    example_inputs: torch.Tensor | Sequence[torch.Tensor] | None,
    config: Config,
    job: _Job,
    timed: bool = False,
) -> Traced:
    job.stage("trace", 0.0)
    module = create_model(model) if isinstance(model, str) else model
    _check_weights(module)
    inputs = derive_inputs(module) if example_inputs is None else example_inputs
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    graph = trace(module, inputs)
    job.stage("channel groups", 0.3)
    groups = channel_groups(graph, keep_outputs=config.keep_outputs)
    cost = cost_model(graph, groups)
    if timed:
        job.stage("latency", 0.32)
        cost = cost_model(graph, groups, latency_model(graph, groups, cost, inputs, config.latency))
    known = input_config(module)
    return Traced(graph, groups, cost, inputs, {k: list(known[k]) for k in ("mean", "std") if k in known})


def _realise(
    traced: Traced,
    searched: Searched,
    data: Data | None,
    config: Config,
    job: _Job,
    validation: Data | None,
    checkpoints: Checkpoints | None,
) -> Result:
    """Slim, gate, calibrate, maybe fine-tune or refine, finalise."""
    groups, cost, policy = traced.groups, traced.cost, searched.policy
    policy.check(groups.fingerprint, {g.name: g.size for g in groups.values()}, cost.weights, cost.activations)
    job.stage("slim", 0.4)
    weight_bits = kept_bits(groups, cost, policy)
    slimmed = slim(with_tensors(traced.graph, searched.tensors), groups, policy.kept)
    gated = insert_gates(slimmed, groups, channels=False)
    apply_bits(gated, weight_bits, policy.activation_bits)
    job.stage("calibrate", 0.5)
    calibrate(gated, data, inputs=traced.inputs, method=config.ranges, max_batches=config.calibration_batches)
    masked = searched.coded is not None
    if config.epochs and data is not None:
        job.stage("fine-tune", 0.6)
        tune(gated, traced.graph, data, config, masked, validation, checkpoints, job.observer)
    elif data is not None and policy.method == "two_stage":
        job.stage("refine", 0.6)
        refine(
            gated,
            traced.graph,
            data,
            inputs=traced.inputs,
            groups=groups,
            kept=policy.kept,
            settings=config.refinement,
            seed=config.seed,
        )
    job.stage("finalise", 0.9)
    static = _integer(finalize(gated), data, traced.inputs, config)
    total = searched.coded or cost.evaluate(policy.kept, weight_bits, policy.activation_bits)
    report = Report.of(groups, cost, policy, total, searched.notes)
    job.close()
    return Result(static, policy, total, report, gated, traced.inputs, job.seconds, masked, traced.metadata)


def _integer(
    static: fx.GraphModule, data: Data | None, inputs: tuple[torch.Tensor, ...], config: Config
) -> fx.GraphModule:
    """A static graph in the form that compilers for integer kernels keep whole."""
    if config.integer_joins:
        batches = calibration_batches(data, inputs, config.calibration_batches)
        # reason: synthetic input has no outliers to cut off
        static = integer_joins(static, batches, method=config.ranges if data is not None else "minmax")
    return integer_grid(static, exact=config.exact)


def tune(
    gated: fx.GraphModule,
    teacher: nn.Module,
    data: Data,
    config: Config,
    masked: bool,
    validation: Data | None,
    checkpoints: Checkpoints | None,
    observer: Observer | None,
) -> None:
    """Fine-tune as the settings say, in place; weights that are `masked` stay zero."""
    fine_tune(
        gated,
        data,
        epochs=config.epochs,
        lr=config.learning_rate,
        settings=config.training,
        teacher=teacher if config.training.distillation else None,
        validation=validation,
        seed=config.seed,
        checkpoints=checkpoints,
        progress=observer,
        stage=FrozenMasks if masked else TrainingStage,
    )


@contextmanager
def _checkpoints(
    output_dir: str | os.PathLike[str] | None,
    traced: Traced,
    method: str,
    budget: Budget,
    config: Config,
    restart: bool,
) -> Iterator[Checkpoints | None]:
    """Where training saves itself, if it trains and there is a place."""
    if output_dir is None or (method in QUICK and not config.epochs):
        yield None
        return
    identity = {
        "model": traced.groups.fingerprint,
        "method": method,
        "budget": budget.limits,
        "version": current_versions()["sbs_fx"],
        **config.model_dump(mode="json"),
    }
    first = Processes().is_first
    with Checkpoints(os.path.join(output_dir, "checkpoints"), identity, restart=restart, writes=first) as found:
        yield found


def kept_bits(groups: ChannelGroups, cost: CostModel, policy: Policy) -> dict[str, int | list[int]]:
    """Weight bits of the slim graph: where a policy has one number per output channel, those of the kept channels."""
    index = Slices(groups, policy.kept)
    result: dict[str, int | list[int]] = {}
    outputs = {name: dims[dim] for layer in cost.layers for name, (dims, dim) in layer.weights.items()}
    for name, bits in policy.weight_bits.items():
        result[name] = bits if isinstance(bits, int) else [bits[i] for i in index.index(outputs[name]).tolist()]
    return result


def _check_weights(module: nn.Module) -> None:
    """Refuse NaN and Inf before anything is computed from them."""
    names = [n for n, p in module.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if names:
        raise WeightsError(
            f"NaN or Inf in {len(names)} parameters, the first: {names[:3]}; load sound weights", names=names
        )


def prepare_directory(directory: str | os.PathLike[str]) -> str:
    """Make sure that results can be written there, before hours are spent. Raises FileError."""
    path = os.fspath(directory)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"cannot make the output directory {path!r}: {error.strerror}; expected a new name or a directory"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise FileError(f"the output directory {path!r} is not writable")
    return path


class _Job:
    """Reports stages and keeps their times."""

    def __init__(self, progress: Progress | None, observer: Observer | None) -> None:
        self.progress, self.observer = progress, observer
        self._current: str | None = None
        self._since = time.perf_counter()
        self.seconds: dict[str, float] = {}

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
