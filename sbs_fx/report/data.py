"""What a report holds: frozen rows and totals, as they are written as JSON."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sbs_fx.plan import Cost


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerRow(_Row):
    """One layer: its `node` in the graph, its cost, and before, the float model's. `channels` and `channels_before`
    count output channels; None where it has no weight. `weight_sqnr`: signal to quantisation noise of the weight, dB;
    None where it was not measured or has no noise."""

    name: str
    kind: str
    macs: int
    bops: int
    weight_bits: float
    activation_bits: float
    params: int
    channels: int | None
    channels_before: int | None
    node: str = ""
    stored_bits: int = 0
    seconds: float = 0.0
    macs_before: int = 0
    bops_before: int = 0
    weight_sqnr: float | None = None


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


class StepRow(_Row):
    """One node of the float graph, in the order in which it runs.

    Attributes:
        module: path of the sub-module that calls it. source: file and line of that call, "" if they are not known.
        reads: places of the steps whose results it takes. shape: of its result, with 0 for what may change.
        groups: channel groups in its result. pinned: why other coordinates of its result cannot go.
    """

    name: str
    operator: str
    module: str = ""
    source: str = ""
    reads: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()


class TensorRow(_Row):
    """A quantised activation tensor as it was on a few inputs, fake-quantised.

    Attributes:
        reader: the layer that reads it. low, high: ends of what it held. step: of its grid.
        sqnr: signal to quantisation noise, dB; None without noise or signal. clipped: the share beyond the grid's ends.
        spread: the largest channel over the smallest that is not zero, by largest magnitudes. dead: channels of zeros.
    """

    name: str
    reader: str
    bits: int
    low: float
    high: float
    step: float
    sqnr: float | None
    clipped: float
    spread: float
    dead: int
    channels: int


class StageRow(_Row):
    """The network after a stage, on a few inputs: mean divergence of its outputs from the float ones in the measure of
    the task (nats for classes), and of classes the share of equal predictions."""

    name: str
    divergence: float
    same: float | None
    seconds: float = 0.0


class Warned(_Row):
    """What a person may want to look at: the rule, the place, and what to do."""

    rule: str
    where: str
    text: str


class LimitRow(_Row):
    """A budget's limit and what was reached, as shares of the float model."""

    measure: str
    limit: float
    reached: float


class PlanRow(_Row):
    """A plan that a search made: its loss as estimated by the table of sensitivities, and as judged (None: over the
    budget, so nobody asked), in nats an image; what it costs of what is limited; and why it was not taken, "" of the
    one that was."""

    name: str
    estimated: float
    judged: float | None
    shares: dict[str, float]
    reason: str = ""


class Tradeoff(_Row):
    """What loss could be had for other budgets, by the table of sensitivities.

    Attributes:
        plans: those that the search made. whole: measure -> cost of the float model.
        terms: measure -> products that add up to its cost, each a coefficient and the places of its factors: of a row
            of the table, what is chosen in it; beyond all rows, by as much, whether that is below 32 bits (1) or not
            (0).
    """

    plans: tuple[PlanRow, ...] = ()
    whole: dict[str, int | float] = {}
    terms: dict[str, tuple[tuple[int | float, ...], ...]] = {}


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
        model: its class or name. weights, data, command: where they came from, where somebody said.
        policy: checksum of the policy, by which files of one result are known.
        limits: of the budget. steps: the float graph. tensors, stages: measured on a few inputs.
        tradeoff: the search's other plans, and what other budgets would give, where losses were measured.
        warnings: what to look at. seconds: by stage. versions: of what it was made with.
    """

    format: Literal[2] = 2
    method: str | None
    cost: Cost
    layers: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    pins: tuple[PinRow, ...]
    unknown_operators: dict[str, tuple[str, ...]]
    prunable_share: float
    accuracy: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()
    model: str = ""
    weights: str = ""
    data: str = ""
    command: str = ""
    policy: str = ""
    limits: tuple[LimitRow, ...] = ()
    steps: tuple[StepRow, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    stages: tuple[StageRow, ...] = ()
    tradeoff: Tradeoff = Tradeoff()
    warnings: tuple[Warned, ...] = ()
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}

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
