"""How good outputs are, in percent, the more the better: what each task is measured by.

In: predictions and targets, batch by batch. Out: one number. Holds: a metric reads what `Task.predicted` gives, and
targets of the form that the task's loss reads, or the float model's outputs in their place (`truth`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sbs_fx.plan.errors import InputError
from sbs_fx.training.task import IGNORED, Task, counted, has_several_labels

_SURE = 0.5  # score from which a box of the float model counts as there


class Metric(Protocol):
    """What measures, as the metrics of torchmetrics do."""

    def update(self, predictions: Any, targets: Any) -> None: ...

    def compute(self) -> Any: ...


class TopOne:
    """Share of images whose greatest logit is that of their class; where they have several, the mean average precision
    of the classes. Logits (batch, classes); classes (batch,), or a value for each class."""

    def __init__(self) -> None:
        self.right = self.total = 0
        self.precision: Any = None

    def update(self, logits: Tensor, targets: Tensor) -> None:
        if targets.shape == logits.shape:
            if has_several_labels(targets):
                from torchmetrics.classification import MultilabelAveragePrecision

                self.precision = self.precision or MultilabelAveragePrecision(logits.shape[1])
                self.precision.update(logits.float().cpu(), (targets > 0.5).long().cpu())
                return
            targets = targets.argmax(1)
        self.right += int((logits.argmax(1) == targets).sum())
        self.total += len(targets)

    def compute(self) -> float:
        if self.precision is not None:
            return 100 * float(self.precision.compute())
        return 100 * self.right / self.total


class MeanIoU:
    """Mean of the classes' intersections over unions, of those that occur. Logits (batch, classes, *positions); classes
    (batch, *positions), of which those that there are not count nothing."""

    def __init__(self) -> None:
        self.index: Any = None

    def update(self, logits: Tensor, targets: Tensor) -> None:
        from torchmetrics.classification import MulticlassJaccardIndex

        classes = logits.shape[1]
        self.index = self.index or MulticlassJaccardIndex(classes, ignore_index=IGNORED)
        targets = targets.argmax(1) if targets.shape == logits.shape else counted(targets, classes)
        self.index.update(logits.argmax(1).cpu(), targets.cpu())

    def compute(self) -> float:
        return 100 * float(self.index.compute())


class Explained:
    """Share of the targets' variance that is explained (R squared), the mean over outputs; targets are shaped alike."""

    def __init__(self) -> None:
        self.scores: list[Any] = []

    def update(self, predictions: Any, targets: Any) -> None:
        from torchmetrics.regression import R2Score

        pairs = [(predictions, targets)] if isinstance(predictions, Tensor) else zip(predictions, targets, strict=True)
        for i, (x, y) in enumerate(pairs):
            if i == len(self.scores):
                self.scores.append(R2Score().set_dtype(torch.float64))
            self.scores[i].update(x.double().flatten().cpu(), y.double().flatten().cpu())

    def compute(self) -> float:
        return 100 * sum(float(score.compute()) for score in self.scores) / len(self.scores)


class NearestNeighbour:
    """Share of images whose nearest neighbour among the others, by the angle, is of their class; or, where targets are
    embeddings, is the same as among those. Embeddings (batch, ...)."""

    def __init__(self) -> None:
        self.embeddings: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, embeddings: Tensor, targets: Tensor) -> None:
        self.embeddings.append(embeddings.flatten(1).cpu())
        self.targets.append(targets.cpu() if targets.ndim == 1 else targets.flatten(1).cpu())

    def compute(self) -> float:
        nearest, targets = _nearest(torch.cat(self.embeddings)), torch.cat(self.targets)
        right = targets[nearest] == targets if targets.ndim == 1 else nearest == _nearest(targets)
        return 100 * float(right.double().mean())


def _nearest(embeddings: Tensor) -> Tensor:
    units = F.normalize(embeddings.float(), dim=1)
    return (units @ units.T).fill_diagonal_(-torch.inf).argmax(1)


class MeanAveragePrecision:
    """COCO's mean average precision: a dict an image of predictions and of targets, as `Task` says."""

    def __init__(self) -> None:
        try:
            from torchmetrics.detection import MeanAveragePrecision as Coco

            self.coco = Coco()
        except ImportError as error:
            raise InputError(f"{error}: pip install 'sbs-fx[detection]'") from error

    def update(self, predictions: Any, targets: Any) -> None:
        on_cpu = [[{k: v.cpu() for k, v in image.items()} for image in images] for images in (predictions, targets)]
        self.coco.update(*on_cpu)

    def compute(self) -> float:
        return 100 * float(self.coco.compute()["map"])


# Name of the task -> the metric's name, and what makes it.
_METRICS: Mapping[str, tuple[str, type[Metric]]] = {
    "classification": ("top-1", TopOne),
    "segmentation": ("mIoU", MeanIoU),
    "detection": ("mAP", MeanAveragePrecision),
    "regression": ("R2", Explained),
    "matching": ("R2 to the float model", Explained),
    "embedding": ("nearest neighbours", NearestNeighbour),
}


def metric_of(task: Task) -> Metric:
    """A new one. Raises InputError for a detection task that does not say how its outputs become boxes."""
    if task.metric is not None:
        made: Metric = task.metric()
        return made
    if task.name == "detection" and task.predictions is None:
        raise InputError(
            'mAP is of boxes: give Task("detection", predictions=...), a function from the output to a dict an image '
            'with "boxes", "scores" and "labels"'
        )
    return _METRICS[task.name][1]()


def metric_name(task: Task) -> str:
    """Such as "top-1"; that of a metric of one's own is its class's."""
    if task.metric is None:
        return _METRICS[task.name][0]
    return type(task.metric()).__name__


def truth(task: Task, output: Any) -> Any:
    """What the float model's output is as targets."""
    predictions = task.predicted(output)
    if task.metric is None and task.is_categorical:
        return predictions.argmax(1)
    if task.metric is None and task.name == "detection":
        return [{k: image[k][image["scores"] >= _SURE] for k in ("boxes", "labels")} for image in predictions]
    return predictions
