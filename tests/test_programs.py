"""Random programs: recurrent cells, several inputs and outputs, einsum, transposed convolutions, gates, shuffles,
layers that are used again. In the long profile 1,000 of them; the smallest that fails is the first to be told.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import settings

from tests.networks.programs import OPERATORS, Program
from tests.oracles.counts import COUNTS
from tests.oracles.programs import check_program

LONG = settings.default.max_examples > 1000  # type: ignore[union-attr]
STEPS = range(1, 11)
EACH = 100 if LONG else 1  # of each number of steps
WHOLE = 5 if LONG else 10  # every so many are compressed, saved and run elsewhere too


@pytest.mark.parametrize("steps", STEPS)
def test_programs(steps: int) -> None:
    done: Counter[str] = Counter()
    for i in range(EACH):
        seed = 1000 * steps + i
        whole = seed % WHOLE == 0 if LONG else steps == 3
        try:
            done.update(check_program(Program(steps, seed), seed, whole=whole))
        except Exception as error:
            raise AssertionError(f"Program({steps}, {seed})") from error
    COUNTS.update({f"programs: {name}": count for name, count in done.items()})
    assert done["slim = masked"] == done["price"] == EACH


def test_all_operators_are_drawn() -> None:
    """And the same numbers make the same program."""
    called = Counter(step.call.__qualname__.partition(".")[0] for s in range(40) for step in Program(6, s).steps)
    assert {operator.__name__ for operator in OPERATORS} <= called.keys()
    assert {len(Program(2, s).inputs) for s in range(20)} == {1, 2, 3}
    a, b = (Program(5, 3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a(*a.example(2)), b(*b.example(2)), strict=True))
