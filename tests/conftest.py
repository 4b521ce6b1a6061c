"""Settings for the whole test session: one thread a worker, no network, hypothesis profiles.

Profiles: `ci` (the default) draws the same examples on each run; `long` draws new ones, ten times as many.
Choose with `HYPOTHESIS_PROFILE=long make test` or `pytest --hypothesis-profile long`.
"""

from __future__ import annotations

import os

# Set before torch is imported, so that the processes which tests start inherit them too.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # reason: a test that needs pretrained weights is a mistake

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)  # reason: workers that each use every core slow one another down

# reason: one example traces and runs a network, so neither its time nor the time to draw it says anything
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile(
    "ci", max_examples=300, deadline=None, derandomize=True, print_blob=True, suppress_health_check=_SLOW
)
settings.register_profile(
    "long", max_examples=3000, deadline=None, derandomize=False, print_blob=True, suppress_health_check=_SLOW
)
# The option --hypothesis-profile is read after this file and so has the last word.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start each test from one torch seed, whatever ran before it in the same worker."""
    torch.manual_seed(0)
