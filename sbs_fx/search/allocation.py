"""From losses of single decisions to plans within limits.

In: decisions with a loss for each choice, a problem. Out: candidates, plans within the limits, each with its estimated
loss and a bound. Prices are polynomials: with channels fixed, bits are pairs in a knapsack, solved exactly. Channels
join by decomposition: the knapsack holds their prices to first order around a plan, then bits are solved exactly at the
channels that it chose, again and again while the loss falls. Bound: in the logarithms of bits and counts a price is
convex, so its tangent at any plan is below it, and the knapsack with tangents for prices has no greater loss than the
best plan [our derivation].
Holds: every candidate is within the limits by its exact price.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sbs_fx.passes.cost.polynomial import Array
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import InfeasibleBudget
from sbs_fx.plan.plan import Kind
from sbs_fx.search.problem import Considered, Problem
from sbs_fx.search.solvers.knapsack import Allocation, Knapsack, Pair, allocate, greedy

_STEPS = 12  # of the decomposition, at most
_CUTS = 8  # tangents of the bound, at most


@dataclass(frozen=True)
class Decision:
    """One thing to decide: `choices` are bits, or kept counts; `losses` one for each.

    `order` has the coordinates of a group, the least important first.
    """

    kind: Kind
    name: str
    choices: tuple[int, ...]
    losses: tuple[float, ...]
    order: Sequence[int] = field(default=(), repr=False)

    def applied(self, plan: Plan, choice: int) -> Plan:
        value: Any = self.choices[choice]
        if self.kind == "channels":
            value = tuple(sorted(self.order[len(self.order) - value :]))
        return plan.with_value(self.kind, self.name, value)

    def value(self, plan: Plan) -> int:
        value = plan.value(self.kind, self.name)
        return len(value) if self.kind == "channels" else value

    def chosen(self, plan: Plan) -> int:
        return self.choices.index(self.value(plan))

    def is_harmless(self, choice: int) -> bool:
        """Whether a choice is not worth measuring: all channels, or the most bits."""
        return self.choices[choice] == max(self.choices)

    def with_losses(self, losses: Sequence[float]) -> Decision:
        """Of no greater loss the more is kept."""
        order = sorted(range(len(losses)), key=lambda k: -self.choices[k])
        rising = np.maximum.accumulate([losses[k] for k in order])
        return replace(self, losses=tuple(float(rising[order.index(k)]) for k in range(len(losses))))

    def only(self, places: Sequence[int], losses: Sequence[float]) -> Decision:
        return replace(self, choices=tuple(self.choices[k] for k in places), losses=tuple(losses))


@dataclass(frozen=True)
class Candidate:
    """A plan within the limits; `loss` and `bound` are of the estimates that it was made from.

    The bound holds for all plans of the same channels; that of a joint plan, for all plans. `proven`: the solver ran to
    its end.
    """

    name: str
    plan: Plan
    loss: float
    bound: float
    proven: bool

    @property
    def gap(self) -> float:
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / max(abs(self.loss), 1e-300)


class Allocator:
    """Candidates of one problem. `start` decides what no decision does; `time_limit` is of the solver, in seconds;
    `over` gathers the plans that were made and are over a limit."""

    def __init__(self, problem: Problem, time_limit: float) -> None:
        self.problem, self.start, self.time_limit = problem, problem.space.most, time_limit
        self.over: list[Candidate] = []
        self.limits = np.array(list(problem.limits.values()), float)
        self.polynomials = [problem.cost.polynomials[measure] for measure in problem.limits]

    def candidates(self, decisions: Sequence[Decision]) -> list[Candidate]:
        """Plans from these losses: one bitwidth for all weights and one for all activations, wherever that is within
        the limits; the best bits with all channels, by the solver and by the paper's greedy rule; the best that was
        found of bits and channels together."""
        bits, channels = _by_kind(decisions)
        candidates: list[Candidate] = []
        try:
            exact = self._bits(self.start, bits)
            by_rule = replace(greedy(self._knapsack(self.start, bits)), proven=exact.proven)
            candidates = [
                self._candidate("bits", self.start, decisions, exact, exact.bound),
                self._candidate("bits, greedy", self.start, decisions, by_rule, exact.bound),
                *self._uniform(bits, channels, exact),
            ]
        except InfeasibleBudget:
            pass  # reason: bits alone cannot meet it; channels must go
        if channels:
            smallest = _applied(self.start, decisions, [int(np.argmin(x.choices)) for x in decisions])
            joint = self._joint(candidates[0].plan if candidates else smallest, bits, channels)
            bound = min(self._bound(joint.plan, decisions), joint.loss)
            candidates.append(replace(joint, name="joint", bound=bound))
        return [candidate for candidate in candidates if self._fits(candidate)]

    def moved(self, decisions: Sequence[Decision], around: Candidate, most: int) -> Candidate | None:
        """The best change of at most so many decisions, from losses measured around a plan; None if there is none."""
        bits, channels = _by_kind(decisions)
        problem = self._knapsack(around.plan, bits, channels)
        changes = [(np.array(x.choices) != x.value(around.plan)).astype(float) for x in (*bits, *channels)]
        problem = replace(
            problem,
            costs=[np.concatenate([cost, change[None]]) for cost, change in zip(problem.costs, changes, strict=True)],
            limits=np.append(problem.limits, most),
            pairs=[replace(p, costs=np.concatenate([p.costs, 0 * p.costs[:1]])) for p in problem.pairs],
        )
        allocation = allocate(problem, self.time_limit)
        plan = _applied(around.plan, (*bits, *channels), allocation.choices)
        if plan == around.plan:
            return None
        moved = Candidate(f"{most} moves", plan, allocation.loss, allocation.bound, allocation.proven)
        if not self.problem.fits(plan):  # reason: of channels, prices were those to first order
            try:
                again = self._bits(plan, bits)
            except InfeasibleBudget:
                self.over.append(moved)
                return None
            moved = self._candidate(f"{most} moves", plan, decisions, again, again.bound)
        return moved if self._fits(moved) else None

    def _fits(self, candidate: Candidate) -> bool:
        """Whether it is within the limits; what is not is gathered."""
        if not (fits := self.problem.fits(candidate.plan)):
            self.over.append(candidate)
        return fits

    def _uniform(self, bits: Sequence[Decision], channels: Sequence[Decision], exact: Allocation) -> list[Candidate]:
        uniform: list[tuple[int, int, Candidate]] = []
        for w, a in itertools.product(sorted({b for x in bits for b in x.choices}, reverse=True), repeat=2):
            if any(w <= more_w and a <= more_a for more_w, more_a, _ in uniform):
                continue
            plan = self.start
            for x in bits:
                asked = w if x.kind == "weight" else a
                most = max((b for b in x.choices if b <= asked), default=min(x.choices))
                plan = x.applied(plan, x.choices.index(most))
            loss = sum(x.losses[x.chosen(plan)] for x in (*bits, *channels))
            candidate = Candidate(f"uniform {w}/{a}", plan, loss, exact.bound, exact.proven)
            if self._fits(candidate):
                uniform.append((w, a, candidate))
        return [candidate for _, _, candidate in uniform]

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _bits(self, plan: Plan, bits: Sequence[Decision]) -> Allocation:
        return allocate(self._knapsack(plan, bits), self.time_limit)

    def _candidate(
        self, name: str, plan: Plan, decisions: Sequence[Decision], allocation: Allocation, bound: float
    ) -> Candidate:
        """A plan with its bits as allocated; its channels stay."""
        bits, channels = _by_kind(decisions)
        extra = sum(x.losses[x.chosen(plan)] for x in channels)
        allocated = _applied(plan, bits, allocation.choices)
        return Candidate(name, allocated, allocation.loss + extra, bound + extra, allocation.proven)

    def _joint(self, begin: Plan, bits: Sequence[Decision], channels: Sequence[Decision]) -> Candidate:
        """From a plan within the limits, by steps that lower the loss."""
        decisions = (*bits, *channels)
        best = self._candidate("", begin, decisions, self._bits(begin, bits), -np.inf)
        reach = 2
        for _ in range(_STEPS):
            near = []
            for x in channels:
                at = x.chosen(best.plan)
                places = [k for k in range(at - reach, at + reach + 1) if 0 <= k < len(x.choices)]
                near.append(x.only(places, [x.losses[k] for k in places]))
            choices = allocate(self._knapsack(best.plan, bits, near), self.time_limit).choices[len(bits) :]
            plan = _applied(best.plan, near, choices)
            try:
                candidate = self._candidate("", plan, decisions, self._bits(plan, bits), -np.inf)
            except InfeasibleBudget:
                candidate = None
            if candidate is not None and candidate.loss < best.loss - 1e-12:
                best = candidate
            elif reach > 1:
                reach -= 1
            else:
                break
        return best

    def _knapsack(self, plan: Plan, bits: Sequence[Decision], channels: Sequence[Decision] = ()) -> Knapsack:
        """Prices of bits at the channels of a plan, exact, and of channels around it, to first order."""
        x, _ = self.problem.cost.values(plan)
        moved = [self.problem.cost.moved(b.kind, b.name, b.choices) for b in bits]
        tables = [polynomial.tables(x, moved) for polynomial in self.polynomials]
        costs = [
            np.array([table.single.get(i, np.zeros(len(b.choices))) for table in tables]) for i, b in enumerate(bits)
        ]
        slopes = [polynomial.slopes(x) for polynomial in self.polynomials] if channels else []
        for channel in channels:
            ((number, counts),) = self.problem.cost.moved(channel.kind, channel.name, channel.choices).items()
            costs.append(np.array([slope[number] * (counts - x[number]) for slope in slopes]))
        nothing = [{pair: 0 * product for pair, product in table.pairs.items()} for table in tables]
        alike = {pair: product for table in nothing for pair, product in table.items()}
        pairs = [
            Pair(i, j, np.array([table.pairs.get((i, j), alike[i, j]) for table in tables])) for i, j in sorted(alike)
        ]
        price = self.problem.price(plan)  # reason: what adapters store is in no polynomial
        beside = [price[m] - polynomial(x) for m, polynomial in zip(price, self.polynomials, strict=True)]
        limits = self.limits - np.array([table.constant for table in tables]) - beside
        return Knapsack([np.array(y.losses) for y in (*bits, *channels)], costs, limits, pairs)

    def _bound(self, plan: Plan, decisions: Sequence[Decision]) -> float:
        """No plan within the limits has less loss: tangents of the prices in logarithms, at the plan and at what each
        knapsack with these tangents gives, as long as that is over a limit."""
        cuts: list[tuple[list[Array], Array]] = []
        bound = -np.inf
        for _ in range(_CUTS):
            x, _ = self.problem.cost.values(plan)
            slopes = [polynomial.slopes(x) for polynomial in self.polynomials]
            costs = []
            for decision in decisions:
                at = decision.chosen(plan)
                cost: Any = 0.0
                for number, values in self.problem.cost.moved(decision.kind, decision.name, decision.choices).items():
                    logs = np.log(np.maximum(values, 1e-300) / max(values[at], 1e-300)) * values[at]
                    cost = cost + np.array([slope[number] * logs for slope in slopes])
                costs.append(cost)
            cuts.append((costs, self.limits - [polynomial(x) for polynomial in self.polynomials]))
            problem = Knapsack(
                [np.array(decision.losses) for decision in decisions],
                [np.concatenate([c[i] for c, _ in cuts]) for i in range(len(decisions))],
                np.concatenate([limit for _, limit in cuts]),
            )
            allocation = allocate(problem, self.time_limit)
            bound = max(bound, allocation.bound)
            plan = _applied(plan, decisions, allocation.choices)
            if self.problem.fits(plan):
                break
        return bound


def _applied(plan: Plan, decisions: Sequence[Decision], choices: Sequence[int]) -> Plan:
    for decision, choice in zip(decisions, choices, strict=True):
        plan = decision.applied(plan, choice)
    return plan


def _by_kind(decisions: Sequence[Decision]) -> tuple[list[Decision], list[Decision]]:
    """Those of bits, and those of channels."""
    channels = [decision for decision in decisions if decision.kind == "channels"]
    return [decision for decision in decisions if decision.kind != "channels"], channels


def considered(
    problem: Problem,
    decisions: Sequence[Decision],
    scored: Sequence[tuple[float, Candidate]],
    over: Sequence[Candidate],
    best: Candidate,
) -> tuple[Considered, ...]:
    """All plans that were made, with why the others were not taken: `scored` ones with their predicted loss, `best` of
    which was taken, and those `over` a limit, which nobody asked for the loss of."""
    least = next(loss for loss, candidate in scored if candidate is best)

    def told(candidate: Candidate, loss: float | None) -> Considered:
        shares, reason = problem.shares_of(candidate.plan), ""
        if loss is None:
            limits = [(measure, shares[measure], limit) for measure, limit in problem.shares.items()]
            beyond = [f"{m} {share:.2%}, at most {limit:.2%}" for m, share, limit in limits if share > limit]
            reason = f"over the budget: {'; '.join(beyond)}"
        elif candidate is not best:
            more = loss - least
            if candidate.plan == best.plan:
                reason = f"the same plan as {best.name!r}"
            elif more > 0:
                reason = f"predicted to lose {more:.3g} nats more"
            else:
                reason = "predicted to gain too little to go on"
        estimated = sum(decision.losses[decision.chosen(candidate.plan)] for decision in decisions)
        return Considered(candidate.name, estimated, loss, candidate.gap, candidate.proven, shares, reason)

    return (*(told(candidate, loss) for loss, candidate in scored), *(told(candidate, None) for candidate in over))
