"""`compare`: its points against `compress` called by hand, its resuming, its table, and methods that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sbs_fx
from sbs_fx.calibration.reconstruction import Reconstruction
from sbs_fx.comparing import compare
from sbs_fx.plan.errors import BudgetError, DataError, InputError, MethodError
from sbs_fx.report.comparison import Comparison, Point
from sbs_fx.search import Opq, Search
from sbs_fx.training import evaluate
from tests.networks.small import EXAMPLE, batches, net


def test_a_point_is_what_compress_gives(tmp_path: Path) -> None:
    found = compare(net(), batches(), [0.05, 0.03], methods=["uniform"], example_inputs=EXAMPLE, epochs=1)
    assert [p.outcome for p in found.points] == ["ok", "ok"]
    for point, budget in zip(found.points, (0.05, 0.03), strict=True):
        alone = sbs_fx.compress(net(), EXAMPLE, budget=budget, data=batches(), method="uniform")
        assert point.accuracy == evaluate(alone.model, batches())
        assert point.bops == alone.cost.bops <= budget * alone.baseline_cost.bops
        tuned = sbs_fx.apply(net(), alone.policy, EXAMPLE, data=batches(), config=sbs_fx.Config(epochs=1))
        assert point.tuned_accuracy == evaluate(tuned.model, batches())


def test_a_point_of_a_part_is_what_compress_gives() -> None:
    """Of the part's outputs against the float part's, whatever the whole makes of them; labels are not read."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.scale = net(), nn.Linear(4, 4)

        def forward(self, images: list[Tensor]) -> int:
            return int((self.scale(self.features(torch.stack(images))) > 0).sum().item())

    model = Counts().eval()
    listed = [(list(x), "no labels") for x, _ in batches(2)]
    options: dict[str, Any] = {"example_inputs": (list(EXAMPLE),), "part": "features"}
    config = sbs_fx.Config(reconstruction=Reconstruction(tolerance=1e9))  # reason: `apply` tunes what is not refitted
    call: dict[str, Any] = {"config": config, **options}
    found = compare(model, listed, 0.05, methods=["uniform"], validation=listed[:1], epochs=1, **call)
    alone = sbs_fx.compress(model, data=listed, budget=0.05, method="uniform", **call)
    plain: dict[str, Any] = {"task": "matching", "reference": model.features}
    assert found.points[0].accuracy == evaluate(alone.model, [torch.stack(listed[0][0])], **plain) < 100
    tuned = sbs_fx.apply(model, alone.policy, data=listed, config=sbs_fx.Config(epochs=1), **options)
    whole = evaluate(tuned.model, [torch.stack(listed[0][0])], **plain)
    assert found.points[0].tuned_accuracy == pytest.approx(whole, rel=1e-3)  # reason: `compress` also rounds joins
    assert found.float_accuracy == 100
    assert str(found).startswith("this is the part 'features' (Sequential), 99.6 % of the model's parameters")
    with pytest.raises(InputError, match="no sub-module 'feature' to be its part; there are features"):
        compare(model, listed, 0.05, example_inputs=(list(EXAMPLE),), part="feature")


def test_masked_weights_are_tuned_as_compress_tunes_them() -> None:
    budget, masks = sbs_fx.Budget(size=0.1), Opq(prunes="weights")
    options = {"config": sbs_fx.Config(opq=masks), "example_inputs": EXAMPLE}
    found = compare(net(), batches(), budget, methods=["opq"], epochs=2, **options)
    config = sbs_fx.Config(opq=masks, epochs=2)
    alone = sbs_fx.compress(net(), EXAMPLE, budget=budget, data=batches(), method="opq", config=config)
    assert alone.policy.nonzeros
    assert found.points[0].tuned_accuracy == evaluate(alone.model, batches())


def test_points_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"methods": ["uniform"], "example_inputs": EXAMPLE, "output_dir": tmp_path}
    first = compare(net(), batches(), 0.05, **options)
    path = tmp_path / "points" / "uniform-bops-0.05" / "point.json"
    kept = json.loads(path.read_text())
    kept["point"]["seconds"] = -1.0
    path.write_text(json.dumps(kept))
    again = compare(net(), batches(), 0.05, **options)
    assert again.points[0].seconds == -1.0, "read, not computed"
    assert again.points[0].accuracy == first.points[0].accuracy
    other = net()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    assert compare(other, batches(), 0.05, **options).points[0].seconds > 0, "other weights, another point"
    assert Comparison.load(str(tmp_path)).points[0].bops == first.points[0].bops
    assert (tmp_path / "comparison.txt").read_text() == f"{Comparison.load(str(tmp_path))}\n"


def test_a_method_that_fails_is_a_point() -> None:
    unlabelled = [x for x, _ in batches()]
    config = sbs_fx.Config(search=Search(epochs=1))
    found = compare(
        net(),
        unlabelled,
        0.05,
        methods=["sbs", "uniform"],
        example_inputs=EXAMPLE,
        validation=batches(),
        config=config,
    )
    assert found.points[0].outcome.startswith("DataError")
    assert found.points[1].outcome == "ok"
    assert "DataError" in str(found)
    with pytest.raises(MethodError, match="unknown"):
        compare(net(), batches(), 0.05, methods=["magic"])


def test_pareto_is_what_no_point_beats(tmp_path: Path) -> None:
    points = [
        Point(method="a", budget={"bops": 0.1}, accuracy=70.0, bops=100),
        Point(method="b", budget={"bops": 0.1}, accuracy=60.0, tuned_accuracy=71.0, bops=90),
        Point(method="a", budget={"bops": 0.05}, accuracy=50.0, bops=50),
        Point(method="b", budget={"bops": 0.05}, accuracy=49.0, bops=60),
        Point(method="b", budget={"bops": 0.01}, outcome="InfeasibleBudget: no"),
    ]
    found = Comparison(float_accuracy=72.0, held_out=True, epochs=1, points=tuple(points))
    assert [(p.method, p.bops) for p in found.pareto] == [("a", 50), ("b", 90)]
    beaten = [p for p in points[:4] if p not in found.pareto]
    for point in beaten:
        assert any(q.bops <= point.bops and q.best_accuracy >= point.best_accuracy for q in found.pareto)
    pytest.importorskip("matplotlib")
    found.save(str(tmp_path))
    assert (tmp_path / "pareto.png").stat().st_size > 5000


@pytest.mark.parametrize(("budget", "error"), [([], InputError), (None, BudgetError), ([None], BudgetError)])
def test_budgets_that_are_none(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="budget"):
        compare(net(), batches(), budget, methods=["uniform"])
    with pytest.raises(InputError, match="at least one budget and one method"):
        compare(net(), batches(), methods=[])


def test_images_that_the_float_model_does_not_take_are_named() -> None:
    with pytest.raises(
        DataError, match=r"does not run on batch 0, torch.float32 of shape \(2, 4\): .*as the model takes"
    ):
        evaluate(net(), [(torch.randn(2, 4), torch.zeros(2).long())])
