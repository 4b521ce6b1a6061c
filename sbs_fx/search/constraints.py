"""`Keep`: what must stay, said by name; and what of a graph such a name means.

In: patterns over module paths, parameter names and kinds of layers; a graph's groups and cost model. Out: the weights,
tensors and channel groups that each constraint is about. Holds: a pattern that matches nothing is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from sbs_fx.passes import ChannelGroups, CostModel
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.cost.layers import LayerExpression
from sbs_fx.plan import Value
from sbs_fx.plan.bits import BITS, FLOAT_BITS
from sbs_fx.plan.errors import ConstraintError, SbsError


def checked_bits(bits: Iterable[int]) -> tuple[int, ...]:
    """Bitwidths, ascending. Raises ValueError for one that does not exist, or none."""
    chosen = tuple(sorted(set(bits)))
    if not chosen or set(chosen) - {*BITS, FLOAT_BITS}:
        raise ValueError(f"expected some of {(*BITS, FLOAT_BITS)}")
    return chosen


class Keep(Value):
    """A constraint on what a search may decide.

    | usage                                               | meaning                                              |
    |-----------------------------------------------------|------------------------------------------------------|
    | `Keep("head.*", weight_bits=32, activation_bits=32)` | layers of `head` stay in float, what they read too   |
    | `Keep("layer1", prune=False)`                        | no channel of a tensor of `layer1` goes              |
    | `Keep(kind="linear", weight_bits=(4, 8))`            | linear layers have 4 or 8 bits                       |
    | `Keep("*", least=0.5)`                               | every group keeps at least half of its channels      |
    | `Keep(place="ends", weight_bits=8, activation_bits=8)` | as in the published tables: comes before all others, so that any constraint replaces it |

    Where several constraints speak of one weight, tensor or group, the later one counts.

    Attributes:
        pattern: shell pattern over module paths, parameter names and node names; a path stands for all below it.
        kind: of layers: "conv", "linear", "matmul", "attention", "lstm", "gru" or "rnn". place: "first", "last", or both "ends".
        weight_bits, activation_bits: of weights, and of what the layers read: one number, or several to choose from.
        prune: whether channels may go. least: share of channels that every group keeps.

    Raises:
        ConstraintError: nothing is asked for, or bits that do not exist.

    >>> sbs_fx.Keep.parse("head.*=32")
    Keep('head.*', weight_bits=32, activation_bits=32)
    """  # noqa: E501  # reason: a table

    _error: ClassVar[type[SbsError]] = ConstraintError

    pattern: str = "*"
    kind: Literal["conv", "linear", "matmul", "attention", "lstm", "gru", "rnn"] | None = None
    place: Literal["first", "last", "ends"] | None = None
    weight_bits: tuple[int, ...] | None = None
    activation_bits: tuple[int, ...] | None = None
    prune: bool | None = None
    least: float | None = Field(default=None, gt=0, le=1)

    def __init__(self, pattern: str = "*", /, **settings: Any) -> None:
        super().__init__(**{"pattern": pattern, **settings})
        if all(value is None for value in (self.weight_bits, self.activation_bits, self.prune, self.least)):
            raise ConstraintError(f"{self} asks for nothing; expected weight_bits, activation_bits, prune or least")

    @field_validator("weight_bits", "activation_bits", mode="before")
    @classmethod
    def _several(cls, bits: Any) -> Any:
        return (bits,) if isinstance(bits, int) else bits

    @field_validator("weight_bits", "activation_bits")
    @classmethod
    def _known_bits(cls, bits: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return bits if bits is None else checked_bits(bits)

    @classmethod
    def parse(cls, text: str) -> Keep:
        """From `PATTERN=BITS`, or `PATTERN=WEIGHT_BITS/ACTIVATION_BITS`. Raises ConstraintError."""
        pattern, _, bits = text.rpartition("=")
        weights, slash, activations = bits.partition("/")
        try:
            asked = int(weights), int(activations if slash else weights)
        except ValueError:
            asked = None
        if not pattern or asked is None:
            raise ConstraintError(f"{text!r} is no constraint; expected one like 'head.*=32' or 'layer1=4/8'")
        return cls(pattern, weight_bits=asked[0], activation_bits=asked[1])

    def __str__(self) -> str:
        said = [repr(self.pattern)] if self.pattern != "*" else []
        for name in ("kind", "place", "weight_bits", "activation_bits", "prune", "least"):
            value = getattr(self, name)
            if value is not None:
                said.append(f"{name}={value[0] if isinstance(value, tuple) and len(value) == 1 else value!r}")
        return f"Keep({', '.join(said)})"

    __repr__ = __str__


ENDS = Keep(place="ends", weight_bits=8, activation_bits=8)  # the convention of the published tables


@dataclass(frozen=True)
class Scope:
    """What of one graph a constraint is about, by name."""

    constraint: Keep
    weights: frozenset[str]
    activations: frozenset[str]
    groups: frozenset[str]


class Names:
    """By what names the layers, tensors and groups of one graph are called."""

    def __init__(self, groups: ChannelGroups, cost: CostModel) -> None:
        self.groups, self.cost = groups, cost
        self.nodes = {node.name: node for node in groups.inference.graph_module.graph.nodes}
        self.layers = {layer.node: layer for layer in cost.layers}
        self.names = {layer.node: self._of_layer(layer) for layer in cost.layers}
        self.first, self.last = cost.ends()

    def scope(self, constraint: Keep) -> Scope:
        """Raises ConstraintError where the constraint matches nothing that it could act on."""
        scope = self.matched(constraint)
        asked = {
            "weight_bits": scope.weights,
            "activation_bits": scope.activations,
            "prune": scope.groups or scope.activations,
            "least": scope.groups or scope.activations,
        }
        if not any(asked[name] for name in asked if getattr(constraint, name) is not None):
            raise ConstraintError(f"{constraint} matches nothing of this model; {self._nearest(constraint)}")
        return scope

    def matched(self, constraint: Keep) -> Scope:
        """What the constraint is about, maybe nothing."""
        matched = {name for name, layer in self.layers.items() if self._matches(constraint, layer)}
        weights = {n for n, places in self.cost.weights.items() if any(x.name in matched for x, _ in places)}
        activations = {n for n, places in self.cost.activations.items() if any(x.name in matched for x, _ in places)}
        groups = self._groups(constraint, matched)
        return Scope(constraint, frozenset(weights), frozenset(activations), frozenset(groups))

    def _matches(self, constraint: Keep, layer: LayerExpression) -> bool:
        place = {"first": self.first, "last": self.last, "ends": self.first | self.last, None: {layer.node}}
        return (
            constraint.kind in (None, layer.kind)
            and layer.node in place[constraint.place]
            and any(_fits(name, constraint.pattern) for name in self.names[layer.node])
        )

    def _groups(self, constraint: Keep, matched: set[str]) -> set[str]:
        """Groups with an axis in a matched layer's weight; by a pattern alone, in any tensor that it names."""
        dims = [dim for name in matched for weight, _ in self.layers[name].weights.values() for dim in weight]
        names = {self.groups.of_axis[axis].name for dim in dims for axis in d.axes(dim) if axis in self.groups.of_axis}
        if constraint.kind is None and constraint.place is None:
            names |= {
                group.name
                for group in self.groups.values()
                if any(_fits(member.tensor, constraint.pattern) for member in group.members)
            }
        return names

    def _of_layer(self, layer: LayerExpression) -> tuple[str, ...]:
        """Its node, its module's path, its weights and their parameters."""
        stack = self.nodes[layer.node].meta.get("nn_module_stack") or {}
        paths = [path.partition("@")[0] for path, _ in list(stack.values())[-1:]]
        return tuple(n for n in (layer.node, *paths, *layer.weights, *(f"{n}.weight" for n in layer.weights)) if n)

    def _nearest(self, constraint: Keep) -> str:
        names = sorted({name for names in self.names.values() for name in names[1:] or names})
        paths = sorted({".".join(parts[: k + 1]) for parts in (n.split(".") for n in names) for k in range(len(parts))})
        asked = constraint.pattern.rstrip("*.")
        near: Sequence[str] = difflib.get_close_matches(asked, paths, n=3, cutoff=0.4) or names[:3]
        kinds = sorted({layer.kind for layer in self.layers.values()})
        return f"the nearest names are {', '.join(map(repr, near))}; its kinds of layers are {', '.join(kinds)}"


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
