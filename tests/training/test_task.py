"""What outputs mean: distances by hand, curvature by sampling, targets of every form, and whole compressions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sbs_fx
from sbs_fx import Task
from sbs_fx.passes import trace
from sbs_fx.plan.errors import DataError, InputError
from sbs_fx.search import TwoStage
from sbs_fx.training.task import task_of


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_distances_from_the_float_model() -> None:
    a, b = drawn(4, 5), drawn(4, 5, seed=1)
    kl = (b.softmax(1) * (b.log_softmax(1) - a.log_softmax(1))).sum(1).mean()
    task = Task("classification")
    assert torch.allclose(task.divergence((a,), task.reference((b,))), kl)
    c, e = drawn(4, 5, 3, 2), drawn(4, 5, 3, 2, seed=1)
    kl = (e.softmax(1) * (e.log_softmax(1) - c.log_softmax(1))).sum(1).mean()
    task = Task("segmentation")
    assert torch.allclose(task.divergence({"out": c}, task.reference(e)), kl)
    task = Task("embedding")
    assert torch.allclose(task.divergence(a, task.reference(b)), (1 - F.cosine_similarity(a, b)).mean())
    task = Task()
    parts = [((x - y) ** 2).mean() / y.var(correction=0) for x, y in ((a, b), (c, e))]
    assert torch.allclose(task.divergence([a, {"c": c}], task.reference([b, {"c": e}])), (parts[0] + parts[1]) / 2)
    assert float(task.divergence([a * 7, c * 7], task.reference([b * 7, e * 7]))) == pytest.approx(
        float((parts[0] + parts[1]) / 2), rel=1e-5
    )  # whatever the scale of the outputs


@pytest.mark.parametrize(("name", "shape"), [("classification", (3,)), ("segmentation", (3, 2)), ("matching", (3, 2))])
def test_squared_gradients_are_the_curvature(name: str, shape: tuple[int, ...]) -> None:
    """Of one parameter: the second derivative of the divergence is the mean of sampled squared gradients."""
    task, direction, output = Task(name), drawn(1, *shape), 2 * drawn(1, *shape, seed=1)
    step, reference = 1e-2, task.reference(output)
    curvature = 2 * float(task.divergence(output + step * direction, reference)) / step**2
    generator, squares = torch.Generator().manual_seed(0), []
    for _ in range(3000):
        scale = torch.zeros((), requires_grad=True)
        task.sampled(output + scale * direction, generator).backward()
        squares.append(float(scale.grad) ** 2)  # type: ignore[arg-type]
    assert sum(squares) / len(squares) == pytest.approx(curvature, rel=0.1)


def test_targets_of_every_form() -> None:
    logits = drawn(4, 5)
    classes = torch.tensor([0, 4, 2, 1])
    task = Task("classification")
    assert torch.equal(task.loss_of(logits, classes), F.cross_entropy(logits, classes))
    soft = drawn(4, 5, seed=1).softmax(1)
    assert torch.allclose(task.loss_of(logits, soft), -(soft * logits.log_softmax(1)).sum(1).mean())
    several = (drawn(4, 5, seed=2) > 0).float()
    assert torch.allclose(task.loss_of(logits, several), F.binary_cross_entropy_with_logits(logits, several))
    dense, masks = drawn(2, 5, 3, 3), torch.randint(0, 5, (2, 3, 3))
    masks[:, 0] = 255
    expected = F.cross_entropy(dense[:, :, 1:], masks[:, 1:])
    assert torch.allclose(Task("segmentation").loss_of(dense, masks), expected)
    assert torch.allclose(Task("regression").loss_of(logits, logits + 2), torch.tensor(4.0))
    own = Task(loss=lambda outputs, targets: (outputs[0].mean() - targets["x"]).abs())
    assert float(own.loss_of(logits, {"x": 100.0})) == pytest.approx(100 - float(logits.mean()))
    assert not Task("segmentation").fits(dense, torch.zeros(2, 4))
    assert not Task().fits(dense, masks)


def test_outputs_of_another_form_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2, 5, 3, 3\); classification needs logits of shape \(batch, classes"):
        Task("classification").tensors(drawn(2, 5, 3, 3))
    with pytest.raises(InputError, match="without a floating tensor"):
        Task().tensors({"boxes": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(InputError, match="unknown task 'detect'; expected one of classification"):
        Task("detect")
    with pytest.raises(InputError, match=r"Task.outputs gives \[\]; expected the tensors that count"):
        Task(outputs=lambda output: []).tensors(drawn(2, 5))
    for task in (3, Task, ["classification"]):
        with pytest.raises(InputError, match="expected one of classification, .* or a Task of your own"):
            sbs_fx.compress(nn.Linear(4, 3), drawn(2, 4), task=task)  # type: ignore[arg-type]


def network(outputs: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, outputs, 1),
    ).eval()  # fmt: skip


X = drawn(4, 3, 12, 12)
QUICK: dict[str, Any] = {"two_stage": TwoStage(images=8, judged=8, measured=4, rounds=0)}


def test_what_is_said_of_a_graph() -> None:
    assert task_of(trace(network(), X)).name == "matching"
    assert task_of(trace(nn.Sequential(network(), nn.Flatten()).eval(), X)).name == "classification"
    gated = sbs_fx.compress(network(), X, budget=0.2, task="segmentation").gated
    assert task_of(gated).name == "segmentation"


@pytest.mark.parametrize("method", ["two_stage", "opq", "uniform", "sbs", "prune_then_quantise"])
@pytest.mark.parametrize("task", [None, "segmentation"])
def test_methods_on_dense_outputs(method: str, task: str | None) -> None:
    masks = torch.randint(0, 5, (4, 12, 12))
    data: list[Any] = [(X, masks)] * 2
    search = sbs_fx.search.Search(epochs=1, repair_batches=1)
    config = sbs_fx.Config(epochs=1, search=search, **QUICK)
    result = sbs_fx.compress(network(), X, budget=0.1, data=data, method=method, task=task, config=config)
    assert result.cost.bops <= 0.1 * result.baseline_cost.bops
    assert torch.isfinite(result.model(X)).all()


@pytest.mark.parametrize(
    "batch",
    [
        (X, ["a.png"] * 4),
        (X, torch.zeros(4, 7, 4)),
        (X, [{"boxes": torch.zeros(2, 4)}] * 4),
        (X, torch.zeros(4, dtype=torch.int64), ["a.png"] * 4, "more"),
        [X],
    ],
)
def test_what_lies_beside_images_disturbs_nothing(batch: Any) -> None:
    for method in ("uniform", "opq", "two_stage"):
        config = sbs_fx.Config(**QUICK)
        result = sbs_fx.compress(network(), X, budget=0.2, data=[batch] * 2, method=method, config=config)
        assert result.policy.method == method


def test_targets_that_do_not_fit_are_named() -> None:
    net = nn.Sequential(network(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(DataError, match=r"batch 0 .*shape \(4, 12, 12\)"):
        sbs_fx.compress(net, X, budget=0.2, data=[(X, torch.zeros(4, 12, 12))], config=sbs_fx.Config(epochs=1))
