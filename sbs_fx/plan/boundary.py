"""Where errors of other libraries become ours: around what users call.

In: a public function. Out: the same, whose errors are `SbsError`, each with the other library's error as its cause.
Holds: what a caller's own code raises (a data set, a callback, a function of theirs) passes as it is, and so does a
call with arguments that the function has not.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

from sbs_fx.plan.errors import BackendError, DataError, FileError, SbsError, SettingsError, TraceError

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LONGEST = 300  # characters of another library's text
_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_paths()[name]) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {os.path.realpath(Path(__file__).parents[1]) + os.sep, os.path.realpath(Path(__file__).parents[1] / "passes")}
)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|cannot allocate", re.I)
_DAMAGED = "was cut short, altered, or is of another kind: write it again"
_TOOL = "check the tool's version, or choose another format or backend"
# First parts of the modules in which kinds of errors are defined -> what they become, and what to do.
_KINDS: Mapping[str, tuple[type[SbsError], str]] = {
    **dict.fromkeys(
        ("json", "yaml", "zipfile", "zlib", "lzma", "pickle", "_pickle", "safetensors", "safetensors_rust", "tarfile"),
        (FileError, f"a file {_DAMAGED}"),
    ),
    "PIL": (DataError, f"a picture {_DAMAGED}"),
    "datasets": (DataError, "check the name of the data set and what its directory holds"),
    "pydantic_core": (SettingsError, "give fields as the documentation of that value has them"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "openvino", "executorch", "torchao"), (BackendError, _TOOL)),
    "torch._inductor": (BackendError, _TOOL),
    "torch._dynamo": (TraceError, "compress a part of the model (part=), or change what is named"),
    "torch.export": (TraceError, "compress a part of the model (part=), or change what is named"),
    "torch._export": (TraceError, "compress a part of the model (part=), or change what is named"),
}


def boundary(doing: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator for what users call. doing: the call in words, such as "compress"."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return function(*args, **kwargs)
            except SbsError:
                raise
            except Exception as error:
                inside = error.__traceback__ and error.__traceback__.tb_next
                if inside is None or any(_is_callers(frame) for frame in _frames(inside)):
                    raise
                raise translated(error, doing) from error

        return call

    return decorate


def translated(error: Exception, doing: str) -> SbsError:
    """The error of ours for any other, in one line: what was being done, what stopped it, and what to do."""
    told = f"{doing} stopped at {type(error).__name__}: {first_line(error)}"
    kind = type(error).__module__
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return SbsError(f"{told}; there is not enough memory: give smaller batches or inputs, or fewer of them")
    for name, (ours, remedy) in _KINDS.items():
        if kind == name or kind.startswith(f"{name}."):
            return ours(f"{told}; {remedy}")
    if isinstance(error, UnicodeError):
        return FileError(f"{told}; a file {_DAMAGED}")
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename!r}: "
        return FileError(
            f"{doing} stopped at {place}{error.strerror or first_line(error)}; check that it is there, may be read or "
            "written, and that the disk has room"
        )
    if isinstance(error, ImportError):
        return BackendError(f"{told}; install or mend that package")
    return SbsError(f"{told}; no check foresaw this: please report it with the cause of this error (-v shows it)")


def first_line(error: Exception) -> str:
    """An error's text without where in a graph it was, in which torch ends many of its own."""
    text = str(error).partition("While executing %")[0]
    line = next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "it says no more")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is_callers(frame: FrameType) -> bool:
    """Whether code that runs is neither ours nor of Python or an installed package. Code that was generated has the
    name of the module it is for; of graphs it has none."""
    name: Any = frame.f_globals.get("__name__")
    if not isinstance(name, str):
        return False
    file = getattr(sys.modules.get(name), "__file__", None) or frame.f_globals.get("__file__")
    if file is None:
        return name == "__main__"  # reason: what is typed; else built in
    return not os.path.realpath(file).startswith(_LIBRARIES)
