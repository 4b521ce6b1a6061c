"""`Searched`: what a searcher gives back, a plan and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sbs_fx.passes import ChannelGroups
from sbs_fx.plan import Cost, Policy
from sbs_fx.search.gate_search import Draft


@dataclass(frozen=True)
class Searched:
    """A plan, and the parameters and buffers that the search left, by their names in the traced graph.

    `coded` is what the plan costs where single weights are masked and stored in coded form; None: none are. `notes` are
    for the report.
    """

    policy: Policy
    tensors: dict[str, Tensor]
    coded: Cost | None = None
    notes: tuple[str, ...] = ()


def policy_of(decided: Draft, groups: ChannelGroups, method: str, seed: int, grid: Any) -> Policy:
    """The policy that decisions amount to."""
    return Policy(
        fingerprint=groups.fingerprint,
        method=method,
        seed=seed,
        grid=grid,
        kept=decided.kept,
        sizes={g.name: g.size for g in groups.values()},
        weight_bits=dict(decided.weight_bits),
        activation_bits=decided.activation_bits,
    )
