"""All equalities between graphs on named and on drawn networks: trace = module, open gates = trace, masked = slim."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.networks.models import SMALLEST_RECIPES, Recipe, networks
from tests.oracles.agreement import check_network, free_share

# Networks with less than all conv and linear multiply-accumulates on a side that can shrink, and why.
PARTLY_PINNED = {
    "channel_conv": "the convolution along the channels runs at full width, in an adapter",
    "channel_conv-kernel=5": "the convolution along the channels runs at full width, in an adapter",
    "gated-attention-features": "no head: the stem reads the input and writes the residual stream, which is the output",
}
# Networks without any group, and why: none.
WITHOUT_GROUPS: dict[str, str] = {}


def kind_of(name: str) -> str:
    return name.partition("-")[0].partition("=")[0]


KINDS = {kind: list(names) for kind, names in groupby(sorted(SMALLEST_RECIPES, key=kind_of), kind_of)}


@pytest.mark.parametrize("kind", KINDS)
def test_smallest_networks(kind: str) -> None:
    for name in KINDS[kind]:
        recipe = SMALLEST_RECIPES[name]
        try:
            case = check_network(recipe.build(), recipe.example, seed=0)
            assert bool(case.groups) == (name not in WITHOUT_GROUPS)
            assert (free_share(case.groups) == 1) == (name not in PARTLY_PINNED), f"{free_share(case.groups):.3f} free"
        except Exception as error:
            error.add_note(f"network: {name} = {recipe}")
            raise


def test_listed_exceptions_exist() -> None:
    assert {*PARTLY_PINNED, *WITHOUT_GROUPS} <= {*SMALLEST_RECIPES}


def examples(count: int) -> settings:
    """`count` examples in CI, half of them in the quick profile, in proportion more in the long one."""
    whole = settings().max_examples
    return settings(max_examples=count // 2 if whole < 300 else count * whole // 300)


@examples(130)
@given(networks(max_blocks=2), st.integers(0, 2**16))
def test_drawn_short_networks(recipe: Recipe, seed: int) -> None:
    check_network(recipe.build(), recipe.example, seed)


@examples(66)
@given(networks(max_blocks=6), st.integers(0, 2**16))
def test_drawn_long_networks(recipe: Recipe, seed: int) -> None:
    check_network(recipe.build(), recipe.example, seed)
