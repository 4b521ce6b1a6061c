"""Whole runs in processes of their own, stopped at any moment and started again: they end as one that nobody stopped.

`python -m tests.oracles.run_kills DIR PHASE COUNT` stops runs at COUNT random moments of a phase, or at each write for
the phases "writes" and "writes, fine-tune"; prints JSON: how many were stopped, and how many ended before.
Each run is forked, so that all is imported once; this process trains nothing, as what has trained cannot be forked.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import sbs_fx
from sbs_fx.passes import trace
from sbs_fx.plan import files as plan_files
from tests.networks.small import batches, net
from tests.oracles.kills import killed_at

PHASES = ("search", "calibrate", "fine-tune", "reconstruct", "finalise", "save", "export")
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SAME = ("policy.json", "model.pt2", "exported.pt2")
Say = Callable[[str], None]


def run(place: Path, tuned: bool, say: Say = lambda _: None) -> None:
    """Search, calibrate, fine-tune or reconstruct, finalise, save, export; says when each begins."""
    config = sbs_fx.Config(
        methods={"search": {"epochs": 1}}, epochs=int(tuned), reconstruction={"steps": 8, "images": 16},
        training={"checkpoint_every": 1}, calibration_batches=1,
    )  # fmt: skip
    result = sbs_fx.compress(
        net(), IMAGES, data=batches(2), budget=0.1, method="sbs", config=config, output_dir=place,
        progress=lambda name, _: say(name),
    )  # fmt: skip
    say("export")
    result.export("pt2", place / "exported.pt2")
    say("end")


def ended(action: Callable[[], None]) -> bool:
    """Run it in a process of its own; False if an alarm stopped that."""
    child = os.fork()
    if not child:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGALRM), code
    return code == 0


def timed(place: Path, tuned: bool) -> dict[str, float]:
    """A run that nobody stops: seconds by phase."""
    path = place.with_suffix(".times")

    def action() -> None:
        times: list[tuple[str, float]] = []
        run(place, tuned, lambda name: times.append((name, time.monotonic())))
        spent = {name: end - start for (name, start), (_, end) in itertools.pairwise(times)}
        path.write_text(json.dumps(spent))

    assert ended(action)
    return json.loads(path.read_text())


def stopped_in(phase: str, seconds: float, place: Path) -> bool:
    """Whether a run was stopped, as by `kill -9`, so long after that phase began."""

    def say(name: str) -> None:
        if name == phase:
            signal.setitimer(signal.ITIMER_REAL, max(1e-4, seconds))  # reason: nobody handles it, so it kills

    return not ended(lambda: run(place, phase == "fine-tune", say))


def check_again(place: Path, tuned: bool, expected: Path) -> None:
    """The same call again leaves the same files, and nothing else."""
    assert ended(lambda: run(place, tuned))
    for name in SAME:
        assert (place / name).read_bytes() == (expected / name).read_bytes(), name
    assert names(place) == names(expected)
    shutil.rmtree(place)


def names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def main(directory: Path, phase: str, count: int) -> dict[str, int]:
    plan_files._YOUNG = -1.0  # reason: no other process makes files here
    trace(net(), IMAGES)  # reason: imports what children would each import again
    tuned = phase.endswith("fine-tune")
    expected = directory / "whole"
    seconds, stopped = timed(expected, tuned), 0
    draw = random.Random(f"{phase} {count}")
    for number in range(1, count + 1) if phase in PHASES else itertools.count(1):
        place = directory / str(number)
        if phase in PHASES:
            stopped += stopped_in(phase, draw.random() * seconds[phase], place)
        else:
            was = killed_at(number, lambda: run(place, tuned))  # noqa: B023
            stopped += was
        check_again(place, tuned, expected)
        if phase not in PHASES and not was:
            break
    return {"stopped": stopped, "ended before": number - stopped}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))) + "\n")
