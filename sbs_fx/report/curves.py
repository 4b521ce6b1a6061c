"""A training run to be read: a panel while it runs, tables when it has finished.

In: values by name, as `sbs_fx.report.monitor` has them. Out: a rich panel, or lines of text, the same for the same
values. Holds: nothing here knows where the values come from; what is unknown shows as "-" or is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sbs_fx.plan import MEASURES
from sbs_fx.report.text import columns

_BAR_WIDTH = 24  # characters of a histogram bar that stands for all weights, or all activations


def percent(value: float | None) -> str:
    """Percent with two digits, "-" if unknown."""
    return "-" if value is None else f"{value:.2f} %"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def panel(title: str, facts: Mapping[str, str], done: float | None, measures: Mapping[str, Any], block: str) -> Panel:
    """What is known of a run now.

    Args:
        facts: name -> text, shown as they come; the first two beside the bar, the others three a line.
        done: share of the steps done, None if unknown: then there is no bar.
        measures: as of `sbs_fx.training.Progress`. block: the character that bars of the histogram are made of.
    """
    texts = [_fact(name.replace("_", " "), value) for name, value in facts.items()]
    head, known = Table.grid(padding=(0, 3, 0, 0)), Table.grid(padding=(0, 3, 0, 0))
    bar: list[RenderableType] = [ProgressBar(1.0, done or 0.0, width=32), f"{100 * (done or 0.0):.0f} %"]
    head.add_row(*texts[:2], *([] if done is None else bar))
    known.add_row(*texts[2:5])
    known.add_row(*texts[5:])
    found: list[RenderableType] = [_cost(name, measures) for name in MEASURES if name in measures]
    if "pruned" in measures:
        found.append(_fact("pruned", percent(100 * measures["pruned"])).append(" of the channels"))
    if bits := {kind: measures[f"{kind}_bits"] for kind in ("weight", "activation") if measures.get(f"{kind}_bits")}:
        histogram = Table("bits", *(f"{kind}s" for kind in bits), box=None, padding=(0, 3, 0, 0), header_style="dim")
        for width in sorted(set().union(*bits.values())):
            histogram.add_row(f"{width:4}", *(_bar(counts, width, block) for counts in bits.values()))
        found += ["", histogram]
    return Panel(Group(head, known, *([""] if found else []), *found), title=title, title_align="left")


def _fact(name: str, value: str, style: str = "bold") -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, style))


def _cost(name: str, measures: Mapping[str, Any]) -> Text:
    """Such as "bops 1.62 % of float, budget 1.50 %, multiplier 0.12"; green within the budget, yellow above."""
    limit, multiplier = (measures.get(key, {}).get(name) for key in ("budget", "multiplier"))
    style = "bold" if limit is None else "bold green" if measures[name] <= limit else "bold yellow"
    text = _fact(name, percent(100 * measures[name]), style).append(" of float")
    if limit is not None:
        text.append(f", budget {percent(100 * limit)}")
    return text if multiplier is None else text.append(f", multiplier {multiplier:.3g}")


def _bar(counts: Mapping[int, int], width: int, block: str) -> str:
    count = counts.get(width, 0)
    return f"{block * math.ceil(_BAR_WIDTH * count / sum(counts.values()))} {count}" if count else ""


def training_lines(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A finished run as tables: what each stage reached, and the way of a search's cost to its budget.

    Losses are averages over the first and the last tenth of a stage's steps, the training accuracy is that of its last
    epoch. Seconds count from the end of the stage before. Costs are shares of the float model.

    Args:
        metrics: from `sbs_fx.report.monitor.read_metrics`; of none, there are no lines.
    """
    stages, paths, begin = [], [], 0.0
    for stage, group in groupby(metrics, key=lambda row: str(row["stage"])):
        rows = list(group)
        last, tenth = rows[-1], max(1, len(rows) // 10)
        losses = [sum(row["loss"] for row in part) / tenth for part in (rows[:tenth], rows[-tenth:])]
        judged = [row["validation"] for row in rows if row["validation"] is not None]
        best, latest = (max(judged), judged[-1]) if judged else (None, None)
        shown = [percent(value) for value in (_accuracy(rows), best, latest)]
        counts = [f"{last['epoch'] + 1}/{last['epochs']}", f"{last['step']:,}"]
        stages.append([stage, *counts, *(f"{x:.4f}" for x in losses), *shown, f"{last['seconds'] - begin:,.0f}"])
        begin = last["seconds"]
        for name in MEASURES:
            if measured := [row["measures"] for row in rows if name in row["measures"]]:
                shares = [measured[(len(measured) - 1) * quarter // 4][name] for quarter in range(5)]
                limit = measured[-1].get("budget", {}).get(name)
                cells = [*(percent(100 * share) for share in shares), "" if limit is None else percent(100 * limit)]
                paths.append([f"{stage} {name}", *cells])
    if not stages:
        return []
    header = ["stage", "epochs", "steps", "first loss", "last loss", "training", "best", "validation", "seconds"]
    lines = columns(header, stages, left=1)
    if paths:
        lines += ["", *columns(["share of float", "first", "25 %", "50 %", "75 %", "last", "budget"], paths, left=1)]
    return lines


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean of the last epoch, by images."""
    pairs = [(row["accuracy"], row["images"] or 1) for row in rows if row["epoch"] == rows[-1]["epoch"]]
    pairs = [pair for pair in pairs if pair[0] is not None]
    return sum(a * n for a, n in pairs) / sum(n for _, n in pairs) if pairs else None
