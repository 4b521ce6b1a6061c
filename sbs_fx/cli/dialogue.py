"""`sbs-fx init`: a few questions, and the command that they come to.

In: answers at a terminal. Out: one command, printed; with --run it is run. Holds: nothing is asked that answers
itself, and an answer that cannot be is asked again.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import Annotated

import typer


def init(run: Annotated[bool, typer.Option("--run", help="run the command too")] = False) -> None:
    """A short dialogue that ends in the command to give."""
    words = [
        "sbs-fx",
        "compress",
        _asked("Model (a timm name, torchvision/NAME, hf/DIR, package.module:function)", _any),
    ]
    if checkpoint := _asked("File with its weights (empty: the published ones)", _file_or_nothing, ""):
        words += ["--checkpoint", checkpoint]
        if classes := _asked("Number of classes it was trained for (empty: the model's own)", _number_or_nothing, ""):
            words += ["--num-classes", classes]
    if data := _asked(
        "Folder of pictures, a folder a class in train/ and test/ (empty: no data)", _folder_or_nothing, ""
    ):
        words += ["--data", data]
        if (epochs := _asked("Epochs of training that you have time for", _number, "0")) != "0":
            words += ["--epochs", epochs]
    words += ["--budget", _asked("Budget (5% of the BOPs, 20x, 300M, 2MB, 5ms, macs=70%, params=50%)", _budget, "5%")]
    typer.echo(f"\n  {shlex.join(words)}\n")
    typer.echo("Add --dry-run to see first what is in reach; the result goes to out/.")
    if run:
        from sbs_fx.cli import main

        main(words[1:])


def _asked(question: str, check: Callable[[str], str], default: str | None = None) -> str:
    """An answer that passes a check, which gives what is wrong, or nothing."""
    while True:
        answer = str(typer.prompt(question, default=default, show_default=bool(default))).strip()
        if not (problem := check(answer)):
            return answer
        typer.echo(f"  {problem}")


def _any(answer: str) -> str:
    return "" if answer else "a name is needed"


def _file_or_nothing(answer: str) -> str:
    return "" if not answer or os.path.isfile(answer) else f"there is no file {answer!r}"


def _folder_or_nothing(answer: str) -> str:
    return "" if answer in ("", "digits") or os.path.isdir(answer) else f"there is no folder {answer!r}"


def _number(answer: str) -> str:
    return "" if answer.isdigit() else f"{answer!r} is no whole number"


def _number_or_nothing(answer: str) -> str:
    return _number(answer) if answer else ""


def _budget(answer: str) -> str:
    from sbs_fx.plan import Budget
    from sbs_fx.plan.errors import BudgetError

    try:
        Budget.parse(answer)
    except BudgetError as error:
        return str(error)
    return ""
