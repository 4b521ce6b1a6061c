"""`Task`: what a model's outputs mean.

In: outputs of a network, of the float model, or targets. Out: a loss, or a distance. Holds: where nothing is
said, logits of shape (batch, classes) are classification, and all else is matched to the float model's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sbs_fx.data.batches import has_rows
from sbs_fx.plan.errors import DataError, InputError, SbsError

Outputs = list[Tensor]  # (batch, ...) each


def tensors_of(output: Any) -> Outputs:
    """The floating tensors of a model's output, in order. Raises InputError if there is none."""
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise InputError(f"the model gives a {type(output).__name__} without a floating tensor: nothing to compare")
    return tensors


@dataclass(frozen=True)
class Task:
    """What outputs mean. `Task(loss=...)` is one of your own: outputs are matched to the float model's.

    >>> Task("segmentation").name
    'segmentation'
    >>> own = Task(outputs=lambda output: output["logits"], loss=torch.nn.functional.cross_entropy)

    Attributes:
        name: "classification": logits (batch, classes). "segmentation": logits (batch, classes, *positions).
            "matching": every output, by its squared difference from the float model's over that one's variance.
            "embedding": the first output, by the angle to the float model's. "regression": as "matching", against
            targets by the squared error. "detection": as "matching"; targets are read by a loss of your own.
        outputs: output of the model -> the tensors that count; None: those that the name says.
        loss: (tensors, targets) -> mean loss, a scalar; None: that of the name, or none.
        metric: makes what measures predictions against targets: `update(predictions, targets)` a batch, `compute()` in
            the end, the more the better, as the metrics of torchmetrics do; None: that of the name
            (`sbs_fx.training.metrics`), in percent.
        predictions: output of the model -> what the metric reads: in detection a dict an image, with "boxes" (n, 4) as
            (left, top, right, bottom), "scores" (n,) and "labels" (n,); None: the tensors, or the tensor if it is one.
    """

    name: str = "matching"
    outputs: Callable[[Any], Outputs] | None = None
    loss: Callable[[Outputs, Any], Tensor] | None = None
    metric: Callable[[], Any] | None = None
    predictions: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"unknown task {self.name!r}; expected one of {', '.join(NAMES)}, or a Task of your own")

    @classmethod
    def of(cls, task: Task | str) -> Task:
        """A task by its name, or as it is. Raises InputError for anything else."""
        if not isinstance(task, (Task, str)):
            raise InputError(f"task={task!r}; expected one of {', '.join(NAMES)}, or a Task of your own")
        return cls(task) if isinstance(task, str) else task

    @property
    def is_categorical(self) -> bool:
        """Whether outputs are logits over dimension 1."""
        return self.name in ("classification", "segmentation")

    def tensors(self, output: Any) -> Outputs:
        """The tensors that count. Raises InputError if the output is of another form."""
        tensors = tensors_of(output) if self.outputs is None else list(self.outputs(output))
        if not tensors or not all(isinstance(x, Tensor) for x in tensors):
            raise InputError(f"Task.outputs gives {tensors!r}; expected the tensors that count, at least one")
        if self.name in ("classification", "segmentation", "embedding"):
            tensors = tensors[:1]
        if self.name == "classification" and tensors[0].ndim != 2 or self.is_categorical and tensors[0].ndim < 2:
            raise InputError(
                f"the model gives {tuple(tensors[0].shape)}; {self.name} needs logits of shape (batch, classes"
                f"{', *positions' if self.name == 'segmentation' else ''}): name another task"
            )
        return [x.float() for x in tensors]

    # -- against the float model -----------------------------------------------------------------------------------

    def reference(self, output: Any) -> Outputs:
        """What is kept of the float model's output: log-probabilities, unit vectors, or the values."""
        tensors = self.tensors(output)
        if self.is_categorical:
            return [F.log_softmax(tensors[0], dim=1)]
        if self.name == "embedding":
            return [F.normalize(tensors[0].flatten(1), dim=1)]
        return tensors

    def divergence(self, output: Any, reference: Outputs) -> Tensor:
        """Mean distance of an example from the float model's: nats of KL (a position, where there are several), 1 -
        cos, or the squared difference over the variance."""
        tensors = self.tensors(output)
        if self.is_categorical:
            (teacher,) = reference
            divergence = F.kl_div(F.log_softmax(tensors[0], dim=1), teacher, reduction="batchmean", log_target=True)
            return divergence / max(1, math.prod(teacher.shape[2:]))
        if self.name == "embedding":
            return (1 - (F.normalize(tensors[0].flatten(1), dim=1) * reference[0]).sum(1)).mean()
        parts = [(x - y).square().mean() / _variance(y) for x, y in zip(tensors, reference, strict=True)]
        return torch.stack(parts).mean()

    def sampled(self, output: Any, generator: torch.Generator) -> Tensor:
        """A scalar whose gradients, squared, are in the mean the curvature of the divergence: a log-likelihood at
        targets drawn from the model's own predictions (the Fisher information), summed over examples."""
        tensors = self.tensors(output)
        if self.is_categorical:
            logits = tensors[0].flatten(2).transpose(1, 2).flatten(0, 1) if tensors[0].ndim > 2 else tensors[0]
            drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
            positions = len(logits) / len(tensors[0])
            return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum") / math.sqrt(positions)
        total = tensors[0].new_zeros(())
        for x in tensors:
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            share = math.sqrt(2 / len(tensors) / max(1, x[0].numel()))
            total = total + share * (noise * x).sum() / _variance(x.detach()).sqrt()
        return total

    @property
    def is_of_reference(self) -> bool:
        """Whether outputs are compared with the float model's, by a loss or a metric that is not of its own."""
        return self.name in ("matching", "embedding", "detection")

    # -- against targets -------------------------------------------------------------------------------------------

    def readable(self, targets: Any, images: int) -> Any:
        """The targets, or None where the task's own loss reads no such thing: file names, boxes beside images."""
        return targets if self.loss is not None or has_rows(targets, images) else None

    def fits(self, output: Any, targets: Any) -> bool:
        """Whether targets are of the form that the task's loss reads."""
        if targets is None or self.loss is None and self.is_of_reference:
            return False
        if self.loss is not None:
            return True
        (logits, *_) = self.tensors(output)
        if self.name == "regression":
            return targets.shape == logits.shape
        whole = targets.shape == (len(logits), *logits.shape[2:]) and not targets.is_floating_point()
        return whole or targets.shape == logits.shape

    def loss_of(self, output: Any, targets: Any, smoothing: float = 0.0, batch: int = 0) -> Tensor:
        """Mean loss against targets of batch `batch`. Whole numbers are classes (in segmentation one that there is not
        counts nothing, such as 255); distributions and several labels at once have the shape of the logits. Raises
        DataError where a loss of one's own cannot read them."""
        tensors = self.tensors(output)
        if self.loss is not None:
            return own("loss", batch, self.loss, tensors, targets)
        if self.name == "regression":
            return F.mse_loss(tensors[0], targets.float())
        if targets.shape == tensors[0].shape:
            if has_several_labels(targets):
                return F.binary_cross_entropy_with_logits(tensors[0], targets.float())
            return F.cross_entropy(tensors[0], targets.float())
        if self.name == "segmentation":
            targets = counted(targets, tensors[0].shape[1])
        return F.cross_entropy(tensors[0], targets, label_smoothing=smoothing, ignore_index=IGNORED)

    # -- how good it is --------------------------------------------------------------------------------------------

    def predicted(self, output: Any) -> Any:
        """What the metric reads."""
        if self.predictions is not None:
            return self.predictions(output)
        tensors = self.tensors(output)
        return tensors[0] if len(tensors) == 1 else tensors


_KEY, IGNORED = "sbs_fx_task", -100
NAMES = ("classification", "segmentation", "detection", "matching", "embedding", "regression")
CLASSIFICATION = Task("classification")


def set_task(graph: fx.GraphModule, task: Task | str | None) -> None:
    """Say what a graph's outputs mean; copies of it, gated or slim, say the same. Raises InputError for no task."""
    graph.meta[_KEY] = _inferred(graph) if task is None else Task.of(task)


def task_of(module: nn.Module) -> Task:
    """What was said of a graph; where nothing was, classification if its one output is (batch, classes), or if it is no
    graph, else matching."""
    meta = module.meta if isinstance(module, fx.GraphModule) else {}
    return meta[_KEY] if _KEY in meta else _inferred(module)


def _inferred(module: nn.Module) -> Task:
    if not isinstance(module, fx.GraphModule):
        return CLASSIFICATION
    (output,) = module.graph.find_nodes(op="output")
    values = [leaf.meta.get("val") for leaf in pytree.tree_leaves(output.args) if isinstance(leaf, fx.Node)]
    return CLASSIFICATION if len(values) == 1 and (values[0] is None or getattr(values[0], "ndim", 0) == 2) else Task()


def has_several_labels(targets: Tensor) -> bool:
    """Whether rows (batch, classes, ...) are several labels at once rather than distributions."""
    return bool((targets.sum(1) - 1).abs().max() > 1e-3)


def counted(targets: Tensor, classes: int) -> Tensor:
    """Targets with `IGNORED` for classes that there are not."""
    return torch.where((targets < 0) | (targets >= classes), IGNORED, targets)


def own(what: str, batch: int, function: Callable[..., Any], *args: Any) -> Any:
    """A function of the user's; what it raises is said with the batch."""
    try:
        return function(*args)
    except SbsError:
        raise
    except Exception as error:
        raise DataError(
            f"the task's {what} raised {type(error).__name__} at batch {batch}: {error}; mend it, or the targets that "
            "the data or `prepare` gives"
        ) from error


def _variance(x: Tensor) -> Tensor:
    return x.float().var(correction=0).clamp_min(1e-12)
