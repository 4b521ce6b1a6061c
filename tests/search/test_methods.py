"""Every method through `compress`, on one network: the budget met, the same result for the same seed, what "auto" is,
and single weights masked through to the static graph."""

from __future__ import annotations

import pytest
import torch

import sbs_fx
from sbs_fx.calibration.reconstruction import Reconstruction
from sbs_fx.passes.graph import attribute
from sbs_fx.plan.errors import DataError, MethodError
from sbs_fx.search import Ajpq, Opq, Search, TwoStage
from sbs_fx.search.registry import chosen, methods
from tests.networks.small import EXAMPLE, batches, net

QUICK = sbs_fx.Config(
    search=Search(epochs=1),
    ajpq=Ajpq(episodes=4, group=2),
    two_stage=TwoStage(images=32, judged=16, measured=4, rounds=1),
    reconstruction=Reconstruction(images=32, steps=4, batch=16),
)


@pytest.mark.parametrize("method", methods())
def test_each_method_meets_its_budget_and_repeats_itself(method: str) -> None:
    first, again = (
        sbs_fx.compress(net(), EXAMPLE, budget=0.04, data=batches(), method=method, config=QUICK) for _ in range(2)
    )
    assert first.policy.method == method
    assert first.cost.bops <= 0.04 * first.baseline_cost.bops
    assert again.policy == first.policy
    assert torch.equal(first.model(EXAMPLE), again.model(EXAMPLE))


def test_auto_follows_what_is_given() -> None:
    assert chosen("auto", has_data=False, fine_tunes=False).name == "opq"
    assert chosen("auto", has_data=True, fine_tunes=False).name == "two_stage"
    assert chosen("auto", has_data=True, fine_tunes=True).name == "sbs"
    with pytest.raises(DataError, match="needs data"):
        chosen("two_stage", has_data=False, fine_tunes=False)
    with pytest.raises(MethodError):
        chosen("magic", has_data=True, fine_tunes=False)


def test_unlabelled_images_are_said_to_be() -> None:
    images = [x for x, _ in batches()]
    result = sbs_fx.compress(net(), EXAMPLE, budget=0.04, data=images, config=QUICK)
    assert result.policy.method == "two_stage"
    assert any("no labels" in note for note in result.report.notes)
    assert "note: the data has no labels" in str(result.report)


@pytest.mark.parametrize("epochs", [0, 1])
def test_masked_weights_stay_zero_and_are_counted_as_coded(epochs: int) -> None:
    config = sbs_fx.Config(opq=Opq(prunes="weights"), epochs=epochs)
    budget = sbs_fx.Budget(size=0.1)
    result = sbs_fx.compress(net(), EXAMPLE, budget=budget, data=batches(), method="opq", config=config)
    weight, bits = attribute(result.gated, "3.weight"), result.policy.weight_bits["3"]
    assert 0 < int((weight == 0).sum()) < weight.numel()
    row = next(layer for layer in result.cost.layers if layer.name.startswith("3 "))
    assert isinstance(bits, int)
    kept = result.policy.nonzeros["3"]
    assert int((weight != 0).sum()) <= kept  # reason: fine-tuning may take one of those that stay to zero
    assert epochs or int((weight != 0).sum()) == kept
    assert row.stored_bits == weight.numel() + kept * bits
    assert budget.is_satisfied_by(result.cost)
