"""Batch norms folded into the layer before them, computed weights evaluated: codes stay, and what else reads them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sbs_fx.passes import apply_bits, channel_groups, insert_gates, slim, trace, weight_gates
from sbs_fx.passes.cost.layers import batch_norms_to_fold
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.folding import TRANSPOSED, shared_biases
from sbs_fx.passes.static.fold import Constants, batch_norm_folds
from tests.networks.models import Recipe, networks
from tests.networks.small import LAYERS, Normed
from tests.oracles.gated import check_static, fixed, gate, nodes

aten = torch.ops.aten


SHAPES = {"linear": (64, 8), "conv1d": (8, 8, 30), "conv3d": (2, 8, 6, 6, 6)}


@pytest.mark.parametrize("bits", [8, 2, "per channel", 32])
@pytest.mark.parametrize("name", LAYERS)
def test_batch_norm_is_folded_and_codes_stay(name: str, bits: Any) -> None:
    model = LAYERS[name]()
    x = torch.randn(SHAPES.get(name, (2, 8, 12, 12)))
    gated = gate(model, x)
    quantizer = weight_gates(gated)["layer"]
    mixed = [(0, 2, 4, 8)[i % 4] for i in range(quantizer.channels or 0)]
    apply_bits(gated, {"layer": mixed if bits == "per channel" else bits}, {"x": 8, "relu": 8})
    static = check_static(gated, x)
    assert not nodes(static, aten.batch_norm.default)
    assert not [key for key in static.state_dict() if "norm" in key]
    if bits == 32:
        assert static_of(static).weights == {}
        return
    codes = static.get_buffer("layer.weight")
    wanted = quantizer.codes(model.layer.weight)
    assert torch.equal(codes.abs().int(), wanted.abs())
    mirrored = model.norm.weight < 0
    groups = model.layer.groups if hasattr(model.layer, "groups") else 1
    if nodes(static, *TRANSPOSED):
        rows = mirrored.view(groups, -1).repeat_interleave(wanted.shape[0] // groups, 0)
        mirrored = rows.view(*rows.shape, *[1] * (wanted.ndim - 2))
    else:
        mirrored = mirrored.view(-1, *[1] * (wanted.ndim - 1))
    assert torch.equal(codes.int(), torch.where(mirrored, -wanted, wanted))
    assert (static.get_buffer("layer.weight_scale") >= 0).all()


def test_flattened_tokens_are_folded_through() -> None:
    class Tokens(Normed):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.head(self.norm(y.flatten(0, 1)).reshape_as(y))

    x = torch.randn(4, 7, 8)
    model = Tokens(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 2))
    static = check_static(fixed(gate(model, x), 4), x)
    assert not nodes(static, aten.batch_norm.default)


def test_batch_norm_before_its_layer_stays_as_it_is() -> None:
    x = torch.randn(2, 3, 8, 8)
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=0.25)
    static = check_static(fixed(gate(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 4, 3)).eval(), x), 4), x)
    (node,) = nodes(static, aten.batch_norm.default)
    assert node.args[5:] == (False, 0.25, 1e-3, True)


class ReadTwice(nn.Module):
    """What the norm reads, something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.norm(y) + y


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (ReadTwice(), (2, 3, 8, 8)),
        (nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(7)), (2, 7, 8)),  # over the 7 tokens, not the 12 outputs
    ],
)
def test_norms_that_fold_into_no_layer(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert batch_norms_to_fold(channel_groups(trace(model.eval(), x)).inference) == {}
    static = check_static(fixed(gate(model, x), 4), x)
    assert len(nodes(static, aten.batch_norm.default)) == 1


def test_a_bias_with_another_reader_is_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)) + self.first.bias

    graph = trace(Shared(), torch.randn(2, 4)).graph
    assert [node.name for node in shared_biases(graph)] == ["linear"]


def test_a_shared_weight_is_stored_once_and_not_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.conv(self.a(self.conv(x))))

    x = torch.randn(2, 4, 8, 8)
    static = check_static(fixed(gate(Twice().eval(), x), 4), x)
    assert len(nodes(static, aten.batch_norm.default)) == 2
    assert list(static_of(static).weights) == ["conv.weight"]


def test_a_computed_weight_is_evaluated_once() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.extra = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            w = self.v - self.v.mean((1, 2, 3), keepdim=True) + self.extra
            return torch.nn.functional.conv2d(x, w)

    x = torch.randn(2, 3, 8, 8)
    for bits in (4, 32):
        static = check_static(fixed(gate(Standardised(), x), bits), x)
        assert not list(static.parameters())
        assert not nodes(static, aten.mean.dim, aten.sub.Tensor, aten.add.Tensor)
        assert len(static_of(static).weights) == (bits == 4)


def test_a_float_parameter_that_something_else_reads_is_kept() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.linear.weight.sum()

    x = torch.randn(5, 4)
    static = check_static(fixed(gate(Tied(), x), 4), x)
    assert static.get_parameter("linear.weight").is_floating_point()
    (codes,) = static_of(static).weights
    assert static.get_buffer(codes).dtype == torch.int8


@settings(max_examples=25)
@given(networks(max_blocks=3), st.integers(0, 99))
def test_the_same_norms_fold_in_a_traced_graph_and_in_the_gated_graph_of_a_slim_one(recipe: Recipe, seed: int) -> None:
    graph = trace(recipe.build(), recipe.example())
    groups = channel_groups(graph)
    draw = random.Random(seed)
    kept = {g.name: sorted(draw.sample(range(g.size), draw.randint(1, g.size))) for g in groups.values()}
    gated = insert_gates(slim(graph, groups, kept), groups, channels=False)
    folds = batch_norm_folds(Constants(gated))
    foreseen = batch_norms_to_fold(groups.inference)
    assert {k.name: f.norm.name for k, f in folds.items()} == {k.name: n.name for k, n in foreseen.items()}
