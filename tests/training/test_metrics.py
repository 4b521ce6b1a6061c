"""What tasks are measured by: each metric by hand on a few numbers, and through `evaluate` and `compare`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sbs_fx
from sbs_fx import Task
from sbs_fx.plan.errors import DataError, InputError
from sbs_fx.training import evaluate
from sbs_fx.training.metrics import metric_name, metric_of, truth

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDENTITY = nn.Identity()


def measured(task: Task | str, *batches: tuple[Any, Any]) -> float:
    """Of outputs that are given."""
    return evaluate(IDENTITY, batches, task=task)


def test_top_one_and_several_labels() -> None:
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2], [1, 2, 0], [3, 0, 0]])
    assert measured("classification", (logits, [0, 2, 0, 0])) == 75
    assert measured("classification", (logits, [0, 2, 0, 0]), (logits[:1], [1])) == 60
    soft = torch.tensor([[0.9, 0.1, 0], [0, 0, 1], [0.4, 0.6, 0], [0, 1, 0]])
    assert measured("classification", (logits, soft)) == 75
    several = torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0]])
    # Classes 0 and 1 are ranked first where they are; of class 2 one is first, the other ties with two that are not.
    assert measured("classification", (logits, several)) == pytest.approx(100 * (1 + 1 + (1 + 2 / 4) / 2) / 3)


def test_mean_iou_counts_classes_that_occur() -> None:
    logits = torch.zeros(1, 4, 1, 6)
    logits[0, [0, 0, 1, 1, 2, 2], 0, range(6)] = 1.0
    masks = torch.tensor([[[0, 1, 1, 1, 255, 2]]])
    # Class 0: 1 of 2; class 1: 2 of 3; class 2: 1 of 1, as 255 counts nothing; class 3 does not occur.
    assert measured("segmentation", (logits, masks)) == pytest.approx(100 * (1 / 2 + 2 / 3 + 1) / 3)


def test_explained_variance() -> None:
    targets = torch.tensor([[0.0], [2], [4], [6]])
    assert measured("regression", (targets, targets)) == 100
    assert measured("regression", (targets + 1, targets)) == pytest.approx(100 * (1 - 4 / 20))
    assert measured("regression", (targets[:2] + 1, targets[:2]), (targets[2:] + 1, targets[2:])) == pytest.approx(80)


def test_nearest_neighbours() -> None:
    points = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.9]])
    assert measured("embedding", (points, [0, 0, 1, 1, 0])) == 100  # (1, 0.9) is nearest to (1, 0.1)
    assert measured("embedding", (points, [0, 0, 1, 1, 1])) == 80


def boxes(*rows: tuple[float, ...]) -> dict[str, Tensor]:
    """Left, top, right, bottom, score, label."""
    table = torch.tensor(rows)
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def test_mean_average_precision() -> None:
    pytest.importorskip("torchmetrics.detection")
    task = Task("detection", predictions=lambda output: output)
    right, wrong = boxes((0, 0, 50, 50, 0.9, 1)), boxes((60, 60, 90, 90, 0.8, 1))
    targets = [{k: v for k, v in image.items() if k != "scores"} for image in (right, right)]
    metric = metric_of(task)
    metric.update([right, right], targets)
    assert metric.compute() == pytest.approx(100)
    metric = metric_of(task)
    metric.update([right, wrong], targets)
    assert metric.compute() == pytest.approx(100 * 51 / 101, abs=0.1)  # half of them at precision 1, of 101 points
    assert truth(task, [boxes((0, 0, 5, 5, 0.9, 1), (0, 0, 9, 9, 0.1, 2))])[0]["labels"].tolist() == [1]
    with pytest.raises(InputError, match=r'give Task\("detection", predictions=...\)'):
        metric_of(Task("detection"))


class Sum:
    def __init__(self) -> None:
        self.total = 0.0

    def update(self, predictions: Tensor, targets: Any) -> None:
        self.total += float(predictions.sum()) + targets["more"]

    def compute(self) -> float:
        return self.total


def test_a_metric_of_ones_own() -> None:
    task = Task(metric=Sum)
    assert measured(task, (X, {"more": 5}), (X, {"more": 1})) == pytest.approx(2 * float(X.sum()) + 6)
    assert metric_name(task) == "Sum"
    with pytest.raises(DataError, match=r"metric raised KeyError at batch 1: 'more'"):
        measured(task, (X, {"more": 5}), (X, {}))
    with pytest.raises(InputError, match="gives a dict; expected one number"):
        measured(Task(metric=type("Dict", (Sum,), {"compute": lambda self: {}})), (X, {"more": 0}))


def test_targets_that_are_not_there() -> None:
    with pytest.raises(DataError, match="batch 0 has no labels"):
        measured("classification", (X.flatten(1), None))
    for task in ("segmentation", "embedding", "regression", "matching"):
        with pytest.raises(DataError, match=f"batch 0 has no targets that the task '{task}' is measured by"):
            measured(task, (X, None))


def net(outputs: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, outputs, 1)).eval()


def test_the_float_model_stands_in_for_targets() -> None:
    model = net()
    for task in ("segmentation", "regression", "matching", "embedding"):
        assert evaluate(model, [X, X.flip(0)], task=task, reference=model) == pytest.approx(100)
    result = sbs_fx.compress(model, X, budget=0.1, task="segmentation")
    close = evaluate(result.model, [X], reference=model)
    assert 5 < close <= 100
    assert not math.isnan(close)
    assert close == evaluate(result.model, [(X, model(X).argmax(1))])


def test_comparison_of_a_task() -> None:
    masks = torch.randint(0, 5, (4, 8, 8), generator=torch.Generator().manual_seed(1))
    found = sbs_fx.compare(net(), [{"image": X, "mask": masks}] * 2, 0.1, methods=["uniform"], example_inputs=X,
                           task="segmentation", epochs=1)  # fmt: skip
    assert found.points[0].outcome == "ok"
    assert found.float_accuracy == evaluate(net(), [(X, masks)] * 2, task="segmentation")
    assert "mIoU" in str(found)
    matched = sbs_fx.compare(net(), [X] * 2, 0.1, methods=["uniform"], example_inputs=X, task="matching")
    assert matched.float_accuracy == pytest.approx(100)
    assert 50 < (matched.points[0].accuracy or 0) < 100


class Pair(nn.Module):
    """Two images through one encoder, beside a table without a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        )
        self.table, self.head = nn.Linear(7, 16), nn.Linear(32, 3)

    def forward(self, left: Tensor, right: Tensor, table: Tensor) -> Tensor:
        a, b = (self.encoder(x).mean((2, 3)) for x in (left, right))
        return self.head(torch.cat([a * self.table(table).mean(0), b], 1))


@pytest.mark.parametrize("method", [*sbs_fx.search.registry.methods()])
def test_every_method_with_several_inputs(method: str) -> None:
    model, table = Pair().eval(), torch.randn(5, 7)
    inputs, dynamic = (X, X.flip(0), table), {"left": {0: "batch"}, "right": {0: "batch"}, "table": {}}
    labels = torch.tensor([0, 1, 2, 0])
    data = [{"left": X, "right": X + i, "table": table, "labels": labels} for i in range(3)]
    settings: dict[str, Any] = {"search": sbs_fx.search.Search(epochs=1, repair_batches=1), "epochs": 1}
    settings["two_stage"] = sbs_fx.search.TwoStage(images=8, judged=8, measured=4, rounds=1)
    config = sbs_fx.Config(**settings)
    result = sbs_fx.compress(model, inputs, dynamic=dynamic, budget=0.15, data=data, method=method, config=config)
    assert result.cost.bops <= 0.15 * result.baseline_cost.bops
    assert torch.isfinite(result.model(*inputs)).all()
    assert 0 <= evaluate(result.model, data) <= 100
    assert evaluate(model, data) == evaluate(sbs_fx.passes.trace(model, inputs, dynamic=dynamic), data)
