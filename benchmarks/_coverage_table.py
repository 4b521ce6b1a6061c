"""Rows of the coverage benchmark as markdown: one line a family, and what they come to.

In: rows, of which any key but `family`, `model` and `outcome` may be missing. Out: text.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def table(rows: Sequence[Row], *, graph_only: bool = False) -> str:
    """All rows of the families; of the whole registry, a line a family with its counts."""
    if graph_only:
        return markdown(
            ["family", "models", "ok", "groups", "MACs gone, least", "prunable share, least"],
            [
                _family_line(family, [r for r in rows if r["family"] == family])
                for family in dict.fromkeys(r["family"] for r in rows)
            ],
        )
    columns: list[Column] = [
        ("family", lambda r: r["family"]),
        ("model", lambda r: r["model"]),
        ("outcome", lambda r: r["outcome"]),
        ("groups", lambda r: str(r.get("groups", ""))),
        ("MACs gone", lambda r: _percent(r, "mac_reduction")),
        ("prunable", lambda r: _percent(r, "prunable_share")),
        ("mask - slim", lambda r: _small(r.get("slim_error"))),
        ("codes off", lambda r: _small(max((r[k]["share"] for k in ("codes", "mixed_codes") if k in r), default=None))),
        ("BOPs", lambda r: _percent(r, "bops_share")),
        ("file", lambda r: f"{r['file_bytes'] / 1e6:.1f} MB" if "file_bytes" in r else ""),
        ("passes / export", lambda r: f"{r['compile_to_export']:.1f}" if "compile_to_export" in r else ""),
        ("groups s", lambda r: f"{r['seconds']['groups']:.3f}" if "groups" in r["seconds"] else ""),
        ("peak MB", lambda r: f"{r['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in r else ""),
    ]
    return markdown([name for name, _ in columns], [[show(row) for _, show in columns] for row in rows])


def summary(rows: Sequence[Row], *, graph_only: bool = False) -> str:
    """Counts, medians and extremes, and everything that is not "ok" with its reason."""
    good = [r for r in rows if r["outcome"] == "ok"]
    lines = [f"{len(good)} of {len(rows)} {'models' if graph_only else 'families'} ok."]
    if not rows:
        return lines[0]
    for key, name in (
        ("mac_reduction", "MACs gone when every group keeps 70 %"),
        ("prunable_share", "conv and linear MACs with a prunable side"),
    ):
        values = [r[key] for r in rows if key in r]
        if values:
            lines.append(f"{name}: median {100 * statistics.median(values):.1f} %, least {100 * min(values):.1f} %.")
    lines += _extremes(rows, "compile_seconds", "trace + groups + gates + slim + finalise", "s")
    lines += _extremes(rows, "compile_to_export", "the same over torch.export alone", "times")
    groups = [{"model": r["model"], "groups": r["seconds"]["groups"]} for r in rows if "groups" in r["seconds"]]
    lines += _extremes(groups, "groups", "groups alone, CPU time", "s")
    lines += _extremes(rows, "memory_share", "peak memory over (6 x float model + 1 GB)", "")
    lines += _extremes(rows, "slim_error", "mask - slim, float64, worst node", "")
    lines += _extremes(rows, "slim_output_error_float32", "mask - slim, float32, at the output", "")
    for key, name in (("codes", "compressed"), ("mixed_codes", "randomly pruned, random bits")):
        shares = [{"model": r["model"], "share": r[key]["share"]} for r in rows if key in r]
        lines += _extremes(shares, "share", f"codes of static and gated graph that differ ({name})", "")
    conditioned = [r["model"] for r in rows if r.get("badly_conditioned")]
    if conditioned:
        lines.append(f"Over 1e-5 in float32 by conditioning: {', '.join(conditioned)}.")
    limits = (("mac_reduction", 0.3, "MACs gone under 30 %"), ("prunable_share", 0.95, "prunable under 95 %"))
    for key, least, name in limits:
        short = [f"{r['model']} ({100 * r[key]:.1f} %)" for r in rows if r.get(key, 1) < least]
        if short:
            lines.append(f"{name}: {', '.join(short)}.")
    unknown = Counter(operator for r in rows for operator in r.get("unknown_operators", ()))
    if unknown:
        lines.append(f"Operators without a rule: {', '.join(f'{o} ({n} models)' for o, n in unknown.items())}.")
    lines += [f"Left out: {r['model']} ({r['family']}): {r['outcome']}" for r in rows if r["outcome"] != "ok"]
    return "\n".join(f"- {line}" for line in lines)


def _family_line(family: str, rows: Sequence[Row]) -> list[str]:
    groups = [r["groups"] for r in rows if "groups" in r]
    return [
        family,
        str(len(rows)),
        str(sum(r["outcome"] == "ok" for r in rows)),
        f"{min(groups)} to {max(groups)}" if groups else "",
        *(
            f"{100 * min(values):.1f} %" if (values := [r[key] for r in rows if key in r]) else ""
            for key in ("mac_reduction", "prunable_share")
        ),
    ]


def _extremes(rows: Sequence[Row], key: str, name: str, unit: str) -> list[str]:
    found = [(r[key], r["model"]) for r in rows if key in r]
    if not found:
        return []
    most, where = max(found)
    return [
        f"{name}: median {_number(statistics.median(v for v, _ in found))} {unit}".rstrip()
        + f", most {_number(most)} {unit}".rstrip()
        + f" ({where})."
    ]


def _number(value: float) -> str:
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _percent(row: Row, key: str) -> str:
    return f"{100 * row[key]:.1f} %" if key in row else ""


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}" if value else "0"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *cells])
