"""The oracle of static graphs itself: it sees a wrong weight, and only where it is."""

from __future__ import annotations

import torch
from torch import nn

from sbs_fx.passes.oracles.static import compare_static, count_levels
from sbs_fx.passes.static.finalize import finalize
from tests.networks.small import LAYERS
from tests.oracles.gated import TIES, fixed, gate


def test_the_oracle_sees_a_wrong_weight() -> None:
    model, x = LAYERS["conv"](), torch.randn(2, 8, 12, 12)
    gated = fixed(gate(model, x), 4)
    for channel in range(1, 12):
        static = finalize(gated)
        static.get_buffer("layer.weight")[channel].neg_()
        (row,) = [r for r in compare_static(gated, static, (x,)) if r.tensor == "relu"]
        assert row.differing > TIES * row.positions
    static = finalize(gated)
    static.get_buffer("layer.weight").random_(-100, 100)
    assert [c.tensor for c in count_levels(static, (x,)) if not c.is_real] == ["layer.weight"]


def test_the_oracle_tells_of_one_layer_alone() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    gated = fixed(gate(model, x), 8)
    static = finalize(gated)
    static.get_buffer("0.weight_scale").mul_(1.5)
    assert [r.differing > 0 for r in compare_static(gated, static, (x,))] == [False, True, False]
