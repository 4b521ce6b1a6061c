"""A report as text: what failed first, then totals, layers, groups and pins, in aligned columns.

In: a report's data. Out: lines of about 80 characters where names are short, the same for the same report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from sbs_fx.report.data import ReportData, Warned

if TYPE_CHECKING:
    from rich.table import Table


_SHOWN_SIDES = 4


def render(report: ReportData) -> str:
    """The whole report."""
    return "\n\n".join("\n".join(section) for section in _sections(report) if section) + "\n"


def _sections(report: ReportData) -> Iterator[list[str]]:
    yield [
        f"!! operator without a rule: {operator} ({len(nodes)} times, at {', '.join(nodes[:3])}"
        f"{', ...' if len(nodes) > 3 else ''}): nothing that it touches can be pruned"
        for operator, nodes in report.unknown_operators.items()
    ]
    yield [f"note: {note}" for note in report.notes]
    yield list(warned(report))
    yield totals(report)
    yield [f"{100 * report.prunable_share:.1f} % of the MACs of convolutions and linears have a prunable side"]
    if report.layers:
        yield [
            "Layers by BOPs",
            *columns(
                ["layer", "MACs", "BOPs", "share", "w/a bits", "channels"],
                [
                    [
                        row.name,
                        _short(row.macs),
                        _short(row.bops),
                        f"{100 * row.bops / max(1, report.cost.bops):.1f} %",
                        f"{row.weight_bits:g}/{row.activation_bits:g}",
                        "" if row.channels is None else f"{row.channels}/{row.channels_before}",
                    ]
                    for row in report.layers
                ],
                left=1,
            ),
        ]
    if report.groups:
        yield [
            f"Channel groups ({len(report.groups)})",
            *columns(
                ["group", "kept", "of", "places", ""],
                [
                    [row.name, str(row.kept), str(row.size), str(row.members), "" if row.primary else "minor factor"]
                    for row in report.groups
                ],
                left=1,
            ),
        ]
    if report.pins:
        yield [
            "Sides of layers that keep all their channels",
            *columns(
                ["cause", "channels", "where"],
                [[row.cause, str(row.channels), _listed(row.sides)] for row in report.pins],
                left=1,
            ),
        ]


def warned(report: ReportData) -> Iterator[str]:
    """A line a rule: its first warning, and how many more there are."""
    rules: dict[str, list[Warned]] = {}
    for warning in report.warnings:
        rules.setdefault(warning.rule, []).append(warning)
    for rule, found in rules.items():
        more = f" ({len(found) - 1} more in report.json)" if len(found) > 1 else ""
        yield f"warning: {rule}: {found[0].where}: {found[0].text}{more}"


def totals(report: ReportData) -> list[str]:
    """The closing table: each measure before and after, and how many times less it is."""
    rows = report.totals()
    if all(after is None for _, _, after in rows):
        return columns(["", "float model"], [[name, amount(before)] for name, before, _ in rows], left=1)
    return columns(
        ["", "before", "after", "ratio"],
        [
            [name, amount(before), "" if after is None else amount(after), ratio(name, before, after)]
            for name, before, after in rows
        ],
        left=1,
    )


def closing_table(report: ReportData) -> Table:
    """The same table for a terminal."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right")
    for name, before, after in report.totals():
        table.add_row(name, amount(before), "" if after is None else amount(after), ratio(name, before, after))
    return table


def html_table(report: ReportData) -> str:
    """The same table for a notebook."""
    rows = [
        f"<tr><th>{escape(name)}</th><td>{amount(before)}</td>"
        f"<td>{'' if after is None else amount(after)}</td><td>{ratio(name, before, after)}</td></tr>"
        for name, before, after in report.totals()
    ]
    head = "<tr><th></th><th>before</th><th>after</th><th>ratio</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def amount(value: float) -> str:
    """Whole numbers with separators, others (percentages) with two digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def ratio(name: str, before: float, after: float | None) -> str:
    """How many times smaller; of accuracy, how many points more."""
    if after is None:
        return ""
    if name.startswith("accuracy"):
        return f"{after - before:+.2f}"
    return f"{before / after:.1f} x" if after else ""


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Aligned lines; the first `left` columns and the last one, if it is text, to the left, the others to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    ragged = any(not cell[:1].isdigit() for cell in (row[-1] for row in rows) if cell) and len(header) > 2
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if i < left or (ragged and i == len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _short(value: float) -> str:
    """With a unit of thousands, to three digits or more."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.{2 if value < 10 * unit else 1}f}{name}"
    return f"{value:g}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_SIDES
    return ", ".join(names[:_SHOWN_SIDES]) + (f" and {more} more" if more > 0 else "")
