"""Training steps in the trackers that accelerate knows, such as TensorBoard and Weights & Biases.

In: the name of a tracker, steps of training. Out: what it keeps, by its own means. Holds: a tracker that is not
installed is known before anything is computed; of several processes the first one tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from sbs_fx.plan.errors import InputError
from sbs_fx.training.progress import Progress

_NUMBERS = ("loss", "rate", "accuracy", "validation", "epoch")


class Tracker(AbstractContextManager["Tracker"]):
    """An observer of training, and a context manager.

    Args:
        name: as accelerate names it, such as "tensorboard" or "wandb". directory: of those that write files.
        run: its name. settings: what the run was asked for.

    Raises:
        InputError: accelerate knows no such tracker, or it is not installed.
    """

    def __init__(self, name: str, run: str, directory: str, settings: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        available = [str(each) for each in get_available_trackers()]
        if name not in available:
            problem = "is not installed" if name in LOGGER_TYPE_TO_CLASS else "is none that accelerate knows"
            raise InputError(f"tracker {name!r} {problem}; installed: {', '.join(available) or 'none'}")
        kind = LOGGER_TYPE_TO_CLASS[name]
        self._tracker = kind(run, logging_dir=directory) if kind.requires_logging_directory else kind(run)
        if hasattr(self._tracker, "start"):
            self._tracker.start()
        plain = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool))}
        self._tracker.store_init_configuration(plain)
        self._before: dict[str, int] = {}

    def __call__(self, progress: Progress) -> None:
        values = {key: value for key in _NUMBERS if (value := getattr(progress, key)) is not None}
        values |= {key: value for key, value in progress.measures.items() if isinstance(value, (int, float))}
        self._before[progress.stage] = progress.step
        named = {f"{progress.stage}/{key}": float(value) for key, value in values.items()}
        self._tracker.log(named, step=sum(self._before.values()))

    def __exit__(self, *_: object) -> None:
        self._tracker.finish()
