"""What commands do with a result: measure it, save it, print its closing table.

In: a result of `compress` or `apply`. Out: files in a directory, a table on stdout. Holds: a directory that cannot be
written is known before anything is computed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import nn

    from sbs_fx.cli.models import NamedModel
    from sbs_fx.data.datasets import Batches
    from sbs_fx.report import Report
    from sbs_fx.result import Result


def saved_file(path: str, name: str = "model.pt2") -> str:
    """A file of a saved result by its path, or by the directory that holds it."""
    return os.path.join(path, name) if os.path.isfile(os.path.join(path, name)) else path


def check_output(directory: str | None) -> None:
    """An output directory that cannot be written is known before anything is computed."""
    if directory is not None:
        from sbs_fx.plan.files import prepare_directory

        prepare_directory(directory)


def measured(
    module: nn.Module, result: Result, test: Batches | None, progress: Callable[[str, float], None], part: str | None
) -> Report:
    """The report with the accuracy of the model before and after, of the whole where a part was compressed."""
    if test is None:
        return result.report
    from sbs_fx.passes.capture.part import with_part
    from sbs_fx.training import evaluate

    progress("evaluate", 0.95)
    static = result.model if part is None else with_part(module, part, result.model)
    report = result.report.with_accuracy(evaluate(module, test), evaluate(static, test))
    notes = () if part is None else ("the accuracy is the whole model's, with the part in its place",)
    return report.model_copy(update={"notes": (*report.notes, *notes)})


def finish(made: NamedModel, result: Result, report: Report, directory: str | None, json: bool) -> None:
    """Save, and print the closing table."""
    from sbs_fx.training.processes import Processes

    if directory is not None and Processes().is_first:
        _save(made, result, report, directory)
    if json:
        typer.echo(report.to_json())
        return
    from sbs_fx.report.text import closing_table, warned

    Console().print(closing_table(report))
    for note in report.notes:
        typer.echo(f"note: {note}")
    for line in warned(report):
        typer.echo(line)
    if directory is not None:
        typer.echo(f"policy.json, model.pt2 and the report are in {directory}")
        typer.echo(f"page: {os.path.join(directory, 'report.html')}")


def _save(made: NamedModel, result: Result, report: Report, directory: str) -> None:
    """What `Result.save` writes, with the accuracy in the report and in the file the normalisation that was used, so
    that `evaluate` prepares images as they were prepared here."""
    if made.weights:
        report = report.model_copy(update={"notes": (*report.notes, f"weights: {made.weights}")})
    prepared = {k: list(v) if isinstance(v, tuple) else v for k, v in made.preparation.items()}
    metadata = {**result.metadata, **prepared, **({"classes": list(made.classes)} if made.classes else {})}
    dataclasses.replace(result, report=report, metadata=metadata).save(directory)
