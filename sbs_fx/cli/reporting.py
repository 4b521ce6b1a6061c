"""The command `report`: what an earlier run found, as text, as JSON, as a page, as a model card; or two against each
other.

In: the directory of an earlier run, or of two. Out: text on stdout; files where options name them. Holds: nothing is
computed again, and what the directories hold stays as it is.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from sbs_fx.cli.options import Json
from sbs_fx.cli.progress import METRICS, say

if TYPE_CHECKING:
    from sbs_fx.report import Report

_PAGE = "report.html"


def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="the --out of an earlier run")],
    against: Annotated[str | None, typer.Argument(metavar="[DIR]", help="another one, to compare it with")] = None,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="write the report as one page")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="a model card, README.md of a hub, in place of the text")
    ] = False,
    node_data: Annotated[
        str | None,
        typer.Option("--node-data", metavar="FILE.json", help="node data of Model Explorer: FILE.bits.json and so on"),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FILE", help="where the card goes")] = None,
    json: Json = False,
) -> None:
    """Show the report of an earlier run, or the difference between two."""
    from sbs_fx.plan import write_atomic

    if against is not None and (card or json or node_data):
        raise typer.BadParameter(
            "--card, --json and --node-data are of one directory; of two there are the text and --html"
        )
    if out is not None and not card:
        raise typer.BadParameter(f"--out {out}: that is where a card goes; expected --card as well, or --html FILE")
    saved = _load(directory)
    if node_data is not None:
        from sbs_fx.report.node_data import node_data as values

        stem = node_data.removesuffix(".json")
        for name, text in values(saved).items():
            write_atomic(f"{stem}.{name}.json", text.encode())
    if html is not None:
        write_atomic(html, _page(saved, directory, against).encode())
    if against is not None:
        typer.echo("\n".join(_differences(saved, _load(against))))
    elif card:
        _card(saved, directory, out)
    else:
        _show(saved, directory, json)
    page = html or os.path.join(directory, _PAGE)
    if not json and not card and (html is not None or (against is None and os.path.exists(page))):
        say(f"page: {page}")


def _load(directory: str) -> Report:
    from sbs_fx.plan import Policy
    from sbs_fx.plan.files import read_as
    from sbs_fx.report import Report
    from sbs_fx.saved import POLICY, REPORT, check_one_result

    report = read_as(os.path.join(directory, REPORT), "the --out directory of `sbs-fx compress`", Report.from_json)
    policy = os.path.join(directory, POLICY)
    if os.path.exists(policy):
        check_one_result(directory, Policy.load(policy), {REPORT: report.policy})
    return report


def _show(saved: Report, directory: str, json: bool) -> None:
    typer.echo(saved.to_json() if json else str(saved), nl=json)
    metrics = os.path.join(directory, METRICS)
    if not json and os.path.exists(metrics):
        from sbs_fx.report.curves import training_lines
        from sbs_fx.report.monitor import read_metrics

        typer.echo("\n".join(["Training", *training_lines(read_metrics(metrics))]))


def _page(saved: Report, directory: str, against: str | None) -> str:
    from dataclasses import replace

    from sbs_fx.report.page import Extras, page

    extras = Extras.of(directory)
    if against is not None:
        names = [os.path.normpath(path) for path in (directory, against)]
        short = [os.path.basename(name) for name in names]
        first, second = names if short[0] == short[1] else short
        extras = replace(extras, against=_load(against), labels=(first, second))
    return page(saved, extras)


def _card(saved: Report, directory: str, out: str | None) -> None:
    from sbs_fx.plan import write_atomic
    from sbs_fx.report.card import card
    from sbs_fx.report.page import Extras

    text = card(saved, Extras.of(directory).run)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(out, text.encode())


def _differences(first: Report, second: Report) -> list[str]:
    """Totals of both, and how many times less the second's are."""
    from sbs_fx.report.text import amount, columns, ratio

    others = {name: before if after is None else after for name, before, after in second.totals()}
    rows = []
    for name, before, after in first.totals():
        value = before if after is None else after
        if name in others:
            rows.append([name, amount(value), amount(others[name]), ratio(name, value, others[name])])
    return columns(["", "first", "second", "ratio"], rows, left=1)
