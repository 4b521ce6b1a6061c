"""The random networks themselves: the same recipe gives the same network, any batch size runs and exports, every kind
of block is drawn, and no network is blind to its input.

Networks of the same input size are exported together, as one module with one output each, because most of the time of
an export does not depend on the size of the graph.
"""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, export

from tests.networks.blocks import BLOCKS
from tests.networks.models import SMALLEST, SMALLEST_RECIPES, Recipe, Step, example, networks, step, steps

# Same sample in batches of 1, 2 and 5: float32 sums in another order; 6 blocks reach 2e-5 of outputs up to 30.
BATCH_TOLERANCE = 1e-4


class Together(nn.Module):
    """Networks that read the same input, as one module."""

    def __init__(self, recipes: list[Recipe]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(recipe.build() for recipe in recipes)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(x) for network in self.networks)


def named_group(name: str) -> str:
    """Networks exported together: the variants of one kind of block; heads and combinations by image size."""
    kind = name.partition("-")[0]
    recipe = SMALLEST_RECIPES[name]
    return kind if kind in BLOCKS else f"combined {recipe.height}x{recipe.width}"


GROUPS = {
    group: list(names) for group, names in groupby(sorted(SMALLEST, key=lambda n: (named_group(n), n)), named_group)
}


def check_export(recipes: list[Recipe]) -> None:
    """Exports at batch 2 with a dynamic batch; the exported graph equals the eager one bit for bit at 1, 2 and 5."""
    model = Together(recipes)
    program = export(model, (recipes[0].example(2),), dynamic_shapes=({0: Dim("batch", min=1)},))
    exported = program.module()
    for batch in (1, 2, 5):
        images = recipes[0].example(batch, seed=batch)
        for recipe, got, expected in zip(recipes, exported(images), model(images), strict=True):
            assert torch.equal(got, expected), f"batch {batch}: {recipe}"


@pytest.mark.parametrize("group", GROUPS)
def test_smallest_networks_export_with_a_dynamic_batch(group: str) -> None:
    check_export([SMALLEST_RECIPES[name] for name in GROUPS[group]])


@settings(max_examples=3)  # reason: the passes are tested on hundreds of drawn graphs, each of them exported
@given(networks())
def test_drawn_networks_export_with_a_dynamic_batch(recipe: Recipe) -> None:
    check_export([recipe])


@settings(max_examples=60)
@given(networks())
def test_a_recipe_always_builds_the_same_network(recipe: Recipe) -> None:
    before = torch.get_rng_state()
    first, second = recipe.build().state_dict(), recipe.build().state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert eval(repr(recipe), {"Recipe": Recipe, "step": step}) == recipe


@settings(max_examples=60)
@given(networks())
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(recipe: Recipe) -> None:
    model, images = recipe.build(), recipe.example(5)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        expected = model(images)
        assert expected.isfinite().all()
        for batch in (1, 2):
            torch.testing.assert_close(
                model(images[:batch]), expected[:batch], atol=BATCH_TOLERANCE, rtol=BATCH_TOLERANCE
            )


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_networks_see_their_input(name: str) -> None:
    with torch.no_grad():
        output = SMALLEST[name]()(example(name, 5))
    assert output.shape[0] == 5
    assert 0.05 < output.abs().mean() < 8, "activations near 1"
    assert output.std(dim=0).mean() > 0.02, "the output differs between samples"


@pytest.mark.parametrize("name", SMALLEST)
def test_every_parameter_and_statistic_is_random(name: str) -> None:
    model = SMALLEST[name]()
    values: dict[str, Tensor] = dict(model.named_parameters())
    values |= {key: buffer for key, buffer in model.named_buffers() if "running" in key}
    for key, value in values.items():
        assert value.numel() == 1 or value.unique().numel() == value.numel(), f"{key} holds equal numbers"
        assert not torch.isin(value, torch.tensor([0.0, 1.0])).any(), f"{key} holds a default"


def test_every_kind_is_drawn() -> None:
    seen: set[str] = set()

    @settings(max_examples=100, derandomize=True, database=None)
    @given(st.lists(steps(), min_size=10, max_size=10))
    def draw(drawn: list[Step]) -> None:
        seen.update(one.kind for one in drawn)

    draw()
    assert seen == set(BLOCKS)


def test_a_step_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="unknown kind of block 'convolution'; known: .*conv"):
        step("convolution")
    with pytest.raises(ValueError, match="'conv' has no option stride=3"):
        step("conv", stride=3)
    with pytest.raises(ValueError, match="'conv' has no option strides=2"):
        step("conv", strides=2)
