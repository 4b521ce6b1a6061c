"""A small search that tests run in processes of their own: killed and begun again, interrupted, or spread over two.

`python -m tests.oracles.search_runs kill DIR COUNT SEED` forks a child for each run, so that all is imported and traced
once; it prints JSON.
`torchrun ... -m tests.oracles.search_runs spread DIR` is one run over all processes. Both write `state.safetensors`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sbs_fx.data.datasets import open_data
from sbs_fx.plan import Budget
from sbs_fx.plan.errors import Interrupted
from sbs_fx.search import Problem, Run, Search, SearchResult, sbs
from sbs_fx.training import Checkpoints, Training
from tests.oracles.problems import problem_of

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SETTINGS = Training(checkpoint_every=3, ema=0.9, mixup=0.2, label_smoothing=0.1)
SEARCH = Search(epochs=2, lr=0.02)
BUDGET = Budget(bops=1 / 40)
INTERRUPTED = 3  # exit code


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(16), nn.BatchNorm2d(24)] if norm else [nn.GroupNorm(4, 16), nn.GroupNorm(4, 24)]
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), norms[0], nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1), norms[1], nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ).eval()  # fmt: skip


def digits(count: int = 320, split: str = "train", shuffle: bool = True) -> Any:
    data = open_data(
        "digits", split=split, batch_size=32, image_size=8, channels=1, mean=[0.3], std=[0.37], shuffle=shuffle
    )
    data.images, data.labels = data.images[:count], data.labels[:count]  # type: ignore[attr-defined]
    return data


def problem(budget: Budget = BUDGET, *, norm: bool = True) -> Problem:
    """What the search is given: any number of channels may stay."""
    return problem_of(network(norm), IMAGES, budget, block=1)


def search(
    directory: Path | None,
    *,
    norm: bool = True,
    settings: Training = SETTINGS,
    writes: bool = True,
    observer: Any = None,
    given: Problem | None = None,
) -> tuple[Problem, SearchResult]:
    """The problem, `given` or made here, and the result of one search, with checkpoints if there is a directory."""
    given = given or problem(norm=norm)
    run = Run(digits(), SEARCH, settings, observer=observer)
    if directory is None:
        return given, sbs(given, run)
    with Checkpoints(directory / "checkpoints", {"run": "test"}, writes=writes) as checkpoints:
        return given, sbs(given, replace(run, checkpoints=checkpoints))


def _written(found: tuple[Problem, SearchResult], path: Path) -> None:
    given, result = found
    save_file(dict(result.tensors), path, {"policy": given.policy(result.plan, "sbs").to_json()})


def _child(directory: Path, given: Problem) -> tuple[int, int]:
    """Run to the end in a forked process; returns its number, and a pipe that gets a byte after each step."""
    reads, writes = os.pipe()
    number = os.fork()
    if number:
        os.close(writes)
        return number, reads
    code = 1
    try:
        found = search(directory, observer=lambda _: os.write(writes, b".") and None, given=given)
        _written(found, directory / "state.tmp")
        os.replace(directory / "state.tmp", directory / "state.safetensors")
        code = 0
    except Interrupted as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        code = INTERRUPTED
    finally:
        os._exit(code)


def _wait(child: tuple[int, int]) -> int:
    os.close(child[1])
    return os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1])


def _same(first: Path, second: Path) -> bool:
    a, b = (load_file(path / "state.safetensors") for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def kill(directory: Path, count: int, seed: int) -> dict[str, Any]:
    """One undisturbed run, `count` runs killed at a random moment and begun again, one stopped by SIGINT or SIGTERM."""
    given = problem(Budget(bops=1 / 70))  # reason: its search begins with no plan of another method, in half the time
    digits()  # reason: imports what children would each import again
    whole = directory / "whole"
    whole.mkdir()
    child = _child(whole, given)
    times = []
    while os.read(child[1], 1):
        times.append(time.monotonic())
    assert _wait(child) == 0
    steps, seconds = len(times), (times[-1] - times[0]) / (len(times) - 1)
    draw = random.Random(seed)
    outcomes, interrupted = [], []
    for index in range(count + 1):
        place = directory / str(index)
        place.mkdir()
        child = _child(place, given)
        for _ in range(draw.randrange(1, steps - 2) if index < count else steps // 2):
            os.read(child[1], 1)
        time.sleep(draw.uniform(0, 2) * seconds)
        os.kill(child[0], signal.SIGKILL if index < count else (signal.SIGINT, signal.SIGTERM)[seed % 2])
        code = _wait(child)
        kept = (place / "checkpoints" / "search.safetensors").exists()
        again = 0 if code == 0 else _wait(_child(place, given))
        (outcomes if index < count else interrupted).append((code, kept, again, _same(whole, place)))
    return {"killed": outcomes, "interrupted": interrupted[0]}


def spread(directory: Path) -> None:
    """One search over all processes of this launch; each writes what it came to."""
    from sbs_fx.training.processes import Processes

    processes = Processes()
    settings = Training(checkpoint_every=1000, mixup=0.2)
    found = search(directory, norm=False, settings=settings, writes=processes.is_first)
    _written(found, directory / f"state-{processes.rank}.safetensors")


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        sys.stdout.write(json.dumps(kill(Path(sys.argv[2]), *map(int, sys.argv[3:]))) + "\n")
    else:
        spread(Path(sys.argv[2]))
