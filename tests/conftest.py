"""Settings for the whole test session: one thread a worker, no network, hypothesis profiles, and passes that verify
what they give.

Profiles: `ci` (the default) draws the same examples on each run; `long` draws new ones, ten times as many;
`quick` draws few, for runs over many mutations.
Choose with `HYPOTHESIS_PROFILE=long make test` or `pytest --hypothesis-profile long`.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

# Set before torch is imported, so that the processes which tests start inherit them too.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # reason: a test that needs pretrained weights is a mistake

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from torch import fx  # noqa: E402

from sbs_fx import passes  # noqa: E402
from sbs_fx.export.pt2 import load_pt2  # noqa: E402
from sbs_fx.passes.dialects import Gated, Searchable, Static, Traced, verify  # noqa: E402

torch.set_num_threads(1)  # reason: workers that each use every core slow one another down

# reason: one example traces and runs a network, so neither its time nor the time to draw it says anything
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile(
    "ci", max_examples=300, deadline=None, derandomize=True, print_blob=True, suppress_health_check=_SLOW
)
settings.register_profile(
    "long", max_examples=3000, deadline=None, derandomize=False, print_blob=True, suppress_health_check=_SLOW
)
settings.register_profile(
    "quick",
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=_SLOW,
    phases=(Phase.explicit, Phase.generate),  # reason: nobody reads the example
    report_multiple_bugs=False,
)
# The option --hypothesis-profile is read after this file and so has the last word.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _verified(function: Callable[..., fx.GraphModule], dialect: Any) -> Callable[..., fx.GraphModule]:
    """A pass that checks what it gives against the specification of its dialect."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> fx.GraphModule:
        result = function(*args, **options)
        verify(result, dialect(options) if dialect is _gated else dialect)
        return result

    return run


def _gated(options: dict[str, Any]) -> type[Gated]:
    return Searchable if options.get("channels", True) else Gated


_PASSES = {
    passes.trace: Traced,
    passes.slim: Traced,
    passes.insert_gates: _gated,
    passes.finalize: Static,
    passes.integer_joins: Static,
    passes.integer_grid: Static,
    load_pt2: Static,
}
# reason: before any test module takes a pass from its module
for _module in [module for name, module in sys.modules.items() if name.startswith("sbs_fx")]:
    for _name, _value in list(vars(_module).items()):
        if isinstance(_value, types.FunctionType) and _value in _PASSES:
            setattr(_module, _name, _verified(_value, _PASSES[_value]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start each test from one torch seed, whatever ran before it in the same worker."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the fuzz tests have tried, by kind."""
    from tests.oracles.counts import COUNTS

    for name, count in sorted(COUNTS.items()):
        terminalreporter.write_line(f"{count:8,} {name}")
