"""A report as node data of Model Explorer, which colours the nodes of an exported graph by them.

In: a report. Out: JSON by the name of the value, in the schema of `model_explorer.node_data_builder.GraphNodeData`:
values by node, and a gradient. Holds: nodes are named as in the float graph, as `torch.export` names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from sbs_fx.report.data import ReportData

_GRADIENT: Final = ({"stop": 0, "bgColor": "#d5e6ec"}, {"stop": 1, "bgColor": "#0a4566"})


def node_data(report: ReportData) -> dict[str, str]:
    """JSON of the bits of weights ("bits"), of the share of output channels that stay ("kept") and of the signal to
    quantisation noise of each tensor in dB ("sqnr"); without those that are known of no node. A file holds one."""
    layers = [row for row in report.layers if row.node]
    values: dict[str, dict[str, float]] = {
        "bits": {row.node: row.weight_bits for row in layers},
        "kept": {
            row.node: row.channels / row.channels_before for row in layers if row.channels and row.channels_before
        },
        "sqnr": {row.name: row.sqnr for row in report.tensors if row.sqnr is not None},
    }
    return {name: _json(results) for name, results in values.items() if results}


def _json(values: Mapping[str, float]) -> str:
    results = {node: {"value": value} for node, value in values.items()}
    return json.dumps({"results": results, "gradient": _GRADIENT}, indent=1) + "\n"
