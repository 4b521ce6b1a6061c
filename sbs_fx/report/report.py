"""`Report`: layers, channel groups, pins and totals of one model, before or after compression.

In: channel groups, their cost model, maybe a policy. Out: frozen data that is written as JSON or as a page; `str` of it
is the text of `sbs_fx.report.text`. Invariant: the layers of a report add up to its cost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from pydantic import ValidationError

from sbs_fx.passes import ChannelGroups, CostModel
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.cost.layers import LayerExpression
from sbs_fx.plan import Cost, Policy, current_versions, write_atomic
from sbs_fx.plan.errors import FileError
from sbs_fx.plan.files import checksum_of, parse_object
from sbs_fx.report.data import GroupRow, LayerRow, LimitRow, PinRow, ReportData, StageRow, TensorRow, Tradeoff
from sbs_fx.report.lint import warnings_of
from sbs_fx.report.page import Extras, page
from sbs_fx.report.steps import steps_of
from sbs_fx.report.text import render

_NAMED_ENDS = ("model input", "model output")


class Report(ReportData):
    """A report with where it comes from and how it is written; `str` is the text of it."""

    @classmethod
    def of(
        cls,
        groups: ChannelGroups,
        cost_model: CostModel,
        policy: Policy | None,
        cost: Cost,
        notes: tuple[str, ...] = (),
    ) -> Self:
        """The report on a plan, or on the float model where `policy` is None."""
        kept = {} if policy is None else {name: len(indices) for name, indices in policy.kept.items()}
        unknown: dict[str, list[str]] = {}
        for node, operator in groups.inference.unknown.items():
            unknown.setdefault(operator, []).append(node)
        return cls(
            method=None if policy is None else policy.method,
            cost=cost,
            layers=_layers(groups, cost_model, kept, cost),
            groups=tuple(sorted(_groups(groups, kept), key=lambda row: -row.size)),
            pins=_pins(cost_model),
            unknown_operators={operator: tuple(nodes) for operator, nodes in unknown.items()},
            prunable_share=cost_model.prunable_share(),
            notes=notes,
            steps=steps_of(groups),
            versions=current_versions(),
        )

    def with_accuracy(self, *accuracy: float) -> Self:
        """The same report with the metric in percent: (before, after), or that of the float model alone."""
        return self.model_copy(update={"accuracy": accuracy})

    def with_measures(
        self,
        tensors: Sequence[TensorRow],
        stages: Sequence[StageRow],
        seconds: Mapping[str, float],
        model: str,
        noise: Mapping[str, float],
    ) -> Self:
        """The same report with what was measured of values (`noise`: of weights by the layer's node, dB), and the
        warnings that follow."""
        fields = {"tensors": tuple(tensors), "stages": tuple(stages), "seconds": dict(seconds), "model": model}
        layers = tuple(row.model_copy(update={"weight_sqnr": noise.get(row.node)}) for row in self.layers)
        changed = self.model_copy(update={**fields, "layers": layers})
        return changed.model_copy(update={"warnings": warnings_of(changed)})

    def under(self, limits: Mapping[str, float]) -> Self:
        """The same report with the budget's limits, shares of the float model."""
        whole = (self.cost.reference or self.cost).by_measure
        rows = [
            LimitRow(measure=name, limit=limit, reached=self.cost.by_measure[name] / whole[name] if whole[name] else 0)
            for name, limit in limits.items()
        ]
        return self.model_copy(update={"limits": tuple(rows)})

    def with_tradeoff(self, tradeoff: Tradeoff) -> Self:
        """The same report with the search's other plans."""
        return self.model_copy(update={"tradeoff": tradeoff})

    def to_json(self) -> str:
        """The report as JSON, with a checksum of its fields."""
        fields = json.loads(self.model_dump_json())
        return json.dumps({**fields, "checksum": checksum_of(fields)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            FileError: the text is no whole report, or its checksum does not fit (altered).
        """
        fields = parse_object(text, "the report")
        if fields.pop("checksum", None) != checksum_of(fields):
            raise FileError("the report was altered: its checksum does not fit; restore the file, or compress again")
        try:
            return cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            raise FileError(
                f"this is no whole report ({error.error_count()} problems, the first: "
                f"{error.errors()[0]['msg']}); compress the model again"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report, all of it or nothing: JSON if the name ends in ".json", a page if in ".html", else text.

        A page has what lies beside it too: see `Extras`. Raises FileError.
        """
        name = os.fspath(path)
        if name.endswith(".html"):
            text = page(self, Extras.of(os.path.dirname(name)))
        else:
            text = self.to_json() if name.endswith(".json") else str(self)
        write_atomic(path, f"{text.rstrip()}\n".encode())

    def __str__(self) -> str:
        return render(self)


def _layers(groups: ChannelGroups, cost_model: CostModel, kept: Mapping[str, int], cost: Cost) -> tuple[LayerRow, ...]:
    sizes = {groups[name].axis: count for name, count in kept.items()}

    def size(dim: Dim, of: Mapping[Axis, int]) -> int:
        return d.evaluate(dim, lambda axis: of.get(axis, axis.size))

    rows = []
    for expression, layer, before in zip(cost_model.layers, cost.layers, cost_model.reference.layers, strict=True):
        outputs = next((dims[i] for dims, i in expression.weights.values()), None)
        rows.append(
            LayerRow(
                name=layer.name,
                kind=layer.kind,
                macs=layer.macs,
                bops=layer.bops,
                weight_bits=layer.weight_bits,
                activation_bits=layer.activation_bits,
                params=layer.params,
                channels=None if outputs is None else size(outputs, sizes),
                channels_before=None if outputs is None else size(outputs, {}),
                node=expression.node,
                stored_bits=layer.stored_bits,
                seconds=layer.seconds,
                macs_before=before.macs,
                bops_before=before.bops,
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.bops))


def _groups(groups: ChannelGroups, kept: Mapping[str, int]) -> Iterator[GroupRow]:
    for g in groups.values():
        count = kept.get(g.name, g.size)
        yield GroupRow(name=g.name, size=g.size, kept=count, members=len(g.members), primary=g.primary)


def _pins(cost_model: CostModel) -> tuple[PinRow, ...]:
    """Sides of layers that keep all their channels, by what keeps them.

    Kernel positions, tokens and the like are pinned in every model and are no channels, so only the input and output
    dimensions of weights count, and only if nothing of them can go.
    """
    sides_of: dict[str, list[tuple[str, int]]] = {}
    for layer in cost_model.layers:
        for dims, outputs in layer.weights.values():
            for side, dim in _sides(layer, dims, outputs):
                if not d.axes(dim):
                    for cause in dict.fromkeys(_cause(why) for why in d.reasons(dim)):
                        sides_of.setdefault(cause, []).append((f"{layer.name}: {side}", d.resolve(dim).size))
    rows = [
        PinRow(cause=cause, channels=sum(n for _, n in sides), sides=tuple(name for name, _ in sides))
        for cause, sides in sides_of.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.channels))


def _sides(layer: LayerExpression, dims: Sequence[Dim], outputs: int) -> Iterator[tuple[str, Dim]]:
    if len(dims) < 2:
        return
    outputs %= len(dims)
    yield "out", dims[outputs]
    # reason: of a convolution's weight the first two dimensions are channels, the others kernel positions
    inputs = [1 - outputs] if layer.kind == "conv" else [i for i in range(len(dims)) if i != outputs]
    for i in inputs:
        yield "in", dims[i]


def _cause(why: str) -> str:
    """A pin's cause without the node it was met at: "index_3 (index.Tensor): indexed" -> "index.Tensor: indexed"."""
    if why in _NAMED_ENDS or ": " not in why:
        return why
    place, _, reason = why.partition(": ")
    return f"{place.partition('(')[2].removesuffix(')') or place}: {reason}"
