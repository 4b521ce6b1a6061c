"""`Space`: what may be decided, for every searcher alike.

In: settings, constraints, a graph's groups and cost model. Out: choices, each a weight, a tensor or a group with the
bits or kept counts that it may take. Holds: every constraint is obeyed by every combination of choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import Field, field_validator

from sbs_fx.passes import ChannelGroup, ChannelGroups, CostModel
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.importance import Norm, kernel_multiple
from sbs_fx.plan import Plan, Settings
from sbs_fx.plan.bits import BITS, FLOAT_BITS
from sbs_fx.plan.errors import ConstraintError
from sbs_fx.plan.plan import Kind
from sbs_fx.search.constraints import ENDS, Keep, Names, checked_bits

DEFAULT_CANDIDATES = (2, 4, 8)


class SpaceSettings(Settings):
    """What may be decided, and what must stay.

    Attributes:
        candidates: bitwidths that weights and activations may have, some of 2, 3, 4, 5, 6, 8 and 32 (float).
        weight_bits, activation_bits: one for all that no constraint speaks of; None lets the method choose.
        constraints: see `Keep`; the first and last layers stay at 8/8 unless one of them is about their place.
        quantise: False prunes alone: a float graph, nothing rounded anywhere.
        prune: False quantises alone: every channel stays.
        importance: norm that ranks the channels of a group.
        round_to: kept channels are a multiple of this; None: 16, half of that where the group is small ("uniform" under
            budgets of MACs or latency: there too), and under a latency budget what was measured; 1: any number.
        block: channels that are decided together, whatever kernels like; None: as `round_to` says.
        inner_only: prune only channels inside a residual branch; the stream keeps all.
        minor_groups: also prune the smaller factor of product axes (heads, group widths).

    >>> Space(groups, cost, SpaceSettings(weight_bits=4)).most.weight_bits["3"]
    4
    """

    candidates: tuple[int, ...] = DEFAULT_CANDIDATES
    weight_bits: int | None = None
    activation_bits: int | None = None
    constraints: tuple[Keep, ...] = ()
    quantise: bool = True
    prune: bool = True
    importance: Norm = "l2"
    round_to: int | None = Field(default=None, ge=1)
    block: int | None = Field(default=None, ge=1)
    inner_only: bool = False
    minor_groups: bool = False

    @field_validator("candidates")
    @classmethod
    def _ascending(cls, candidates: tuple[int, ...]) -> tuple[int, ...]:
        return checked_bits(candidates)

    @field_validator("weight_bits", "activation_bits")
    @classmethod
    def _known(cls, bits: int | None) -> int | None:
        return bits if bits is None else checked_bits([bits])[0]


@dataclass(frozen=True)
class Choice:
    """One thing to decide: `values` are bits, or kept counts of a group, ascending; of one value nothing is left to
    decide.

    >>> Choice("weight", "3", (2, 4, 8)) in problem.space.choices
    True
    """

    kind: Kind
    name: str
    values: tuple[int, ...]


class Space:
    """The choices of one graph under some settings.

    Attributes:
        choices: of every weight, activation tensor and channel group, in graph order.
        scopes: what each constraint is about, the default one included.

    >>> [choice.name for choice in problem.space.choices if choice.kind == "weight"]
    ['0', '3', '8']
    """

    def __init__(self, groups: ChannelGroups, cost: CostModel, settings: SpaceSettings | None = None) -> None:
        self.groups, self.cost, self.settings = groups, cost, settings or SpaceSettings()
        names = Names(groups, cost)
        asked = tuple(names.scope(constraint) for constraint in self._constraints())
        self.scopes = (names.matched(ENDS), *asked) if self.settings.quantise else asked
        self.choices = (
            *(Choice("weight", name, self._bits("weight", name)) for name in cost.weights),
            *(Choice("activation", name, self._bits("activation", name)) for name in cost.activations),
            *(Choice("channels", name, self._counts(name)) for name in groups),
        )

    def _constraints(self) -> Iterable[Keep]:
        for constraint in self.settings.constraints:
            rounds = {*(constraint.weight_bits or ()), *(constraint.activation_bits or ())} - {FLOAT_BITS}
            if rounds and not self.settings.quantise:
                raise ConstraintError(f"{constraint} asks for {min(rounds)} bits where quantise=False rounds nothing")
            yield constraint

    def _bits(self, kind: Kind, name: str) -> tuple[int, ...]:
        settings = self.settings
        if not settings.quantise:
            return (FLOAT_BITS,)
        asked = settings.weight_bits if kind == "weight" else settings.activation_bits
        bits = settings.candidates if asked is None else (asked,)
        for scope in self.scopes:
            named, kept = (
                (scope.weights, scope.constraint.weight_bits)
                if kind == "weight"
                else (scope.activations, scope.constraint.activation_bits)
            )
            bits = kept if kept is not None and name in named else bits
        return bits

    def _counts(self, name: str) -> tuple[int, ...]:
        group = self.groups[name]
        return self.counts(name, self.multiple(group)) if self.may_be_pruned(name) else (group.size,)

    def of_channels(self) -> Space:
        """The space of channels alone, everything in float."""
        asked = (c.model_copy(update={"weight_bits": None, "activation_bits": None}) for c in self.settings.constraints)
        kept = tuple(c for c in asked if c.prune is not None or c.least is not None)
        settings = self.settings.model_copy(update={"quantise": False, "constraints": kept})
        return Space(self.groups, self.cost, settings)

    # -- what searchers ask --------------------------------------------------------------------------------------------

    @cached_property
    def by_name(self) -> Mapping[tuple[Kind, str], Choice]:
        return {(choice.kind, choice.name): choice for choice in self.choices}

    def values(self, kind: Kind, name: str) -> tuple[int, ...]:
        return self.by_name[kind, name].values

    def may_stay_float(self, kind: Kind, name: str) -> bool:
        """Whether nobody has said which bits an activation may have, so that float is left to one that needs it."""
        settings = self.settings
        said = settings.activation_bits is not None or settings.candidates != DEFAULT_CANDIDATES
        return kind == "activation" and self.values(kind, name) == DEFAULT_CANDIDATES and not said

    def at_most(self, kind: Kind, name: str, bits: int) -> int:
        """The most of the values that is not above `bits`, or the least."""
        values = self.values(kind, name)
        return max((value for value in values if value <= bits), default=values[0])

    def free(self, kind: Kind) -> list[str]:
        """Names of what there is a choice for."""
        return [choice.name for choice in self.choices if choice.kind == kind and len(choice.values) > 1]

    def fixed(self, kind: Kind) -> dict[str, int]:
        """Bits of what there is none for."""
        return {c.name: c.values[0] for c in self.choices if c.kind == kind and len(c.values) == 1}

    def plan(self, weight_bits: int, activation_bits: int, counts: Mapping[str, int] | None = None) -> Plan:
        """The same bits everywhere, or the most below them that the space has, or the least; the first so many channels
        of groups, or all."""
        asked: dict[Kind, int] = {"weight": weight_bits, "activation": activation_bits}
        tables = {
            kind: {c.name: self.at_most(kind, c.name, bits) for c in self.choices if c.kind == kind}
            for kind, bits in asked.items()
        }
        kept = {name: tuple(range((counts or {}).get(name, group.size))) for name, group in self.groups.items()}
        return Plan(kept, tables["weight"], tables["activation"])

    @property
    def most(self) -> Plan:
        """All channels, the most bits of every choice."""
        return self.plan(FLOAT_BITS, FLOAT_BITS)

    @property
    def least(self) -> Plan:
        """The fewest channels and bits."""
        return self.plan(0, 0, {c.name: c.values[0] for c in self.choices if c.kind == "channels"})

    def multiple(self, group: ChannelGroup, *, fast: bool = False) -> int:
        """What kept channels are a multiple of; see `kernel_multiple`."""
        timing = self.cost.timing
        return self.settings.block or kernel_multiple(
            group, self.settings.round_to, None if timing is None else timing.multiple, fast=fast
        )

    def counts(self, name: str, multiple: int) -> tuple[int, ...]:
        """Kept counts of a group, ascending: multiples, and all of it, but no fewer than constraints ask for."""
        size, least = self.groups[name].size, self._asked("least", {name}, 0.0)
        return (*(n for n in range(multiple, size, multiple) if n >= least * size), size)

    def least_share(self, weight: str) -> float:
        """Share of a weight's output channels that constraints keep from going."""
        names = {self.groups.of_axis[a].name for a in d.axes(self.groups.outputs[weight]) if a in self.groups.of_axis}
        allowed = self._asked("prune", names, True) and self.settings.prune
        return self._asked("least", names, 0.0) if allowed else 1.0

    def may_be_pruned(self, name: str) -> bool:
        """Whether channels of a group may go at all."""
        group, allowed = self.groups[name], self._asked("prune", {name}, True) and self.settings.prune
        if not allowed or not (group.primary or self.settings.minor_groups):
            return False
        return not self.settings.inner_only or len(self._makers[name]) == 1

    def _asked(self, field: str, groups: Set[str], default: Any) -> Any:
        """What the last constraint that speaks of it says of any of these groups."""
        asked = [getattr(scope.constraint, field) for scope in self.scopes if groups & scope.groups]
        return next((value for value in reversed(asked) if value is not None), default)

    @cached_property
    def _makers(self) -> Mapping[str, set[str]]:
        """Group -> weights that make its channels. One alone makes those inside a residual branch; those of the stream
        come from several."""
        makers: dict[str, set[str]] = {name: set() for name in self.groups}
        for weight, outputs in self.groups.outputs.items():
            for axis in d.axes(outputs):
                if axis in self.groups.of_axis:
                    makers[self.groups.of_axis[axis].name].add(weight)
        return makers

    def relaxations(self) -> Iterable[tuple[str, SpaceSettings]]:
        """What could be given up, in words, and the settings without it."""
        settings = self.settings
        for scope in self.scopes:
            others = tuple(c for c in settings.constraints if c != scope.constraint)
            if scope.constraint == ENDS:
                bits = settings.candidates
                if not scope.weights and not scope.activations:
                    continue  # reason: a constraint that matches nothing is an error
                others = (Keep(place="ends", weight_bits=bits, activation_bits=bits), *others)
            yield str(scope.constraint), settings.model_copy(update={"constraints": others})
        relaxed: dict[str, tuple[str, Any]] = {
            "quantise": ("quantise=False", True),
            "prune": ("prune=False", True),
            "candidates": (f"candidates={settings.candidates}", tuple(sorted({BITS[0], *settings.candidates}))),
            "weight_bits": (f"weight_bits={settings.weight_bits}", None),
            "activation_bits": (f"activation_bits={settings.activation_bits}", None),
            "inner_only": ("inner_only=True", False),
            "minor_groups": ("minor factors that stay whole (minor_groups=True)", True),
            "block": (f"block={settings.block}", settings.block and 1),
            "round_to": ("multiples of kept channels (round_to=1)", 1 if settings.block is None else settings.round_to),
        }
        for name, (words, value) in relaxed.items():
            if getattr(settings, name) != value:
                yield words, settings.model_copy(update={name: value})
