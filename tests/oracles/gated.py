"""Gated networks for tests: random ones of any kind, their ranges from one forward pass, their bits drawn; single
quantisers; and what must hold between a gated network and its static form."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sbs_fx.passes.capture.trace import trace
from sbs_fx.passes.channels.groups import channel_groups
from sbs_fx.passes.gates.insertion import activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.passes.oracles.static import compare_static, count_levels
from sbs_fx.passes.static.finalize import finalize
from sbs_fx.passes.static.fused import fused
from sbs_fx.passes.static.integer_grid import integer_grid
from sbs_fx.passes.static.integer_joins import integer_joins
from sbs_fx.plan.bits import BITS
from sbs_fx.quantizer.ranges import set_range
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from tests.networks.models import SMALLEST, SMALLEST_RECIPES, Recipe

# Rounding ties after folding: one code in 10,000, by one step; a small tensor may have one all the same.
TIES = 1e-4


class Together(nn.Module):
    """Networks that read the same input, as one module: most of the time of an export does not depend on its size."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(recipe.build() for recipe in recipes)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(x) for network in self.networks)


def image_size(name: str) -> tuple[int, int]:
    return SMALLEST_RECIPES[name].height, SMALLEST_RECIPES[name].width


def bundles(kinds: Sequence[str] = (), size: int = 30) -> dict[str, list[Recipe]]:
    """Networks of `SMALLEST`, by image size and in bundles of at most `size`: one per kind of block, and all choices of
    the options of the given kinds."""
    chosen = [name for name in SMALLEST if "-" not in name or name.partition("-")[0] in kinds]
    found = {}
    for (height, width), group in groupby(sorted(chosen, key=image_size), image_size):
        names = list(group)
        for start in range(0, len(names), size):
            part = names[start : start + size]
            found[f"{height}x{width} {part[0]}..{part[-1]}"] = [SMALLEST_RECIPES[name] for name in part]
    return found


def gate(model: nn.Module, x: Tensor, **options: Any) -> fx.GraphModule:
    """Traced and gated, ranges set to the largest absolute values on x; gates still open."""
    graph_module = trace(model, x)
    gated = insert_gates(graph_module, channel_groups(graph_module), channels=False, **options)
    set_ranges(gated, x)
    return gated


def set_ranges(gated: fx.GraphModule, x: Tensor) -> None:
    """Ranges set to the largest absolute values on x; all gates must be open."""
    _Ranges(gated).run(x)


def draw_bits(gated: fx.GraphModule, seed: int, *, per_channel: bool = True, bits: Sequence[int] = (*BITS, 32)) -> None:
    """Fix every gate at bits drawn from the seed, a third of the weights per channel, with 0 bits among them."""
    generator = random.Random(seed)
    weights: dict[str, Any] = {}
    for name, quantizer in weight_gates(gated).items():
        weights[name] = generator.choice(list(bits))
        if per_channel and quantizer.channels and generator.random() < 1 / 3:
            weights[name] = [generator.choice((0, *BITS)) for _ in range(quantizer.channels)]
    apply_bits(gated, weights, {name: generator.choice(list(bits)) for name in activation_gates(gated)})


def quantiser(bits: Any, **options: Any) -> SuperBitQuantizer:
    gate = SuperBitQuantizer(**options)
    gate.fix(bits)
    return gate


def error_of(gate: SuperBitQuantizer, x: Tensor, top: Tensor) -> Tensor:
    """Squared error of what the quantiser itself gives, per channel."""
    set_range(gate, top)
    squares = (gate(x) - x).square().detach()
    if gate.channels is None:
        return squares.sum().view(1)
    return squares.movedim(gate.channel_dim, 0).flatten(1).sum(1)


def fixed(gated: fx.GraphModule, bits: Any) -> fx.GraphModule:
    """Weights at these bits (a number, or one a channel), activations at 8."""
    apply_bits(gated, dict.fromkeys(weight_gates(gated), bits), dict.fromkeys(activation_gates(gated), 8))
    return gated


def integer_graph(make: Callable[[], nn.Module], x: Tensor, weight_bits: int = 8, **grid: Any) -> fx.GraphModule:
    """A network with weights of seed 0, activations at 8 bits and integer joins, on the grid of its products."""
    torch.manual_seed(0)
    return integer_grid(integer_joins(finalize(fixed(gate(make().eval(), x), weight_bits)), [(x,)]), **grid)


def check_static(gated: fx.GraphModule, x: Tensor, static: fx.GraphModule | None = None) -> fx.GraphModule:
    """Assert that a static form (default: `finalize`'s) has the codes of the gated graph, and no more levels than bits
    allow; returns it."""
    static = finalize(gated) if static is None else static
    rows = compare_static(gated, static, (x,))
    assert {r.tensor for r in rows} == {name for name, g in activation_gates(gated).items() if g.bits != 32}
    assert all(r.largest_step <= 1 for r in rows)
    assert all(r.differing <= max(1, TIES * r.positions) for r in rows)
    assert sum(r.differing for r in rows) <= max(2, TIES * sum(r.positions for r in rows))
    levels = count_levels(static, (x,))
    assert {c.tensor: c.bits for c in levels if c.kind == "activation"} == {
        name: g.bits for name, g in activation_gates(gated).items() if g.bits != 32
    }
    assert all(c.is_real for c in levels), [c for c in levels if not c.is_real]
    with torch.no_grad():
        for theirs, ours in zip(pytree.tree_leaves(fused(static)(x)), pytree.tree_leaves(static(x)), strict=True):
            assert torch.equal(theirs, ours)
    return static


def nodes(static: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    return [node for node in static.graph.nodes if node.target in targets]


class _Ranges(fx.Interpreter):
    @torch.no_grad()
    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        quantizer = self.fetch_attr(target)
        if isinstance(quantizer, SuperBitQuantizer):
            x = args[0].abs()
            per_channel = quantizer.channels is not None
            quantizer.range.copy_(x.movedim(quantizer.channel_dim, 0).flatten(1).amax(1) if per_channel else x.amax())
        return super().call_module(target, args, kwargs)
