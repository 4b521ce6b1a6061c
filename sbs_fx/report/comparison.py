"""`Comparison`: points of accuracy over cost, as data, as a table and as a picture.

In: one `Point` a method and budget. Out: text, JSON, and a plot where matplotlib is installed.
"""

from __future__ import annotations

import os
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from sbs_fx.plan import write_atomic
from sbs_fx.report.page import comparison_page
from sbs_fx.report.text import columns


class Point(BaseModel):
    """What a method made of a model under a budget.

    Attributes:
        budget: share of the float model by measure. amounts: limits that were given in a measure's own unit.
        outcome: "ok", or the error; then everything below is None.
        accuracy, tuned_accuracy: the metric in percent of the static graph, before and after fine-tuning (None: none).
        seconds: until the policy was there, a search's training included.
        bops: bit operations. bops_ratio, size_ratio: how many times less than float. macs_share: of MACs left.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    budget: dict[str, float]
    amounts: dict[str, float] = {}
    outcome: str = "ok"
    accuracy: float | None = None
    tuned_accuracy: float | None = None
    seconds: float | None = None
    bops: int | None = None
    bops_ratio: float | None = None
    size_ratio: float | None = None
    macs_share: float | None = None

    @property
    def limits(self) -> str:
        """Shares in percent, amounts as they are."""
        shares = [f"{measure} {100 * share:g} %" for measure, share in self.budget.items()]
        return ", ".join([*shares, *(f"{measure} {amount:g}" for measure, amount in self.amounts.items())])

    @property
    def best_accuracy(self) -> float | None:
        """After fine-tuning if there was any."""
        return self.accuracy if self.tuned_accuracy is None else self.tuned_accuracy


class Comparison(BaseModel):
    """Points of one model.

    Attributes:
        float_accuracy: the metric in percent. metric: its name.
        held_out: whether accuracies are of images that methods did not see.
        epochs: of fine-tuning behind `tuned_accuracy`.
        part: what all figures are of, where it is not the whole model; else "".
    """

    model_config = ConfigDict(frozen=True)

    float_accuracy: float
    metric: str = "top-1"
    held_out: bool
    epochs: int
    part: str = ""
    points: tuple[Point, ...] = ()

    @property
    def pareto(self) -> tuple[Point, ...]:
        """Points that no other beats in accuracy at as few bit operations, cheapest first."""
        sound = [p for p in self.points if p.outcome == "ok"]
        sound.sort(key=lambda p: (p.bops, -(p.best_accuracy or 0.0)))
        front: list[Point] = []
        for point in sound:
            if not front or (point.best_accuracy or 0.0) > (front[-1].best_accuracy or 0.0):
                front.append(point)
        return tuple(front)

    def rows(self) -> dict[str, Any]:
        """Everything as plain values, each point with whether it is on the front, and why not."""
        front = self.pareto
        points = [
            {**p.model_dump(), "limits": p.limits, "best": p.best_accuracy, "front": p in front, "reason": self._why(p)}
            for p in self.points
        ]
        return {**self.model_dump(exclude={"points"}), "points": points}

    def _why(self, point: Point) -> str:
        """Why a point is not on the front: its error, or the first that beats it."""
        if point.outcome != "ok":
            return point.outcome
        if point in (front := self.pareto):
            return ""
        better = next(p for p in reversed(front) if (p.bops or 0) <= (point.bops or 0))
        theirs, own = (
            f"{p.best_accuracy or 0:.2f} % at {p.bops_ratio or 0:.1f} times fewer BOPs" for p in (better, point)
        )
        return f"{better.method} at {better.limits} has {theirs}, this {own}"

    def __str__(self) -> str:
        best = self.pareto
        rows = [["float", "", f"{self.float_accuracy:.2f} %", "", "1x", "1x", "100 %", "", ""]]
        rows += [
            [
                p.method,
                p.limits,
                _number(p.accuracy, ".2f", " %"),
                _number(p.tuned_accuracy, ".2f", " %"),
                _number(p.bops_ratio, ".1f", "x"),
                _number(p.size_ratio, ".1f", "x"),
                _number(None if p.macs_share is None else 100 * p.macs_share, ".0f", " %"),
                _number(p.seconds, ".1f", " s"),
                "*" if p in best else "",
            ]
            for p in self.points
        ]
        heads = [
            "method",
            "budget",
            self.metric,
            f"after {self.epochs} epochs",
            "BOPs",
            "size",
            "MACs left",
            "policy after",
        ]
        table = [row if self.epochs else [*row[:3], *row[4:]] for row in ([*heads, ""], *rows)]
        lines = columns(table[0], table[1:], left=2)
        lines[:0] = [self.part] if self.part else []
        lines.append("* no other point is as accurate at as few BOPs")
        if not self.held_out:
            lines.append("accuracy is of the images that methods were given; nothing was held out")
        lines += [f"{p.method} at {p.limits}: {p.outcome}" for p in self.points if p.outcome != "ok"]
        return "\n".join(lines)

    def save(self, directory: str) -> None:
        """Write `comparison.txt`, `comparison.json`, `report.html` and, where matplotlib is installed, `pareto.png`."""
        write_atomic(os.path.join(directory, "comparison.txt"), f"{self}\n".encode())
        write_atomic(os.path.join(directory, "comparison.json"), (self.model_dump_json(indent=1) + "\n").encode())
        write_atomic(os.path.join(directory, "report.html"), comparison_page(self.rows()).encode())
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return
        self.plot(os.path.join(directory, "pareto.png"))

    @classmethod
    def load(cls, directory: str) -> Self:
        """What `save` wrote."""
        with open(os.path.join(directory, "comparison.json"), encoding="utf-8") as file:
            return cls.model_validate_json(file.read())

    def plot(self, path: str) -> None:
        """Accuracy over bit operations, one line a method, the Pareto front behind them; needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        front = self.pareto
        costs, heights = [p.bops or 0 for p in front], [p.best_accuracy or 0.0 for p in front]
        axes.step(costs, heights, where="post", color="0.8", lw=6, zorder=0)
        for method in dict.fromkeys(p.method for p in self.points):
            points = sorted(
                ((p.bops, p.best_accuracy) for p in self.points if p.method == method and p.outcome == "ok"),
                key=lambda pair: pair[0] or 0,
            )
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=method)
        axes.axhline(self.float_accuracy, color="black", lw=1, ls=":", label="float")
        axes.set(xscale="log", xlabel="bit operations of one image", ylabel=f"{self.metric}, %")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def _number(value: float | None, form: str, unit: str) -> str:
    return "" if value is None else f"{value:{form}}{unit}"
