"""A report as a model card: README.md with the metadata that a hub reads.

In: a report, and what the run was asked for. Out: YAML between two lines of dashes, then Markdown. Holds: each name is
quoted, so that none can end the metadata or a cell; what was not measured is not claimed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sbs_fx.report.data import ReportData
from sbs_fx.report.text import amount, ratio

_TAGS = ("pruning", "quantization", "mixed-precision", "torch.fx")


def card(report: ReportData, run: Mapping[str, Any]) -> str:
    """The card. run: of `run.json`, empty if there is none."""
    name = str(run.get("model") or report.model or "model")
    return "\n".join([*_metadata(report, name), "", *_body(report, run, name)]) + "\n"


def _metadata(report: ReportData, name: str) -> Iterator[str]:
    yield from ("---", "library_name: sbs-fx", "tags:", *(f"- {tag}" for tag in _TAGS))
    if report.accuracy and len(report.accuracy) > 1:
        data = report.data or "unknown"
        yield from ("metrics:", "- accuracy", "model-index:", f"- name: {_quoted(name)}", "  results:")
        yield from ("  - task:", "      type: image-classification", "    dataset:")
        yield from (f"      name: {_quoted(data)}", f"      type: {_quoted(data)}")
        yield from ("    metrics:", "    - type: accuracy", f"      value: {report.accuracy[1]:.2f}")
    yield "---"


def _body(report: ReportData, run: Mapping[str, Any], name: str) -> Iterator[str]:
    how = "looked at" if report.method is None else f"pruned and quantised by method `{_plain(report.method)}`"
    yield from (
        f"# {_plain(name)}, compressed",
        "",
        f"{_plain(name)}, {how} of sbs-fx. The figures are of one example.",
        "",
    )
    yield from ("| | before | after | ratio |", "|---|---:|---:|---:|")
    for measure, before, after in report.totals():
        cells = [measure, amount(before), "" if after is None else amount(after), ratio(measure, before, after)]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for row in report.limits:
        yield f"- Budget: {row.measure} at most {row.limit:.2%} of the float model's; {row.reached:.2%} reached."
    if report.stages:
        last = report.stages[-1]
        same = "" if last.same is None else f", {last.same:.1%} equal predictions"
        yield f"- Against the float model, on a few inputs: divergence {last.divergence:.3g}{same}."
    for label, value in (("Weights", report.weights or run.get("weights")), ("Data", report.data)):
        if value:
            yield f"- {label}: {_plain(value)}."
    if report.versions:
        yield f"- Made with {', '.join(f'{_plain(k)} {_plain(v)}' for k, v in report.versions.items())}."
    yield from (
        "",
        "```python",
        "import torch",
        "import torch.ao.quantization.fx._decomposed  # registers operators",
        "",
    )
    yield from ('model = torch.export.load("model.pt2").module()', "outputs = model(inputs)", "```")


def _quoted(text: str) -> str:
    """A YAML scalar: JSON's strings are YAML's too."""
    return json.dumps(text)


def _plain(text: object) -> str:
    """Words for Markdown: what would be markup is escaped, lines become one."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
