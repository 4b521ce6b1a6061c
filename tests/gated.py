"""Gated networks for tests: random ones of any kind, their ranges from one forward pass, their bits drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.passes.channel_groups import channel_groups
from sbs_fx.passes.insert_gates import activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.passes.trace import trace
from sbs_fx.superbit import SuperBitQuantizer
from tests.models import SMALLEST, SMALLEST_RECIPES, Recipe

BITS = (2, 4, 8)


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
    _Ranges(gated).run(x)
    return gated


def draw_bits(gated: fx.GraphModule, seed: int, *, per_channel: bool = True, bits: Sequence[int] = (*BITS, 32)) -> None:
    """Fix every gate at bits drawn from the seed, a third of the weights per channel, with 0 bits among them."""
    generator = random.Random(seed)
    weights: dict[str, Any] = {}
    for name, quantizer in weight_gates(gated).items():
        weights[name] = generator.choice(list(bits))
        if per_channel and quantizer.channels and generator.random() < 1 / 3:
            weights[name] = [generator.choice((0, *BITS)) for _ in range(quantizer.channels)]
    apply_bits(gated, weights, {name: generator.choice(list(bits)) for name in activation_gates(gated)})


class _Ranges(fx.Interpreter):
    @torch.no_grad()
    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        quantizer = self.fetch_attr(target)
        if isinstance(quantizer, SuperBitQuantizer):
            x = args[0].abs()
            per_channel = quantizer.channels is not None
            quantizer.range.copy_(x.movedim(quantizer.channel_dim, 0).flatten(1).amax(1) if per_channel else x.amax())
        return super().call_module(target, args, kwargs)
