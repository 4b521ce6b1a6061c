"""Rows of the zoo benchmark as markdown: counts by kind, every row, and what is not ok by its cause.

In: rows, of which any key but `kind`, `model` and `outcome` may be missing. Out: text.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from _coverage_table import markdown

Row = dict[str, Any]
COLUMNS = ("trace", "size", "price", "slim", "budget", "static", "file", "unchanged")


def summary(rows: Sequence[Row]) -> str:
    """How many are ok, refused and faulty, by kind."""
    lines = [_counts(kind, [r for r in rows if r["kind"] == kind]) for kind in dict.fromkeys(r["kind"] for r in rows)]
    return markdown(["kind", "rows", "ok", "refused", "faulty"], [*lines, _counts("all", rows)])


def _counts(name: str, rows: Sequence[Row]) -> list[str]:
    outcomes = [row["outcome"].partition(":")[0] for row in rows]
    return [name, str(len(rows)), *(str(outcomes.count(each)) for each in ("ok", "refused", "faulty"))]


def table(rows: Sequence[Row]) -> str:
    header = ["kind", "model", *COLUMNS, "MACs gone", "prunable", "BOPs", "s"]
    return markdown(header, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    shares = row.get("shares", {})
    return [
        row["kind"],
        row["model"],
        *(row.get(column, "").partition(":")[0] for column in COLUMNS),
        *(f"{100 * row[key]:.0f} %" if key in row else "" for key in ("mac_reduction", "prunable_share")),
        f"{100 * shares['bops']:.1f} %" if "bops" in shares else "",
        f"{row.get('wall_seconds', 0):.0f}",
    ]


def causes(rows: Sequence[Row]) -> str:
    """Each column that is not ok, those with the same text together, the most frequent first."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        texts = {column: row[column] for column in ("build", *COLUMNS) if row.get(column, "ok") != "ok"}
        if not texts and row["outcome"] != "ok":
            texts = {"process": row["outcome"]}
        for column, text in texts.items():
            found[f"{column}: {_without_names(text)}"].append(row["model"])
        for operator in row.get("unknown_operators", ()):
            found[f"no rule for {operator}"].append(row["model"])
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return "\n".join(f"- {len(models)} x {cause} ({', '.join(models)})" for cause, models in ordered)


def _without_names(text: str) -> str:
    """Numbers and quoted names apart, texts of one cause are the same."""
    return re.sub(r"[-+]?\d[\d.e+-]*", "#", re.sub(r"'[^']*'", "'...'", text))[:300]
