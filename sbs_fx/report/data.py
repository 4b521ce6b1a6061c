"""What a report holds: frozen rows and totals, as they are written as JSON."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from sbs_fx.plan import Cost


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerRow(_Row):
    """One layer. `channels` and `channels_before` count output channels; None where it has no weight."""

    name: str
    kind: str
    macs: int
    bops: int
    weight_bits: float
    activation_bits: float
    params: int
    channels: int | None
    channels_before: int | None


class GroupRow(_Row):
    """One channel group: `kept` of `size` channels, in `members` places of parameters and buffers."""

    name: str
    size: int
    kept: int
    members: int
    primary: bool


class PinRow(_Row):
    """Why layers keep all channels of a side: `cause`, and `sides`, each as "layer: in" or "layer: out"."""

    cause: str
    channels: int
    sides: tuple[str, ...]


class ReportData(_Row):
    """Everything worth knowing about one model under one plan.

    Attributes:
        method: what found the plan; None: a float model that was looked at, nothing more.
        cost: with the float model's as `cost.reference`, if there is a plan.
        layers: most BOPs first. groups: largest first. pins: most channels first.
        unknown_operators: operator without a rule -> the nodes; whatever they touch could not be pruned.
        prunable_share: of the MACs of convolutions and linears, those with a side that can be pruned.
        accuracy: top-1 in percent (before, after), if it was measured; (before,) of a float model.
        notes: what the method has to say about how it went.
    """

    method: str | None
    cost: Cost
    layers: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    pins: tuple[PinRow, ...]
    unknown_operators: dict[str, tuple[str, ...]]
    prunable_share: float
    accuracy: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()

    def totals(self) -> list[tuple[str, float, float | None]]:
        """(measure, before, after) of BOPs, MACs, parameters, stored bytes and, if measured, milliseconds and accuracy
        in percent; `after` is None without a plan."""
        planned = self.cost.reference is not None
        pairs = zip(_measures(self.cost.reference or self.cost), _measures(self.cost), strict=True)
        rows: list[tuple[str, float, float | None]] = [
            (name, before, after if planned else None) for (name, before), (_, after) in pairs
        ]
        if self.accuracy:
            rows.append(("accuracy %", self.accuracy[0], self.accuracy[1] if len(self.accuracy) > 1 else None))
        return rows


def _measures(cost: Cost) -> list[tuple[str, float]]:
    timed = [("latency ms", 1e3 * cost.seconds)] if cost.seconds else []
    return [
        ("BOPs", cost.bops),
        ("MACs", cost.macs),
        ("parameters", cost.params),
        ("stored bytes", math.ceil(cost.stored_bits / 8)),
        *timed,
    ]
