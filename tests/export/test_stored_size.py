"""What a file holds, tensor by tensor, against what the cost model says of its plan."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from sbs_fx.export.packing import pack, read_tensors
from sbs_fx.passes import (
    CostModel,
    apply_bits,
    channel_groups,
    cost_model,
    finalize,
    insert_gates,
    integer_grid,
    integer_joins,
    slim,
    trace,
    weight_gates,
)
from sbs_fx.passes.channels.slim import slim_bits
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.graph import with_tensors
from sbs_fx.plan import Plan
from sbs_fx.plan.bits import BITS, FLOAT_BITS
from sbs_fx.search.sparse import largest, parameters_of, weight_tensors
from tests.networks.models import Recipe, networks, step
from tests.networks.small import LAYERS, Residual
from tests.oracles.gated import draw_bits, set_ranges

SEEDS = range(4)  # of plans


def stored_bits(static: fx.GraphModule) -> int:
    """Bits of all tensors of the packed graph, the padding of planes apart: codes at their bits, each other tensor once
    and as wide as its dtype."""
    weights = static_of(static).weights
    packed = {*weights, *(f"{name}_packed" for name in weights)}
    total = 0
    for name, tensor in read_tensors(pack(static)).items():
        if name not in packed:
            total += tensor.numel() * tensor.element_size() * 8
    for name, stored in weights.items():
        codes = static.get_buffer(name)
        if stored.nonzeros is not None:
            total += codes.numel() + stored.nonzeros * stored.bits
        else:
            size = codes.shape[stored.axis]
            bits = (stored.bits,) * size if isinstance(stored.bits, int) else stored.bits
            total += codes.numel() // size * sum(bits)
    return total


def drawn_plan(cost: CostModel, seed: int, *, prune: bool) -> Plan:
    """Bits of every weight, a third of them by channel, and of every activation; if told so, channels that go, or
    else single weights of some layers."""
    draw = random.Random(seed)
    kept = {g.name: sorted(draw.sample(range(g.size), draw.randint(1, g.size))) for g in cost.groups.values()}
    parameters = parameters_of(cost)
    weight_bits: dict[str, Any] = {}
    nonzeros = {}
    for name, (dims, outputs) in cost.dims_of_weights.items():
        weight_bits[name] = draw.choice((*BITS, FLOAT_BITS))
        if draw.random() < 1 / 3:
            weight_bits[name] = [draw.choice((0, *BITS)) for _ in range(dims[outputs].size)]
        elif not prune and name in parameters and weight_bits[name] != FLOAT_BITS and draw.random() < 1 / 2:
            nonzeros[name] = draw.randint(1, math.prod(dim.size for dim in dims))
    activation_bits = {name: draw.choice((*BITS, FLOAT_BITS)) for name in cost.activations}
    return Plan(kept if prune else {}, weight_bits, activation_bits, nonzeros)


def check(module: nn.Module, x: Tensor, seed: int, *, prune: bool, joined: bool = False) -> fx.GraphModule:
    """Assert that a plan drawn from the seed costs what its static graph holds; returns that."""
    graph = trace(module.eval(), x)
    groups = channel_groups(graph)
    cost = cost_model(graph, groups)
    plan = drawn_plan(cost, seed, prune=prune)
    weights, parameters = weight_tensors(cost), parameters_of(cost)
    masked = {parameters[name]: largest(weights[name], count) for name, count in plan.nonzeros.items()}
    gated = insert_gates(slim(with_tensors(graph, masked), groups, plan.kept), groups, channels=False)
    set_ranges(gated, x)
    apply_bits(gated, slim_bits(groups, plan), plan.activation_bits)
    static = finalize(gated, nonzeros=plan.nonzeros)
    if joined:
        static = integer_grid(integer_joins(static, [(x,)]))
    assert stored_bits(static) == cost.evaluate(plan).stored_bits == cost.price(plan)["size"]
    return static


class SharedLayer(nn.Module):
    """One convolution before two norms, which cannot be folded, and a bias that two other layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.second = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)
        self.right.bias = self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.twice(self.first(self.twice(x))))
        return self.left(x) + self.right(x).relu()


class SharedNorm(nn.Module):
    """One norm behind two convolutions, and one without parameters behind a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = (nn.Conv2d(8, 8, 1, bias=False) for _ in range(3))
        self.norm, self.bare = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(self.last(self.norm(self.left(x)).relu() + self.norm(self.right(x))))


class Shapes(nn.Module):
    """Norms of tokens: of flattened ones, which go into the linear before them, and of channels in the middle, which do
    not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.flat, self.flat_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.middle, self.middle_norm = nn.Linear(8, 8), nn.BatchNorm1d(81)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch = x.shape[0]
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        flat = self.flat_norm(self.flat(tokens).flatten(0, 1)).reshape(batch, 81, 8)
        return self.middle_norm(self.middle(flat.relu()))


class ReadTwice(nn.Module):
    """A weight that is also read past its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.conv.weight.sum()


class Adapted(nn.Module):
    """An operator without a rule between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).cumsum(1))


class Tied(nn.Module):
    """A weight that two layers share, each before a norm, and one that a third reads transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.up = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.first, self.second, self.third = (nn.BatchNorm2d(8) for _ in range(3))
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.left(x)).relu() + self.second(self.right(x))
        x = self.third(self.up(x.relu()))
        return nn.functional.conv2d(x, self.up.weight.transpose(0, 1))


class Norms(nn.Module):
    """Norms that do not fold: without running statistics, of a weight that depends on the input; and one whose layer
    has a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, track_running_stats=i > 0) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        x = self.norms[0](first(x)).relu()
        x = self.norms[1](nn.functional.conv2d(x, second.weight * x.mean(), second.bias)).relu()
        return self.norms[2](nn.functional.conv2d(x, third.weight / third.weight.norm(), third.bias))


CASES: dict[str, Callable[[], nn.Module]] = {
    **LAYERS,
    "shared layer": SharedLayer,
    "shared norm": SharedNorm,
    "shapes": Shapes,
    "read twice": ReadTwice,
    "adapted": Adapted,
    "tied": Tied,
    "norms": Norms,
}
SHAPES = {"linear": (4, 8), "conv1d": (2, 8, 9), "conv3d": (2, 8, 5, 5, 5)}


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_layers_and_norms(name: str, prune: bool) -> None:
    for seed in SEEDS:
        torch.manual_seed(seed)
        check(CASES[name](), torch.randn(SHAPES.get(name, (2, 8, 9, 9))), seed, prune=prune)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["conv", "no bias", "grouped transposed", "shared layer", "read twice"])
def test_narrow_floats_take_their_own_width(name: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        torch.manual_seed(seed)
        x = torch.randn(2, 8, 9, 9, dtype=dtype)
        static = check(CASES[name]().to(dtype), x, seed, prune=bool(seed % 2))
        assert static(x).dtype == dtype


@pytest.mark.parametrize("build", [Residual, SharedLayer])
def test_integer_joins_and_biases_on_their_grid(build: Callable[[], nn.Module]) -> None:
    channels = 3 if build is Residual else 8
    for seed in SEEDS:
        torch.manual_seed(seed)
        check(build(), torch.randn(2, channels, 16, 16), seed, prune=False, joined=True)


@settings(max_examples=40)
@given(networks(max_blocks=2), st.integers(0, 99), st.booleans())
def test_drawn_networks(recipe: Recipe, seed: int, prune: bool) -> None:
    check(recipe.build(), recipe.example(), seed, prune=prune)


def test_parts_of_one_network_by_hand() -> None:
    """Codes, scales and biases of two layers without a norm, places of mixed channels."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = trace(module, x)
    gated = insert_gates(graph, channel_groups(graph), channels=False)
    set_ranges(gated, x)
    first, second = weight_gates(gated).values()
    first.fix(5)
    second.fix([3, 0, 3, 3, 8, 8, 8, 8])
    codes = 8 * 27 * 5 + 8 * (3 * 3 + 4 * 8)
    scales, biases, places = 2 * 8 * 32, 2 * 8 * 32, 8 * 16
    assert stored_bits(finalize(gated)) == codes + scales + biases + places


def test_every_weight_is_padded_by_less_than_a_byte() -> None:
    recipe = Recipe((step("conv"), step("depthwise"), step("mlp")))
    for seed in SEEDS:
        graph = trace(recipe.build(), recipe.example())
        gated = insert_gates(graph, channel_groups(graph), channels=False)
        set_ranges(gated, recipe.example())
        draw_bits(gated, seed)
        static = finalize(gated)
        tensors = read_tensors(pack(static))
        packed = sum(name.endswith("_packed") for name in tensors)
        held = sum(tensor.numel() * tensor.element_size() * 8 for tensor in tensors.values())
        assert 0 <= held - stored_bits(static) < 8 * max(1, packed)
