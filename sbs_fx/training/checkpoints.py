"""Checkpoints: one safetensors file a stage, whose header holds the plain part as JSON.

In: tensors and JSON. Out: the same, in a later process. Holds: a file under its final name is whole (it is written
under a temporary name and renamed) and holds what was written; no pickle; one process at a time uses a directory; a
checkpoint of another run is refused, and the fields that differ are named; the one before the last is kept, and is
taken up where the last is gone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sbs_fx.passes.graph import digest
from sbs_fx.plan import write_atomic
from sbs_fx.plan.errors import CheckpointMismatch, FileError
from sbs_fx.plan.files import remove_leftovers


class Saved(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in one directory, which is locked as long as this object is open.

    Args:
        directory: made if it is missing.
        identity: what must be the same for a checkpoint to be taken up (model, method, budget, settings, version).
        restart: forget what is there.

    Raises:
        FileError: the directory cannot be used, or another process uses it.

    >>> with Checkpoints("kept", {"seed": 0}) as checkpoints:
    ...     checkpoints.save("search", {}, {"step": 3})
    ...     checkpoints.load("search").state["step"]
    3
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: Mapping[str, Any],
        *,
        restart: bool = False,
        writes: bool = True,
    ) -> None:
        self.directory, self.writes = os.fspath(directory), writes
        self.identity = json.loads(json.dumps(dict(identity), sort_keys=True, default=str))
        self._lock = FileLock(os.path.join(self.directory, "lock"))
        if writes:
            self._acquire()
            if restart:
                for name in os.listdir(self.directory):
                    if name.endswith(".safetensors"):
                        os.unlink(os.path.join(self.directory, name))

    def _acquire(self) -> None:
        try:
            os.makedirs(self.directory, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise FileError(
                f"the checkpoints in {self.directory!r} are in use by another process; wait for it or give another "
                "directory"
            ) from error
        except OSError as error:
            raise FileError(f"cannot use {self.directory!r} for checkpoints: {error.strerror}") from error
        remove_leftovers(self.directory)

    def path(self, stage: str) -> str:
        return os.path.join(self.directory, f"{stage}.safetensors")

    def previous(self, stage: str) -> str:
        return os.path.join(self.directory, f"{stage}.previous.safetensors")

    def existing(self, stage: str) -> str | None:
        """The stage's last file, if there is one."""
        return next(filter(os.path.exists, (self.path(stage), self.previous(stage))), None)

    def save(self, stage: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """The stage's checkpoint; the one that was is kept as the one before. Raises FileError; both are still there
        then."""
        if self.writes:
            # reason: clones, because tied weights share memory, which the format does not allow
            plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
            header = {"identity": json.dumps(self.identity), "state": json.dumps(dict(state))}
            header["sha256"] = _digest(plain, header)
            write_atomic(self.path(stage), save(plain, header), self.previous(stage))

    def load(self, stage: str) -> Saved | None:
        """The stage's checkpoint; None if there is none.

        Raises:
            CheckpointMismatch: it belongs to another run. FileError: it cannot be read.
        """
        path = self.existing(stage)
        if path is None:
            return None
        try:
            tensors, identity, state = _read(path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            advice = "start again with restart=True (--restart)"
            with suppress(SafetensorError, OSError, KeyError, ValueError):
                _read(self.previous(stage))
                advice = f"delete it to go on from the one before ({self.previous(stage)!r} is whole), or {advice}"
            raise FileError(f"cannot read the checkpoint {path!r}: {error}; {advice}") from error
        names = [k for k in {**identity, **self.identity} if identity.get(k) != self.identity.get(k)]
        if names:
            parts = [f"{k} was {identity.get(k)!r}, is {self.identity.get(k)!r}" for k in names]
            raise CheckpointMismatch(
                f"the checkpoint {path!r} belongs to another run: {'; '.join(parts)}. Give another output directory, "
                "or restart=True (--restart) to begin anew",
                different=names,
            )
        return Saved(tensors, state)

    def close(self) -> None:
        """Let other processes use the directory."""
        self._lock.release()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, identity and state. Raises SafetensorError, OSError, KeyError or ValueError."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        identity, state = json.loads(header["identity"]), json.loads(header["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if _digest(tensors, header) != header["sha256"]:
        raise ValueError("it was altered")
    return tensors, identity, state


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Of everything in a file but the digest itself."""
    return digest(tensors, header["identity"] + "\0" + header["state"])
