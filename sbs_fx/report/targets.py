"""What became of a saved result in other tools: `targets.json`, which exports and benchmarks of a directory leave.

In: what an export or a benchmark has found. Out: rows by tool, which the page shows as a table. Holds: a row says only
what was run here, and what was not run says why; what is found again replaces what was found before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from sbs_fx.passes.capture.inputs import random_like
from sbs_fx.plan import write_atomic
from sbs_fx.plan.errors import FileError
from sbs_fx.plan.files import parse_object, read_text

TARGETS_FILE = "targets.json"
EXAMPLES = 32  # that outputs are compared on


class TargetRow(BaseModel):
    """One tool.

    Attributes:
        tool: what ran it. file: its file, of `stored` bytes. kernels: layers with an integer kernel, as "20 of 21".
        same: share of equal predictions, and difference: the largest of any output, on so many made-up `examples`;
            None where it was not compared.
        milliseconds: of one call, by batch size.
        reason: why it was not run; "" if it was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool: str
    file: str = ""
    stored: int | None = None
    kernels: str = ""
    examples: int = 0
    same: float | None = None
    difference: float | None = None
    milliseconds: dict[str, float] = {}
    reason: str = ""


def compared(
    run: Callable[..., Any], static: Callable[..., Any], inputs: Sequence[Tensor]
) -> tuple[int, float | None, float | None]:
    """(examples, share of equal predictions, largest difference) of a tool and the static graph on normal numbers of
    the shapes of `inputs`; no share where outputs are no logits of shape (batch, classes)."""
    draw = torch.Generator().manual_seed(0)
    examples, equal, largest = 0, 0, 0.0
    is_logits = True
    while examples < EXAMPLES:
        batch = [random_like(x, draw) for x in inputs]
        with torch.no_grad():
            pairs = [torch.utils._pytree.tree_leaves(call(*batch)) for call in (run, static)]
        tensors = [(a, b) for a, b in zip(*pairs, strict=True) if isinstance(b, Tensor)]
        for theirs, ours in tensors:
            largest = max(largest, float((theirs.double() - ours.double()).abs().max()) if ours.numel() else 0.0)
        is_logits = is_logits and len(tensors) == 1 and tensors[0][1].ndim == 2
        if is_logits:
            theirs, ours = tensors[0]
            equal += int((theirs.argmax(1) == ours.argmax(1)).sum())
        examples += len(batch[0]) if batch and batch[0].ndim else 1
    return examples, equal / examples if is_logits else None, largest


def read_targets(directory: str | os.PathLike[str]) -> list[TargetRow]:
    """What was recorded there, nothing if there is no file. Raises FileError."""
    path = os.path.join(directory, TARGETS_FILE)
    if not os.path.exists(path):
        return []
    try:
        return [TargetRow(**row) for row in parse_object(read_text(path, "a table of targets"), path)["rows"]]
    except (ValidationError, KeyError, TypeError) as error:
        raise FileError(f"{path!r} is no table of targets; delete it, and export again") from error


def forget_targets(directory: str | os.PathLike[str]) -> None:
    """What was found of another result that was here before is not of the new one."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, TARGETS_FILE))


def record_targets(directory: str | os.PathLike[str], rows: Sequence[TargetRow]) -> None:
    """Add what was found to what is there: fields that a row sets replace those of the same tool."""
    merged = {row.tool: row for row in read_targets(directory)}
    for row in rows:
        before = merged.get(row.tool, TargetRow(tool=row.tool))
        reason = {} if row.reason else {"reason": ""}
        merged[row.tool] = before.model_copy(update={**row.model_dump(exclude_unset=True), **reason})
    table = {"format": 1, "rows": [row.model_dump() for row in merged.values()]}
    write_atomic(os.path.join(directory, TARGETS_FILE), (json.dumps(table, indent=1) + "\n").encode())
