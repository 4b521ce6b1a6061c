"""Where a run leaves its work, what it was, and the same run again.

In: options as they were typed. Out: `run.json` beside the result; `sbs-fx rerun`. Holds: a run's directory is its own,
unless the very same command is given again; the same command on the same machine gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbs_fx.cli.planning import RUN, load_run

if TYPE_CHECKING:
    from sbs_fx.data.datasets import Batches

SAME = ("policy.json", "model.pt2")
_OUT = ("--out", "-o")


def default_directory(model: str, budget: str | None, arguments: Sequence[str]) -> str:
    """out/NAME-5pct, or with a number behind it if another command has left its work there."""
    text = (budget or "5%").replace("%", "pct")
    base = os.path.join("out", re.sub(r"[^\w.]+", "-", f"{os.path.basename(model)}-{text}").strip("-"))
    for number in range(1, 1000):
        directory = base if number == 1 else f"{base}-{number}"
        if not os.path.exists(directory) or begun_by(directory) == [*arguments]:
            return directory
    return base


def begun_by(directory: str) -> list[str] | None:
    """The command that a directory belongs to; None: nobody says."""
    from json import loads

    try:
        with open(os.path.join(directory, RUN), encoding="utf-8") as file:
            return list(loads(file.read())["arguments"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def circumstances(arguments: Sequence[str], train: Batches | None, test: Batches | None) -> dict[str, Any]:
    """What a run depends on beside its options: the command, the data, versions and the machine."""
    import torch

    from sbs_fx.plan import current_versions

    data = None
    if train is not None:
        data = {
            "train": train.pictures,
            "test": None if test is None else test.pictures,
            "classes": list(getattr(train, "classes", ())),
            "identity": getattr(train, "identity", None),
        }
    return {
        "arguments": list(arguments),
        "working_directory": os.getcwd(),
        "data": data,
        "versions": current_versions(),
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
    }


def rerun(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="the --out of an earlier `sbs-fx compress`")],
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="DIR", help="default: DIR-again")] = None,
) -> None:
    """The same command again, in a directory of its own, and whether the same bytes came of it."""
    from sbs_fx.cli import main
    from sbs_fx.plan.errors import FileError

    asked = load_run(directory)
    arguments, place = asked.get("arguments"), asked.get("working_directory")
    if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments) or not isinstance(place, str):
        raise FileError(f"{os.path.join(directory, RUN)!r} does not say which command was run; compress again")
    new = os.path.abspath(out or f"{directory.rstrip(os.sep)}-again")
    before = os.path.abspath(directory)
    if new == before:
        raise typer.BadParameter(f"--out {out} is the directory of the earlier run; give another one")
    here = os.getcwd()
    try:
        os.chdir(place)  # reason: paths were typed there
        main([*_without_out(arguments), "--out", new])
    except SystemExit as end:
        if end.code:
            raise
    finally:
        os.chdir(here)
    other = [name for name in SAME if _digest(os.path.join(before, name)) != _digest(os.path.join(new, name))]
    if other:
        typer.echo(f"{', '.join(other)} differ from those in {directory}; run.json of both says what else differs")
        raise typer.Exit(1)
    typer.echo(f"{' and '.join(SAME)} in {new} are byte for byte those in {directory}")


def _without_out(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in _OUT and not argument.startswith("--out="):
            kept.append(argument)
        skip = not skip and argument in _OUT
    return kept


def _digest(path: str) -> str:
    from sbs_fx.plan.errors import FileError

    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise FileError(f"cannot read {path!r}: {error.strerror}; expected what `sbs-fx compress` has left") from error


def typed(context: typer.Context) -> list[str]:
    """The arguments of the command that is running."""
    given = context.find_root().obj
    return list(given) if isinstance(given, list) else sys.argv[1:]
