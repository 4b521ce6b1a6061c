"""`compare`: several methods on one model at one or several budgets, measured alike.

In: a float model, data, budgets, names of methods. Out: a `Comparison`, one point a method and budget, with accuracy
before and after fine-tuning, costs and the time to the policy. Holds: a method that fails is a point that says why,
and the others go on; with an output directory each point is written as it is found, and the same call again goes on
after the last one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sbs_fx.compression import compress, tune
from sbs_fx.config import Config
from sbs_fx.data.prepared import Prepare
from sbs_fx.job import Data, Job, Progress
from sbs_fx.models import create_model
from sbs_fx.models import example_inputs as derive_inputs
from sbs_fx.passes import finalize, trace
from sbs_fx.passes.capture.export import Dynamic
from sbs_fx.passes.capture.part import Part
from sbs_fx.passes.capture.signature import Inputs
from sbs_fx.plan import Budget, current_versions, write_atomic
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import InputError, Interrupted, SbsError
from sbs_fx.plan.files import prepare_directory
from sbs_fx.report.comparison import Comparison, Point
from sbs_fx.result import Result
from sbs_fx.search.registry import METHODS
from sbs_fx.training import Checkpoints, evaluate
from sbs_fx.training.metrics import metric_name
from sbs_fx.training.progress import Observer
from sbs_fx.training.randomness import random_state_kept
from sbs_fx.training.task import CLASSIFICATION, Task


@random_state_kept()
@boundary("compare")
def compare(
    model: nn.Module | str,
    data: Data,
    budget: Budget | float | str | Sequence[Budget | float | str] = 0.05,
    *,
    methods: Sequence[str] = ("uniform", "sbs"),
    example_inputs: Inputs | None = None,
    part: str | None = None,
    dynamic: Dynamic | None = None,
    task: Task | str | None = None,
    prepare: Prepare | None = None,
    validation: Data | None = None,
    epochs: int = 0,
    config: Config | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> Comparison:
    """Compress a model by each method at each budget, and measure what comes out.

    >>> table = sbs_fx.compare(net, batches, ("6%", "4%"), methods=("opq", "uniform"), example_inputs=images)
    >>> len(table.points)
    4

    Args:
        model, example_inputs, dynamic, task, prepare: as for `compress`. data: (images, targets), iterable more than
            once: what methods calibrate, search and fine-tune on.
        part: as for `compress`: data and validation are still the whole's, and what is measured are the part's outputs
            against the float part's, unless `task` says otherwise.
        budget: one, or several for a curve.
        methods: names as for `compress`.
        validation: held-out (images, targets) that the task's metric is measured on; None: `data` itself.
        epochs: of fine-tuning, after the accuracy without it was measured; 0: none.
        config: settings of all methods; its `epochs` are not used.
        output_dir: where each point is written, and read again if it is there already with the same settings, model and
            weights; the table, the JSON and the plot as well.

    Raises:
        MethodError: an unknown method. SbsError: the model cannot be measured, or has no such part. Errors of a
            method become its point's.
    """
    for name in methods:
        if name != "auto":
            METHODS[name]  # reason: an unknown one is to be known before hours are spent
    budgets: list[Any] = [budget]
    if not isinstance(budget, (Budget, float, int, str)):
        with suppress(TypeError):  # reason: what is neither one nor several is refused as one
            budgets = list(budget)
    if not budgets or not methods:
        raise InputError(f"budget={budget!r}, methods={methods!r}; expected at least one budget and one method")
    limits = [Budget.of(b) for b in budgets]
    config = (config or Config()).model_copy(update={"epochs": 0})
    module = create_model(model) if isinstance(model, str) else model
    judged: Any = data if validation is None else validation
    directory = None if output_dir is None else prepare_directory(output_dir)
    call: dict[str, Any] = {"example_inputs": example_inputs, "dynamic": dynamic, "task": task, "prepare": prepare}
    measured, of_part = module, None
    if part is not None:
        of_part = Part(module, part, derive_inputs(module) if example_inputs is None else example_inputs)
        measured = trace(of_part.module, of_part.call, dynamic=dynamic)
        judged = of_part.data(judged, prepare)
        call["part"] = part
    trial = _Trial(module, measured, of_part, call, data, judged, epochs, config, observer)
    weights, of_task = _digest(module), trial.task
    comparison = Comparison(
        part="" if of_part is None else str(of_part),
        float_accuracy=trial.accuracy(measured),
        metric=metric_name(of_task),
        held_out=validation is not None,
        epochs=epochs,
    )
    for limit, method in itertools.product(limits, methods):
        settings = {
            "weights": weights,
            "part": part,
            "method": method,
            "task": of_task.name,
            "budget": limit.asked,
            "epochs": epochs,
            "config": config.model_dump(mode="json"),
            "versions": current_versions(),
        }
        place = None if directory is None else _place(directory, method, limit)
        point = None if place is None else _known(place, settings)
        if point is None:
            if progress is not None:
                progress(f"{method} at {limit}", len(comparison.points) / (len(limits) * len(methods)))
            point = trial.point(method, limit, place, settings)
            if place is not None:
                _write(place, settings, point)
        comparison = comparison.model_copy(update={"points": (*comparison.points, point)})
        if directory is not None:
            comparison.save(directory)
    return comparison


@dataclass(frozen=True)
class _Trial:
    """What all points of a comparison share."""

    module: nn.Module
    measured: nn.Module  # the float model, or the part of it as a graph
    part: Part | None
    call: dict[str, Any]  # what `compress` is called with
    data: Data
    judged: Any  # of `measured`
    epochs: int
    config: Config
    observer: Observer | None

    @property
    def task(self) -> Task:
        task = self.call["task"]
        if task is None:
            return CLASSIFICATION if self.part is None else Task("matching")
        return Task.of(task)

    def accuracy(self, module: nn.Module) -> float:
        """The task's metric; where it is none of targets, how far the model agrees with the float one."""
        prepare = self.call["prepare"] if self.part is None else None
        return evaluate(module, self.judged, task=self.task, prepare=prepare, reference=self.reference)

    @property
    def reference(self) -> nn.Module | None:
        return self.measured if self.task.is_of_reference else None

    def point(self, method: str, limit: Budget, place: str | None, settings: dict[str, Any]) -> Point:
        try:
            result = compress(
                self.module,
                **self.call,
                budget=limit,
                data=self.data,
                method=method,
                config=self.config,
                output_dir=place,
                observer=self.observer,
            )
        except Interrupted:
            raise
        except SbsError as error:
            outcome = f"{type(error).__name__}: {error}"
            return Point(method=method, budget=limit.limits, amounts=limit.amounts, outcome=outcome)
        cost, whole = result.cost, result.baseline_cost
        return Point(
            method=method,
            budget=limit.limits,
            amounts=limit.amounts,
            accuracy=self.accuracy(result.model),
            tuned_accuracy=self._tuned(result, place, settings) if self.epochs else None,
            seconds=result.seconds["search"],
            bops=cost.bops,
            bops_ratio=whole.bops / cost.bops,
            size_ratio=whole.stored_bits / cost.stored_bits,
            macs_share=cost.macs / whole.macs,
        )

    def _tuned(self, result: Result, place: str | None, settings: dict[str, Any]) -> float:
        """The accuracy after fine-tuning what `compress` gave."""
        with ExitStack() as stack:
            checkpoints = None
            if place is not None:
                checkpoints = stack.enter_context(Checkpoints(os.path.join(place, "fine-tuning"), settings))
            config = self.config.model_copy(update={"epochs": self.epochs})
            job = Job(config, self.data, observer=self.observer)
            job.part = self.part
            job.prepare(result.gated, self.call["prepare"])
            job.checkpoints = checkpoints
            tune(result.gated, self.measured, job, frozen_masks=bool(result.policy.nonzeros))
        return self.accuracy(finalize(result.gated))


# -- points on disk ----------------------------------------------------------------------------------------------------


def _place(directory: str, method: str, limit: Budget) -> str:
    name = "-".join([method, *(f"{measure}-{share:g}" for measure, share in {**limit.limits, **limit.amounts}.items())])
    return os.path.join(directory, "points", name)


def _known(place: str, settings: dict[str, Any]) -> Point | None:
    """A point that was found with these settings before, and did not fail."""
    try:
        with open(os.path.join(place, "point.json"), encoding="utf-8") as file:
            saved = json.load(file)
        point = Point(**saved["point"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return point if saved["settings"] == json.loads(json.dumps(settings)) and point.outcome == "ok" else None


def _write(place: str, settings: dict[str, Any], point: Point) -> None:
    os.makedirs(place, exist_ok=True)
    text = json.dumps({"settings": settings, "point": point.model_dump()}, indent=1) + "\n"
    write_atomic(os.path.join(place, "point.json"), text.encode())


def _digest(module: nn.Module) -> str:
    """Of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + bytes(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
