"""Files of plain values: written whole or not at all, read with every doubt named.

In: bytes or text. Out: a file, or the JSON object that it holds. Holds: a name has all of what was written or what it
held before; what was cut short or repeats a name is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from sbs_fx.plan.errors import FileError, PolicyError

try:
    import fcntl
except ImportError:  # reason: Windows has none
    fcntl = None  # type: ignore[assignment]

_T = TypeVar("_T")
DRAFTS: Final = ".export-"  # begins the names of folders in which a file is made
_TEMPORARY = re.compile(rf"\..+\.[0-9a-f]{{8}}\.tmp|{re.escape(DRAFTS)}[a-z0-9_]{{8}}")
_YOUNG = 1.0  # seconds within which a process may not hold yet what it has just made


def write_atomic(path: str | os.PathLike[str], data: bytes, previous: str | None = None) -> None:
    """Write `data` to `path` so that the final name holds either all of it or what it held before.

    Args:
        previous: where what `path` held before is kept; killed in between, that is all there is.

    Raises:
        FileError: the directory is missing or not writable, `path` is a directory, the disk is full.

    >>> write_atomic("note.txt", b"whole")
    >>> open("note.txt").read()
    'whole'
    """
    path = os.fspath(path)
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file, held(temporary):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if previous is not None and os.path.exists(path):
                os.replace(path, previous)
            os.replace(temporary, path)
    except OSError as error:
        raise FileError(
            f"cannot write {path!r}: {error.strerror or error}; expected a writable path in an existing directory with "
            f"{len(data)} bytes free. Nothing was written under that name."
        ) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def held(path: str) -> Iterator[None]:
    """Say meanwhile that a process uses this temporary file or folder."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # reason: some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove temporary files and folders that killed processes have left; those that a process holds stay."""
    if fcntl is None:
        return
    for entry in os.scandir(directory):
        if not _TEMPORARY.fullmatch(entry.name):
            continue
        with suppress(OSError):  # reason: another process may be faster, or hold it
            if time.time() - entry.stat(follow_symlinks=False).st_mtime < _YOUNG:
                continue
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
            finally:
                os.close(descriptor)


def read_text(path: str | os.PathLike[str], expected: str) -> str:
    """What a file of text holds. Raises FileError, which says what was expected."""
    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path!r}: {error}; expected {expected}") from error


def read_as(path: str | os.PathLike[str], expected: str, parse: Callable[[str], _T]) -> _T:
    """What `parse` makes of a file of text; its FileError and PolicyError name the path too."""
    text = read_text(path, expected)
    try:
        return parse(text)
    except (FileError, PolicyError) as error:
        raise type(error)(f"{os.fspath(path)!r}: {error}") from None


def prepare_directory(directory: str | os.PathLike[str]) -> str:
    """Make sure that results can be written there, before hours are spent. Raises FileError."""
    try:
        path = os.fspath(directory)
        os.makedirs(path, exist_ok=True)
    except (OSError, TypeError, ValueError) as error:  # reason: what is no path, or has a null in it
        raise FileError(
            f"cannot make the output directory {directory!r}: {getattr(error, 'strerror', None) or error}; expected a "
            "new name or a directory"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise FileError(f"the output directory {path!r} is not writable")
    remove_leftovers(path)
    return path


def checksum_of(fields: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of all fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def parse_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object as a dict; FileError if it is cut short, is no object, or repeats a name."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if len(counts) < len(pairs):
            raise ValueError(f"names {[n for n, c in counts.items() if c > 1]} occur more than once")
        return dict(pairs)

    try:
        fields = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{what} is not whole JSON ({error}): it was truncated or altered; write it again") from None
    if not isinstance(fields, dict):
        raise FileError(f"{what} is a JSON {type(fields).__name__}, expected an object; write it again")
    return fields
