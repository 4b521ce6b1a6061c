"""`uniform`: one pair of bitwidths everywhere, the rest of the budget met by pruning.

In: a problem. Out: a plan within its limits. First and last layers stay as constraints say; every group keeps the same
share of its most important channels, bisected to land just under the limits, in multiples that kernels like.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from sbs_fx.passes.channels.importance import group_importance, most_important
from sbs_fx.plan import OF_CHANNELS, Plan
from sbs_fx.plan.plan import Bits
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.search.registry import Run, method
from sbs_fx.search.space import Space

# What is pruned and not trained again is lost.
_COMFORTABLE_SHARE, _WITHOUT_TRAINING = 0.7, 1.0
_BISECTIONS = 12

Counts = Mapping[str, tuple[int, ...]]  # group -> kept counts that it may have, ascending


@method("uniform", help="one pair of bitwidths, what is left of the budget met by pruning: the baseline")
def uniform(problem: Problem, run: Run) -> SearchResult:
    """Pairs of bitwidths are tried from harmless to harsh; the first is taken that lets each group keep 0.7 of its
    channels, all if nothing is fine-tuned, else the one that lets it keep most.

    Raises:
        InfeasibleBudget: even the smallest plan is over the limits; `least` has the shares it reaches.

    >>> problem.fits(uniform(problem, Run()).plan)
    True
    """
    space, comfortable = problem.space, _COMFORTABLE_SHARE if run.fine_tunes else _WITHOUT_TRAINING
    pairs = bit_pairs(space)
    counts = _counts_of(problem, pairs[-1])
    best: tuple[float, tuple[int, int]] | None = None
    for pair in pairs:
        share = _largest_share(problem, pair, counts)
        if share is not None and (best is None or share > best[0]):
            best = share, pair
        if share is not None and share >= comfortable:
            break
    if best is None:
        raise problem.infeasible("uniform", space.plan(*pairs[-1], _kept(counts, 0.0, space)))
    share, pair = best
    kept_counts = _fill(problem, pair, counts, _kept(counts, share, space))
    scores = group_importance(problem.groups, space.settings.importance)
    plan = space.plan(*pair)
    kept = {name: tuple(most_important(scores[name], count)) for name, count in kept_counts.items()}
    return SearchResult(Plan({**plan.kept, **kept}, plan.weight_bits, plan.activation_bits))


def bit_pairs(space: Space) -> list[tuple[int, int]]:
    """(weight bits, activation bits), from harmless to harsh, weights first; only those that give different plans."""
    bits = sorted(space.settings.candidates, reverse=True)
    ladder = [pair for high, low in zip(bits, [*bits[1:], 0], strict=True) for pair in ((high, high), (low, high))]
    pairs: list[tuple[int, int]] = []
    tables: list[tuple[Mapping[str, Bits], Mapping[str, int]]] = []
    for pair in ladder[:-1]:
        plan = space.plan(*pair)
        if (plan.weight_bits, plan.activation_bits) not in tables:
            pairs.append(pair)
            tables.append((plan.weight_bits, plan.activation_bits))
    return pairs


def _counts_of(problem: Problem, fewest: tuple[int, int]) -> Counts:
    """In multiples that kernels are fast with, if the limits are on work or time and can so be met."""
    space = problem.space
    counts = {name: space.values("channels", name) for name in space.free("channels")}
    if problem.limits.keys() & set(OF_CHANNELS):
        groups = (problem.groups[name] for name in problem.groups if space.may_be_pruned(name))
        wide = {group.name: space.counts(group.name, space.multiple(group, fast=True)) for group in groups}
        if problem.fits(space.plan(*fewest, _kept(wide, 0.0, space))):
            return wide
    return counts


def _kept(counts: Counts, share: float, space: Space) -> dict[str, int]:
    """Kept channels per group at a share, rounded down."""
    return {
        name: max((n for n in values if n <= share * space.groups[name].size), default=values[0])
        for name, values in counts.items()
    }


def _largest_share(problem: Problem, pair: tuple[int, int], counts: Counts) -> float | None:
    """The largest share of channels that is within the limits, by bisection over prices that grow with it."""

    def fits(share: float) -> bool:
        return problem.fits(problem.space.plan(*pair, _kept(counts, share, problem.space)))

    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    if not fits(low):
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fill(problem: Problem, pair: tuple[int, int], counts: Counts, kept: dict[str, int]) -> dict[str, int]:
    """Spend what rounding left over: give groups one more multiple, the most pruned first, within the limits."""
    sizes = {name: problem.groups[name].size for name in kept}
    for name in sorted((n for n in kept if kept[n] < sizes[n]), key=lambda n: kept[n] / sizes[n]):
        following = next(itertools.dropwhile(lambda n, now=kept[name]: n <= now, counts[name]))  # type: ignore[misc]
        more = {**kept, name: following}
        if problem.fits(problem.space.plan(*pair, more)):
            kept = more
    return kept
