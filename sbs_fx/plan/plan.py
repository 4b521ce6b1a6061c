"""`Plan`: what was decided, a point at which costs are evaluated.

In and out: names and numbers of one traced graph. Holds: nothing; `Policy` is a plan that was checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Bits = int | Sequence[int]
Kind = Literal["channels", "weight", "activation"]
KINDS_OF_BITS: tuple[Kind, ...] = ("weight", "activation")
FIELDS: Mapping[Kind, str] = {"channels": "kept", "weight": "weight_bits", "activation": "activation_bits"}


@dataclass(frozen=True)
class Plan:
    """Kept coordinates of channel groups and bits of weights and activation tensors, by name.

    What is not named is left as it is: all channels, 32 bits.

    Attributes:
        kept: group -> coordinates that stay, ascending.
        weight_bits: weight -> bits, or one number for each of its output channels in the float model, 0 where it goes.
        activation_bits: tensor -> bits.
        nonzeros: weight -> how many of its single weights stay, the largest, where others go.

    >>> plan = sbs_fx.Plan({}, {name: 8 for name in cost.weights}, {name: 8 for name in cost.activations})
    >>> cost.whole["bops"] / cost.price(plan)["bops"]
    16.0
    """

    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)
    weight_bits: Mapping[str, Bits] = field(default_factory=dict)
    activation_bits: Mapping[str, int] = field(default_factory=dict)
    nonzeros: Mapping[str, int] = field(default_factory=dict)

    def with_value(self, kind: Kind, name: str, value: Any) -> Plan:
        """The plan with one decision changed: kept coordinates, or bits."""
        table = FIELDS[kind]
        return replace(self, **{table: {**getattr(self, table), name: value}})

    def value(self, kind: Kind, name: str) -> Any:
        """What was decided: kept coordinates, or bits."""
        return getattr(self, FIELDS[kind])[name]
