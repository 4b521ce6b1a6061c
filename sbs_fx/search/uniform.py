"""`uniform`: one bitwidth everywhere, the rest of the budget met by pruning.

In: channel groups, cost model, budget. Out: a `Policy` that meets the budget. First and last layers stay at 8/8; every
group keeps the same share of its most important channels, bisected to land just under the budget, in multiples that
kernels like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sbs_fx.passes import ChannelGroup, ChannelGroups, CostModel
from sbs_fx.passes.channels.groups import Readers
from sbs_fx.passes.channels.importance import Norm, group_importance, kernel_multiple, most_important
from sbs_fx.plan import Budget, Cost, Policy
from sbs_fx.plan.errors import InfeasibleBudget

# (weight bits, activation bits), from harmless to harsh
BIT_PAIRS = ((8, 8), (4, 8), (4, 4), (2, 4), (2, 2))


@dataclass(frozen=True)
class Bits:
    """Bitwidths of a whole graph."""

    weights: dict[str, int]
    activations: dict[str, int]


def uniform(
    groups: ChannelGroups,
    cost: CostModel,
    budget: Budget,
    *,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    importance: Norm = "l2",
    round_to: int | None = None,
    comfortable_share: float = 0.7,
    minor_groups: bool = False,
    seed: int = 0,
) -> Policy:
    """Find a uniform policy that meets the budget.

    Args:
        weight_bits, activation_bits: fixed bitwidths; None tries `BIT_PAIRS` in order and takes the first that lets
            each group keep `comfortable_share` of its channels, else the one that lets it keep most.
        importance: norm by which the channels of a group are ranked.
        round_to: kept channels are a multiple of this; None: see `kernel_multiple`, which is to be fast if the budget
            is one of MACs or latency that can so be met; 1: any number.
        minor_groups: also prune the smaller factor of product axes (heads, group widths).

    Raises:
        InfeasibleBudget: even the smallest policy is over the budget; `least` has the shares it reaches.
    """
    prunable = [g for g in groups.values() if g.primary or minor_groups]
    pairs = [(w, a) for w, a in BIT_PAIRS if weight_bits in (None, w) and activation_bits in (None, a)]
    if not pairs:
        pairs = [(weight_bits or 8, activation_bits or 8)]
    steps = {g.name: kernel_multiple(g, round_to, cost.timing) for g in prunable}
    if budget.limits.keys() & {"macs", "latency"}:
        wide = {g.name: kernel_multiple(g, round_to, cost.timing, fast=True) for g in prunable}
        fewest = uniform_bits(cost, *pairs[-1])
        if budget.is_satisfied_by(cost.evaluate(_counts(prunable, wide, 0.0), fewest.weights, fewest.activations)):
            steps = wide
    best: tuple[float, dict[str, int], Bits] | None = None
    least: Cost | None = None
    for w, a in pairs:
        bits = uniform_bits(cost, w, a)
        found = _largest_share(prunable, steps, cost, budget, bits)
        if found is None:
            least = cost.evaluate(_counts(prunable, steps, 0.0), bits.weights, bits.activations)
            continue
        if best is None or found[0] > best[0]:
            best = (*found, bits)
        if found[0] >= comfortable_share:
            break
    if best is None:
        assert least is not None
        raise InfeasibleBudget.of(
            budget.limits,
            budget.shares(least),
            "method 'uniform' reaches on this model",
            "lower bits or smaller multiples (round_to)",
        )
    _, counts, bits = best
    counts = _fill(prunable, steps, cost, budget, bits, counts)
    scores = group_importance(groups, importance)
    kept = {g.name: list(range(g.size)) for g in groups.values()}
    for name, count in counts.items():
        kept[name] = most_important(scores[name], count)
    return Policy(
        fingerprint=groups.fingerprint,
        method="uniform",
        seed=seed,
        kept=kept,
        sizes={g.name: g.size for g in groups.values()},
        weight_bits=dict(bits.weights),
        activation_bits=dict(bits.activations),
    )


def uniform_bits(cost: CostModel, weight_bits: int, activation_bits: int, ends: int = 8) -> Bits:
    """The same bitwidths everywhere; `ends` for weights and inputs of the first and last layers (`ends` of 8 is the
    convention of the published tables)."""
    fixed = end_bits(cost, ends)
    return Bits(
        {**dict.fromkeys(cost.weights, weight_bits), **fixed.weights},
        {**dict.fromkeys(cost.activations, activation_bits), **fixed.activations},
    )


def end_bits(cost: CostModel, bits: int = 8) -> Bits:
    """These bits for the weights and inputs of the first and last layers, and no others."""
    first, last = cost.ends()

    def at_an_end(names: Readers) -> dict[str, int]:
        return {n: bits for n, places in names.items() if any(x.name in first or x.name in last for x, _ in places)}

    return Bits(at_an_end(cost.weights), at_an_end(cost.activations))


def _counts(groups: list[ChannelGroup], steps: Mapping[str, int], share: float) -> dict[str, int]:
    """Kept channels per group at a share: rounded down to the group's multiple, at least one multiple."""
    counts = {}
    for g in groups:
        step = steps[g.name]
        exact = g.size if share >= 1 else int(g.size * share) // step * step
        counts[g.name] = min(g.size, max(exact, step, 1))
    return counts


def _largest_share(
    groups: list[ChannelGroup], steps: Mapping[str, int], cost: CostModel, budget: Budget, bits: Bits
) -> tuple[float, dict[str, int]] | None:
    """The largest share of channels that meets the budget, by bisection over costs that grow with it."""

    def fits(share: float) -> bool:
        counts = _counts(groups, steps, share)
        return budget.is_satisfied_by(cost.evaluate(counts, bits.weights, bits.activations))

    if fits(1.0):
        return 1.0, _counts(groups, steps, 1.0)
    low, high = 0.0, 1.0
    if not fits(low):
        return None
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, _counts(groups, steps, low)


def _fill(
    groups: list[ChannelGroup],
    steps: Mapping[str, int],
    cost: CostModel,
    budget: Budget,
    bits: Bits,
    counts: dict[str, int],
) -> dict[str, int]:
    """Spend what rounding left over: give groups one more multiple, the most pruned first, while the budget holds."""
    counts = dict(counts)
    by_share = sorted((g for g in groups if counts[g.name] < g.size), key=lambda g: counts[g.name] / g.size)
    for g in by_share:
        more = {**counts, g.name: min(g.size, counts[g.name] + steps[g.name])}
        if budget.is_satisfied_by(cost.evaluate(more, bits.weights, bits.activations)):
            counts = more
    return counts
