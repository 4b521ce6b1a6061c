"""`evaluate`: how good a graph is at its task, and what all of training needs to run one."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sbs_fx.data.batches import Tensors, check_labels, has_rows, read_batches
from sbs_fx.data.prepared import Prepare, prepared
from sbs_fx.passes.dialects import Static, dialect_of
from sbs_fx.passes.static.fused import fused
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import DataError, InputError, SbsError
from sbs_fx.training.metrics import metric_of, truth
from sbs_fx.training.task import Task, own, task_of


@boundary("evaluate")
def evaluate(
    module: nn.Module,
    data: Iterable[Any],
    max_batches: int | None = None,
    *,
    task: Task | str | None = None,
    prepare: Prepare | None = None,
    reference: nn.Module | None = None,
) -> float:
    """The metric of a task, in percent unless it is one of your own: top-1 accuracy for classification, mean IoU for
    segmentation, COCO's mean average precision for detection, the explained variance for regression, the share whose
    nearest neighbour is of the same class for embeddings. In eval mode, without gradients; the module is left in the
    mode it was in.

    Args:
        module: a traced, gated or static graph, or any module.
        data: yields (images, targets), or what `compress` reads. prepare: as there.
        task: None: what the graph says; classification for a module that is no graph.
        reference: the float model, whose outputs stand in for targets where a batch has none that the metric reads, as
            for "matching".

    Raises:
        DataError: no batch, targets missing or of another form, an iterable that raises.
        InputError: outputs that are not of the task's form, or a metric that gives no number.

    >>> 0 <= evaluate(result.model, batches) <= 100  # percent
    True
    """
    device = device_of(module)
    task = task_of(module) if task is None else Task.of(task)
    metric, names = metric_of(task), _names(module)
    batches = read_batches(prepared(data, names, prepare), inputs=len(names), max_batches=max_batches)
    module = runs(module)
    with mode(module, training=False), mode(reference, training=False), torch.no_grad():
        for index, inputs, targets in batches:
            inputs = tuple(x.to(device) for x in inputs)
            output = _run(module, inputs, index)
            if reference is not None and not _reads(task, targets, len(inputs[0])):
                targets = truth(task, reference(*inputs))
            _check(task, output, targets, index)
            targets = pytree.tree_map_only(Tensor, lambda x: x.to(device), targets)
            own("metric", index, metric.update, task.predicted(output), targets)
    value = metric.compute()
    if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise InputError(f"the task's metric gives a {type(value).__name__}; expected one number from `compute()`")
    return float(value)


def runs(module: nn.Module) -> nn.Module:
    """What gives the values of a module in the least time: of a static graph, its fused form, any other itself."""
    return fused(module) if isinstance(module, fx.GraphModule) and isinstance(dialect_of(module), Static) else module


def _reads(task: Task, targets: Any, images: int) -> bool:
    """Whether the metric reads such targets."""
    if task.metric is not None or task.name == "detection":
        return targets is not None
    return task.name != "matching" and has_rows(targets, images)


def _check(task: Task, output: Any, targets: Any, index: int) -> None:
    """Raises DataError for targets that are not there or not of the metric's form."""
    if task.metric is not None:
        return
    if task.name == "classification":
        (logits,) = task.tensors(output)
        if not isinstance(targets, Tensor) or targets.shape != logits.shape:
            check_labels(targets, logits.shape[1], index)
    elif (
        targets is None
        or task.name != "detection"
        and isinstance(targets, (list, tuple, dict)) != (len(task.tensors(output)) > 1)
    ):
        raise DataError(
            f"batch {index} has no targets that the task {task.name!r} is measured by; give them, or reference=, the "
            "float model, to measure how far the two agree"
        )


def _names(module: nn.Module) -> list[str]:
    """Of the tensors that a module takes: of a graph's inputs, or of the arguments that `forward` cannot do without."""
    if isinstance(module, fx.GraphModule):
        return [node.name for node in module.graph.find_nodes(op="placeholder")]
    parameters = inspect.signature(module.forward).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in places if p.default is p.empty]
    return needed or [p.name for p in places[:1]] or ["images"]


def _run(module: nn.Module, inputs: Tensors, index: int) -> Any:
    try:
        return module(*inputs)
    except SbsError:
        raise
    except Exception as error:  # reason: whatever a module raises on what it does not take
        forms = ", ".join(f"{x.dtype} of shape {tuple(x.shape)}" for x in inputs)
        raise DataError(
            f"the model does not run on batch {index}, {forms}: {type(error).__name__}: {error}; give data as the "
            "model takes it"
        ) from error


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter or buffer is; the CPU if there is none."""
    tensors: Iterator[Tensor] = (t for kind in (module.parameters(), module.buffers()) for t in kind)
    return next((t.device for t in tensors), torch.device("cpu"))


@contextmanager
def mode(module: nn.Module | None, *, training: bool) -> Iterator[None]:
    """Put a module, if there is one, into a mode, and every sub-module back into its own afterwards."""
    before = {m: m.training for m in module.modules()} if module is not None else {}
    for m in before:
        m.training = training
    try:
        yield
    finally:
        for m, was in before.items():
            m.training = was
