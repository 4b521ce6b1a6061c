"""A run that is stopped at any moment, and started again, ends as one that never was.

In the usual profile one kill; in the long one 20 in each of seven phases, and one at every write.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.oracles.counts import COUNTS
from tests.oracles.run_kills import PHASES

ROOT = Path(__file__).parents[1]
LONG = settings.default.max_examples > 1000  # type: ignore[union-attr]
TRIED = (*PHASES, "writes", "writes, fine-tune") if LONG else ("save",)
EACH = 20 if LONG else 1


@pytest.mark.parametrize("phase", TRIED)
def test_kills(phase: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.oracles.run_kills", str(tmp_path), phase, str(EACH)]
    single = {**os.environ, "OMP_NUM_THREADS": "1"}  # reason: a pool of threads does not outlive a fork
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, env=single)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    COUNTS.update({f"kills in {phase}: {name}": count for name, count in outcomes.items()})
    assert outcomes["stopped"] >= EACH // 2
