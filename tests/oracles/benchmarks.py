"""Benchmarks as a user runs them: a script in a process of its own, and the rows that it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def rows_of(script: str, out: Path, *arguments: str) -> list[dict[str, object]]:
    command = [sys.executable, str(BENCHMARKS / script), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert out.exists(), done.stderr
    return json.loads(out.read_text())
