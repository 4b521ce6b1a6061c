"""A report as one HTML page that needs nothing else: no network, no other file.

In: a report, and what its directory has beside it. Out: the page's text; the drawing is done by the scripts in
`assets`, from the data that the page carries as JSON. Holds: names reach the page as data and are shown as text, never
as markup; equal reports give equal pages.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import Any, Final

from sbs_fx.plan import MEASURES
from sbs_fx.plan.files import parse_object, read_text
from sbs_fx.report.data import ReportData

_SCRIPTS: Final = (
    "core.js",
    "tables.js",
    "layers.js",
    "tree.js",
    "graph.js",
    "panels.js",
    "training.js",
    "replan.js",
    "tradeoff.js",
    "outcomes.js",
    "main.js",
)
_POINTS = 400  # of a training curve, a stage
_STEP = ("stage", "step", "steps", "epoch", "epochs", "rate", "seconds")


@dataclass(frozen=True)
class Extras:
    """What a directory may have beside the report.

    Attributes:
        run: of `run.json`. sensitivity: of `sensitivity.json`. metrics: steps of training, as `read_metrics` has them.
        targets: of `targets.json`, what became of it in other tools.
        against: a second report, which makes the page a difference. labels: of the two.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: Mapping[str, Any] | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    targets: Sequence[Mapping[str, Any]] = ()
    against: ReportData | None = None
    labels: tuple[str, str] = ("first", "second")

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> Extras:
        """What lies in a directory; what is not there is left out. Raises FileError: a file is not whole."""

        def parsed(name: str) -> dict[str, Any] | None:
            path = os.path.join(directory, name)
            return parse_object(read_text(path, "a file of JSON"), path) if os.path.exists(path) else None

        metrics: Sequence[Mapping[str, Any]] = ()
        path = os.path.join(directory, "metrics.jsonl")
        if os.path.exists(path):
            from sbs_fx.report.monitor import read_metrics  # reason: brings the terminal's library

            metrics = read_metrics(path)
        targets = (parsed("targets.json") or {}).get("rows", ())
        return cls(parsed("run.json") or {}, parsed("sensitivity.json"), metrics, targets)


def page(report: ReportData, extras: Extras | None = None) -> str:
    """The page of a report; with `extras.against`, of the difference between two."""
    extras = extras or Extras()
    reports = [_rows(report)] if extras.against is None else [_rows(report), _rows(extras.against)]
    data = {
        "reports": reports,
        "labels": extras.labels,
        "run": extras.run,
        "sensitivity": (extras.sensitivity or {}).get("rows", []),
        "metrics": curves(extras.metrics),
        "targets": extras.targets,
    }
    return _filled(data, f"{extras.run.get('model') or report.model or 'model'}: report")


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The page of several methods on one model; `comparison` as `Comparison.rows` gives it."""
    data: dict[str, Any] = {"reports": [], "labels": [], "run": {}, "sensitivity": [], "metrics": [], "targets": []}
    return _filled({**data, "comparison": comparison}, "methods side by side")


def _filled(data: Mapping[str, Any], title: str) -> str:
    parts = {
        "title": escape(title),
        "style": _asset("page.css"),
        "data": embedded(data),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def embedded(data: Any) -> str:
    """JSON that can stand within a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(_finite(data), separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Training steps thinned to a few hundred points a stage: means of losses and accuracies, of the rest the last."""
    points = []
    for _, group in groupby(metrics, key=lambda row: str(row["stage"])):
        rows = list(group)
        length = math.ceil(len(rows) / _POINTS)
        for i in range(0, len(rows), length):
            part = rows[i : i + length]
            measures = part[-1]["measures"]
            points.append(
                {name: part[-1].get(name) for name in _STEP}
                | {name: _mean([row.get(name) for row in part]) for name in ("loss", "accuracy")}
                | {"validation": next((r["validation"] for r in reversed(part) if r["validation"] is not None), None)}
                | {"measures": {name: measures[name] for name in (*MEASURES, "pruned", "budget") if name in measures}}
            )
    return points


def _rows(report: ReportData) -> dict[str, Any]:
    """The report without its costs by layer, which its rows have too."""
    fields: dict[str, Any] = json.loads(report.model_dump_json(exclude={"cost"}))
    return {**fields, "totals": report.totals()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _finite(value: Any) -> Any:
    """Plain values with None for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _asset(name: str) -> str:
    return files("sbs_fx.report").joinpath("assets", name).read_text(encoding="utf-8")
