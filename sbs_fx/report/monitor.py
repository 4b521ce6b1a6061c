"""Observers of a training run: one JSON line a step, a live panel, plain lines; all from the same `Progress`.

In: a `Progress` after each step. Out: a file of metrics, or text on a terminal or stderr. Holds: nothing here changes
the run or its random state; a metrics file that was cut short can be read and continued; what is unknown shows as "-".
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import partial
from itertools import pairwise
from statistics import median
from threading import Lock
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.live import Live

from sbs_fx.plan import MEASURES
from sbs_fx.plan.errors import FileError
from sbs_fx.report.curves import clock, panel, percent
from sbs_fx.training.progress import Observer, Progress

DECAY: Final = 0.98  # of the exponential average of the loss: about the last fifty steps
_GAP = 1.0  # seconds between two looks at the clock, at least; an accelerator tells of many steps at once
_TAIL = 1 << 16  # bytes at the end of a metrics file in which its last whole line is looked for
_FIELDS = tuple(field.name for field in fields(Progress))
_HISTOGRAMS = ("weight_bits", "activation_bits")


class MetricsFile(AbstractContextManager["MetricsFile"]):
    """Append each step to `path` as a line of JSON: the fields of `Progress`, and "seconds" since the run began.

    A file that exists is continued, its seconds too; delete it before another run. Steps that a resumed run repeats
    occur twice; `read_metrics` takes the later ones. Each line is handed to the system at once and survives a kill.
    Raises FileError if `path` cannot be opened or written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        with _file_errors("write", path):
            self._file = open(path, "a+b")  # noqa: SIM115 (`close` closes it)
            self._file.seek(max(0, self._file.seek(0, os.SEEK_END) - _TAIL))
            tail = self._file.read()
            if tail and not tail.endswith(b"\n"):
                self._file.write(b"\n")  # reason: a kill cut the last line short; it must not swallow the next one
        entries = map(_parsed, reversed(tail.splitlines()))
        self._begin = time.monotonic() - next((entry["seconds"] for entry in entries if entry), 0.0)

    def __call__(self, progress: Progress) -> None:
        entry = {name: getattr(progress, name) for name in _FIELDS}
        entry |= {"measures": dict(progress.measures), "seconds": round(time.monotonic() - self._begin, 3)}
        with _file_errors("write", self._path):
            self._file.write(json.dumps(entry, default=float).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with _file_errors("write", self._path):
            self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What `MetricsFile` wrote: stages in order of first appearance, steps ascending, of each step the last line.

    Lines that are not whole are dropped. Raises FileError if the file cannot be read.
    """
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    with _file_errors("read", path), open(path, "rb") as file:
        for entry in filter(None, map(_parsed, file)):
            stages.setdefault(entry["stage"], {})[entry["step"]] = entry
    return [steps[step] for steps in stages.values() for step in sorted(steps)]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """One line as it was written, None if it is not whole."""
    try:
        entry = json.loads(line)
        for name in filter(entry["measures"].get, _HISTOGRAMS):  # reason: in JSON, keys are text
            entry["measures"][name] = {int(bits): count for bits, count in entry["measures"][name].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return entry if entry.keys() >= {*_FIELDS, "seconds"} else None


@contextmanager
def _file_errors(verb: str, path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot {verb} {os.fspath(path)!r}: {error.strerror or error}"
        raise FileError(f"{problem}; expected a file of metrics, or a new one in a writable directory") from error


class LiveMonitor(AbstractContextManager["LiveMonitor"]):
    """A panel on a terminal, drawn anew four times a second; a context manager.

    Nothing is drawn before the first step. The last state of a stage that ends stays above the panel as one line, the
    last panel stays when the context ends.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._lock = console, Lock()
        self._stage: _Stage | None = None
        self._live: Live | None = None

    def __call__(self, progress: Progress) -> None:
        before = self._stage
        with self._lock:  # reason: a thread of its own draws the panel, during validation too
            self._stage = _Stage.after(before, progress)
        if self._live is None:
            # reason: what goes into a file or a pipe must still go there
            out, err = sys.stdout.isatty(), sys.stderr.isatty()
            self._live = Live(self, console=self._console, redirect_stdout=out, redirect_stderr=err)
            self._live.start()
        elif before is not None and before is not self._stage:
            self._console.print(str(before), markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich__(self) -> RenderableType:
        """The panel as of the last step."""
        if self._stage is None:
            return ""
        block = "#" if self._console.options.ascii_only else "█"
        with self._lock:
            now, facts, measures = self._stage.latest, self._stage.facts(), self._stage.measures
        return panel(now.stage, facts, now.step / now.steps if now.steps else None, measures, block)


class PlainMonitor(AbstractContextManager["PlainMonitor"]):
    """One line at the first step, then one every `every` seconds and at each epoch's end; a context manager.

    `write` takes a line, without its line end. The last step is written when the context ends, if it was not before.
    """

    def __init__(self, write: Callable[[str], None], every: float = 10.0) -> None:
        self._write, self._every, self._due = write, every, -float("inf")
        self._stage: _Stage | None = None
        self._pending = False  # is the last step still to be written?

    def __call__(self, progress: Progress) -> None:
        before = self._stage
        if before is not None and (progress.epoch > before.latest.epoch or not before.goes_on(progress)):
            self._flush()  # reason: without a length, only the next step shows where an epoch ended
        self._stage, self._pending = _Stage.after(before, progress), True
        if time.monotonic() >= self._due or progress.step == progress.steps or progress.validation is not None:
            self._flush()

    def __exit__(self, *_: object) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._stage is not None and self._pending:
            self._write(str(self._stage))
            self._pending, self._due = False, time.monotonic() + self._every


def monitor(console: Console) -> LiveMonitor | PlainMonitor:
    """A context manager that gives an observer: the panel if the console is a terminal, else lines on stderr."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveMonitor(console)
    return PlainMonitor(partial(print, file=sys.stderr, flush=True))


def together(*observers: Observer) -> Observer:
    """One observer that tells all of these, in this order."""

    def tell(progress: Progress) -> None:
        for observer in observers:
            observer(progress)

    return tell


class _Stage:
    """What is shown of a stage; `str` of it is a line.

    The loss is an exponential average, the training accuracy the mean over the epoch so far, the speed a median, so
    that validation does not count; the time left comes from the mean, so that it does.
    """

    def __init__(self, first: Progress) -> None:
        self.latest, self.measures, self.validation = first, first.measures, first.validation
        self._loss = self._weight = self._right = 0.0
        self._labelled = self._images = 0
        self._start = (time.monotonic(), first.step - 1, 0)  # seconds, steps and images told of before
        self._looks = deque([self._start], maxlen=40)

    @classmethod
    def after(cls, before: _Stage | None, progress: Progress) -> _Stage:
        """The stage that this step belongs to, with the step added."""
        stage = before if before is not None and before.goes_on(progress) else cls(progress)
        stage._add(progress)
        return stage

    def goes_on(self, progress: Progress) -> bool:
        return progress.stage == self.latest.stage and progress.step > self.latest.step

    def _add(self, progress: Progress) -> None:
        if (now := time.monotonic()) - self._looks[-1][0] >= _GAP:
            self._looks.append((now, progress.step - 1, self._images))
        if progress.epoch != self.latest.epoch:
            self._right = self._labelled = 0
        if progress.accuracy is not None:
            self._right += progress.accuracy * (progress.images or 1)
            self._labelled += progress.images or 1
        self._loss, self._weight = DECAY * self._loss + progress.loss, DECAY * self._weight + 1
        self._images += progress.images
        self.measures = progress.measures or self.measures  # reason: an accelerator's steps are not all measured
        self.validation = self.validation if progress.validation is None else progress.validation
        self.latest = progress

    def facts(self) -> dict[str, str]:
        """What is known of every kind of stage, in the order in which it is shown."""
        now = self.latest
        rates = [(b[2] - a[2]) / (b[0] - a[0]) for a, b in pairwise(self._looks)]
        seconds, steps, _ = (b - a for a, b in zip(self._start, self._looks[-1], strict=True))
        return {
            "epoch": f"{now.epoch + 1}/{now.epochs}",
            "step": f"{now.step}/{now.steps or '-'}",
            "loss": f"{self._loss / self._weight:.4f}",
            "training": percent(self._right / self._labelled if self._labelled else None),
            "validation": percent(self.validation),
            "learning_rate": f"{now.rate:.3g}",
            "images/s": f"{median(rates):.0f}" if rates and self._images else "-",
            "time_left": clock((now.steps - now.step) * seconds / steps) if now.steps and steps else "-",
        }

    def __str__(self) -> str:
        facts, measures = self.facts(), self.measures
        shares = {name: measures[name] for name in (*MEASURES, "pruned") if name in measures}
        shares |= {f"{name}_budget": limit for name, limit in measures.get("budget", {}).items()}
        facts |= {name: percent(100 * share) for name, share in shares.items()}
        facts |= {f"{name}_multiplier": f"{value:.3g}" for name, value in measures.get("multiplier", {}).items()}
        for name in filter(measures.get, _HISTOGRAMS):
            facts[name] = ",".join(f"{bits}:{count}" for bits, count in sorted(measures[name].items()))
        return " ".join([self.latest.stage, *(f"{name}={value}" for name, value in facts.items())]).replace(" %", "%")
