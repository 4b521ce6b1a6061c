"""Something that writes files, stopped or refused at any one of its writes.

In: an action without arguments. Out: whether it got so far. Holds: a stopped process tidies nothing up, as after
`kill -9`; a refused write raises as a full disk does.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

_CALLS = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")
_KILLED = 77  # exit code
Action = Callable[[], Any]


def killed_at(number: int, action: Action) -> bool:
    """Run it in a process of its own, which ends before its nth write, rename, removal or flush, a write half done;
    False if it has no so many, and then it succeeded."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, _KILLED), code
        return code == _KILLED
    try:
        with _counted(number, lambda: os._exit(_KILLED)):
            action()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@contextmanager
def full_disk_at(number: int) -> Iterator[list[int]]:
    """The nth write, rename or flush raises; gives the list of those that were reached."""

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with _counted(number, refuse, ("replace", "rename", "fsync", "mkdir")) as reached:
        yield reached


@contextmanager
def _counted(number: int, end: Callable[[], Any], calls: tuple[str, ...] = _CALLS) -> Iterator[list[int]]:
    reached: list[int] = []

    def step() -> bool:
        reached.append(len(reached) + 1)
        return len(reached) == number

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if step():
                end()
            return real(*args, **options)

        return call

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        made = real_open(file, mode, *args, **options)
        return made if not set(mode) & set("wax+") else _Half(made, step, end)

    real_open = io.open
    with patch.object(builtins, "open", opened):
        patches = [patch.object(os, name, counted(getattr(os, name))) for name in calls]
        for each in patches:
            each.start()
        try:
            yield reached
        finally:
            for each in patches:
                each.stop()


class _Half:
    """A file of which one write is half done."""

    def __init__(self, file: Any, step: Callable[[], bool], end: Callable[[], Any]) -> None:
        self._file, self._step, self._end = file, step, end

    def write(self, data: Any) -> Any:
        if self._step():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._end()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Half:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
