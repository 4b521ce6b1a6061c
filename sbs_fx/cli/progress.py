"""What a run shows while it lasts: stages, training steps, and the file that keeps them; `-q` and `-v`.

In: calls with a stage or a step. Out: a bar, a panel or lines on stderr, so that what is printed can be piped.
Holds: with `-q` there is nothing but errors; with `-v` each step is a line with the time since the beginning.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from sbs_fx.report.trackers import Tracker
    from sbs_fx.training.progress import Observer
    from sbs_fx.training.progress import Progress as StepProgress

METRICS = "metrics.jsonl"

QUIET, NORMAL, VERBOSE = -1, 0, 1
verbosity = ContextVar("verbosity", default=NORMAL)

_EVERY = 30.0  # seconds between lines about steps of one stage
_STEP = re.compile(r" \d+ of \d+")

errors = Console(stderr=True)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="nothing but the result and errors")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="each step as a line with its time; of an error where it was raised")
]


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """A command with `-q` and `-v` beside its own options."""

    @wraps(command)
    def run(*arguments: Any, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        if quiet or verbose:
            verbosity.set(VERBOSE if verbose else QUIET)
        command(*arguments, **options)

    signature = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]
    parameters = [*signature.parameters.values(), *added]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def say(text: str) -> None:
    """A line on stderr, not with `-q`."""
    if verbosity.get() > QUIET:
        errors.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def show_progress() -> Iterator[Callable[[str, float], None]]:
    """A function of (stage, share done): a bar on a terminal, one line a stage elsewhere."""
    if verbosity.get() == QUIET:
        yield lambda stage, share: None
        return
    if verbosity.get() == VERBOSE or not sys.stderr.isatty():
        yield _lines()
        return
    # reason: what trains draws a panel of its own, so the bar is taken away then
    bar = Progress(
        TextColumn("{task.description:40s}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=1.0)

        def show(stage: str, share: float) -> None:
            bar.update(task, description=stage, completed=share)
            if stage in ("search", "fine-tune"):
                bar.stop()
            elif not bar.live.is_started:
                bar.start()

        yield show


def _lines() -> Callable[[str, float], None]:
    """One line a stage; of its steps one every half minute, or each."""
    verbose, begin, last = verbosity.get() == VERBOSE, time.monotonic(), [0.0]

    def show(stage: str, share: float) -> None:
        is_step, now = _STEP.search(stage) is not None, time.monotonic()
        if stage != "done" and (verbose or not is_step or now - last[0] > _EVERY):
            typer.echo(f"{now - begin:8.1f} s  {stage}" if verbose else f"{stage} ...", err=True)
            last[0] = now

    return show


@contextmanager
def show_steps(out: str | None, restart: bool, tracker: Tracker | None = None) -> Iterator[Observer]:
    """What shows training steps, and keeps them in the output directory, where an earlier part of the run may be."""
    from sbs_fx.report.monitor import MetricsFile, monitor, together

    path = None if out is None else os.path.join(out, METRICS)
    begins = out is not None and (restart or not os.path.exists(os.path.join(out, "checkpoints")))
    with ExitStack() as stack:
        observers: list[Observer] = [] if tracker is None else [stack.enter_context(tracker)]
        begun: list[bool] = []

        def observe(step: StepProgress) -> None:
            if not begun:  # reason: a run that does not train leaves nothing
                begun.append(True)
                if verbosity.get() > QUIET:
                    shown = monitor(errors)
                    stack.enter_context(shown)
                    observers.append(shown)
                if path is not None:
                    if begins and os.path.exists(path):
                        os.unlink(path)
                    observers.append(stack.enter_context(MetricsFile(path)))
            together(*observers)(step)

        yield observe
