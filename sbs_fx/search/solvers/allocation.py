"""From losses of single decisions to plans that keep a budget.

In: decisions with a loss for each choice, a cost model, a budget. Out: plans, each a draft that keeps the budget, with
its estimated loss and a bound. Costs are products kept-in x kept-out x weight bits x activation bits. With channels
fixed, those of bits are pairs in a knapsack, solved exactly. Channels join by decomposition: the knapsack holds
their costs to first order around a plan, then bits are solved exactly at the channels that it chose, again and again
while the loss falls. Bound: in the logarithms of bits and counts a cost is convex, so its tangent at any plan is below
it, and the knapsack with tangents for costs has no greater loss than the best plan [our derivation].
Holds: every plan keeps the budget by the exact cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from sbs_fx.passes import CostModel
from sbs_fx.plan import Budget
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.errors import InfeasibleBudget
from sbs_fx.search.gate_search import Draft
from sbs_fx.search.solvers.knapsack import Allocation, Array, Knapsack, Pair, allocate, greedy

_STEPS = 12  # of the decomposition, at most
_CUTS = 8  # tangents of the bound, at most


@dataclass(frozen=True)
class Decision:
    """One thing to decide: `kind` is "w", "a" or "c"; `choices` are bits, or kept counts; `losses` one for each.

    `order` has the coordinates of a group, the least important first.
    """

    kind: str
    name: str
    choices: tuple[int, ...]
    losses: tuple[float, ...]
    order: Sequence[int] = field(default=(), repr=False)

    def applied(self, draft: Draft, choice: int) -> Draft:
        value = self.choices[choice]
        if self.kind == "c":
            return replace(draft, kept={**draft.kept, self.name: sorted(self.order[len(self.order) - value :])})
        if self.kind == "w":
            return replace(draft, weight_bits={**draft.weight_bits, self.name: value})
        return replace(draft, activation_bits={**draft.activation_bits, self.name: value})

    def value(self, draft: Draft) -> int:
        if self.kind == "c":
            return len(draft.kept[self.name])
        return (draft.weight_bits if self.kind == "w" else draft.activation_bits)[self.name]

    def chosen(self, draft: Draft) -> int:
        return self.choices.index(self.value(draft))

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
class Plan:
    """A draft that keeps the budget; `loss` and `bound` are of the estimates that it was made from.

    The bound holds for all plans of the same channels; that of a joint plan, for all plans. `proven`: the solver ran to
    its end.
    """

    name: str
    draft: Draft
    loss: float
    bound: float
    proven: bool

    @property
    def gap(self) -> float:
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / max(abs(self.loss), 1e-300)


class Allocator:
    """Plans under one budget.

    Args:
        start: decisions where nothing is to be decided, such as those of the first and last layer.
    """

    def __init__(self, cost: CostModel, budget: Budget, start: Draft, time_limit: float) -> None:
        self.cost, self.budget, self.start, self.time_limit = cost, budget, start, time_limit
        whole = cost.reference.by_measure
        self.limits = {m: limit * whole[m] for m, limit in budget.limits.items()}

    def check(self, free: Sequence[tuple[str, str]], bits: int, counts: Mapping[str, int]) -> None:
        """Raise InfeasibleBudget if the least of everything is over the budget: costs grow with each decision."""
        least = self.cost.evaluate(
            {**{n: len(k) for n, k in self.start.kept.items()}, **counts},
            {**self.start.weight_bits, **{n: bits for k, n in free if k == "w"}},
            {**self.start.activation_bits, **{n: bits for k, n in free if k == "a"}},
        )
        if not self.budget.is_satisfied_by(least):
            raise InfeasibleBudget.of(
                self.budget.limits, self.budget.shares(least), "method 'two_stage' reaches", "more decisions"
            )

    def fits(self, draft: Draft) -> bool:
        return self.budget.is_satisfied_by(self.cost.evaluate(draft.kept, draft.weight_bits, draft.activation_bits))

    def plans(self, decisions: Sequence[Decision]) -> list[Plan]:
        """Plans from these losses: one bitwidth for all weights and one for all activations, wherever that keeps the
        budget; the best bits with all channels, by the solver and by the paper's greedy rule; the best that was found
        of bits and channels together."""
        bits, channels = _kinds(decisions)
        found = []
        try:
            exact = self._bits(self.start, bits)
            by_rule = greedy(self._knapsack(self.start, bits))
            found = [
                self._plan("bits", self.start, bits, channels, exact, exact.bound),
                self._plan(
                    "bits, greedy", self.start, bits, channels, replace(by_rule, proven=exact.proven), exact.bound
                ),
                *self._uniform(bits, channels, exact),
            ]
        except InfeasibleBudget:
            pass  # reason: bits alone cannot meet it; channels must go
        if channels:
            joint = self._joint(found[0].draft if found else self._smallest(self.start, decisions), bits, channels)
            found.append(replace(joint, name="joint", bound=min(self._bound(joint.draft, decisions), joint.loss)))
        return [plan for plan in found if self.fits(plan.draft)]

    def moved(self, decisions: Sequence[Decision], plan: Plan, most: int) -> Plan | None:
        """The best change of at most so many decisions, from losses measured around a plan; None if there is none."""
        bits, channels = _kinds(decisions)
        problem = self._knapsack(plan.draft, bits, channels)
        changes = [(np.array(x.choices) != x.value(plan.draft)).astype(float) for x in (*bits, *channels)]
        problem = replace(
            problem,
            costs=[np.concatenate([cost, change[None]]) for cost, change in zip(problem.costs, changes, strict=True)],
            limits=np.append(problem.limits, most),
            pairs=[replace(p, costs=np.concatenate([p.costs, 0 * p.costs[:1]])) for p in problem.pairs],
        )
        found = allocate(problem, self.time_limit)
        draft = plan.draft
        for x, choice in zip((*bits, *channels), found.choices, strict=True):
            draft = x.applied(draft, choice)
        if draft == plan.draft:
            return None
        moved = Plan(f"{most} moves", draft, found.loss, found.bound, found.proven)
        if not self.fits(draft):  # reason: of channels, costs were those to first order
            try:
                again = self._bits(draft, bits)
            except InfeasibleBudget:
                return None
            moved = self._plan(f"{most} moves", draft, bits, channels, again, again.bound)
        return moved if self.fits(moved.draft) else None

    def _uniform(self, bits: Sequence[Decision], channels: Sequence[Decision], exact: Allocation) -> list[Plan]:
        found: list[tuple[int, int, Plan]] = []
        for w, a in itertools.product(sorted({b for x in bits for b in x.choices}, reverse=True), repeat=2):
            if any(w <= more_w and a <= more_a for more_w, more_a, _ in found):
                continue
            draft = self.start
            for x in bits:
                wanted = w if x.kind == "w" else a
                draft = x.applied(
                    draft, x.choices.index(max((b for b in x.choices if b <= wanted), default=min(x.choices)))
                )
            if self.fits(draft):
                loss = sum(x.losses[x.chosen(draft)] for x in (*bits, *channels))
                found.append((w, a, Plan(f"uniform {w}/{a}", draft, loss, exact.bound, exact.proven)))
        return [plan for _, _, plan in found]

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _smallest(self, draft: Draft, decisions: Sequence[Decision]) -> Draft:
        for x in decisions:
            draft = x.applied(draft, int(np.argmin(x.choices)))
        return draft

    def _bits(self, draft: Draft, bits: Sequence[Decision]) -> Allocation:
        return allocate(self._knapsack(draft, bits), self.time_limit)

    def _plan(
        self,
        name: str,
        draft: Draft,
        bits: Sequence[Decision],
        channels: Sequence[Decision],
        found: Allocation,
        bound: float,
    ) -> Plan:
        extra = sum(x.losses[x.chosen(draft)] for x in channels)
        for x, choice in zip(bits, found.choices, strict=True):
            draft = x.applied(draft, choice)
        return Plan(name, draft, found.loss + extra, bound + extra, found.proven)

    def _joint(self, begin: Draft, bits: Sequence[Decision], channels: Sequence[Decision]) -> Plan:
        """From a plan that keeps the budget, by steps that lower the loss."""
        best = self._plan("", begin, bits, channels, self._bits(begin, bits), -np.inf)
        reach = 2
        for _ in range(_STEPS):
            near = []
            for x in channels:
                at = x.chosen(best.draft)
                places = [k for k in range(at - reach, at + reach + 1) if 0 <= k < len(x.choices)]
                near.append(x.only(places, [x.losses[k] for k in places]))
            chosen = allocate(self._knapsack(best.draft, bits, near), self.time_limit).choices[len(bits) :]
            draft = best.draft
            for x, choice in zip(near, chosen, strict=True):
                draft = x.applied(draft, choice)
            try:
                plan = self._plan("", draft, bits, channels, self._bits(draft, bits), -np.inf)
            except InfeasibleBudget:
                plan = None
            if plan is not None and plan.loss < best.loss - 1e-12:
                best = plan
            elif reach > 1:
                reach -= 1
            else:
                break
        return best

    def _knapsack(self, draft: Draft, bits: Sequence[Decision], channels: Sequence[Decision] = ()) -> Knapsack:
        """Costs of bits at the channels of a draft, exact, and of channels around it, to first order."""
        measures = list(self.limits)
        place = {(x.kind, x.name): i for i, x in enumerate(bits)}
        values = [np.array(x.choices, dtype=float) for x in bits]
        costs = [np.zeros((len(measures), len(v))) for v in values]
        pairs: dict[tuple[int, int], Array] = {}
        now, slopes = self._slopes(draft)
        spent = {m: now[m] for m in measures}
        if "bops" in measures:
            row = measures.index("bops")
            spent["bops"] -= self._products(draft, place, values, costs, pairs, row, len(measures))
        for i, x in enumerate(bits):
            for row, m in enumerate(measures):
                if m == "size":
                    costs[i][row] += slopes[m][x.kind, x.name] * values[i]
                    spent[m] -= slopes[m][x.kind, x.name] * x.value(draft)
        for x in channels:
            moved = np.array(x.choices, dtype=float) - x.value(draft)
            costs.append(np.array([slopes[m][x.kind, x.name] * moved for m in measures]))
        limits = np.array([self.limits[m] - spent[m] for m in measures])
        everything = [*bits, *channels]
        return Knapsack(
            [np.array(x.losses) for x in everything],
            costs,
            limits,
            [Pair(i, j, table) for (i, j), table in pairs.items()],
        )

    def _products(
        self,
        draft: Draft,
        place: Mapping[tuple[str, str], int],
        values: Sequence[Array],
        costs: Sequence[Array],
        pairs: dict[tuple[int, int], Array],
        row: int,
        rows: int,
    ) -> float:
        """Enter the bit operations of all products that hold a decision; what they come to in the draft."""
        sizes = {self.cost.groups[n].axis: len(k) for n, k in draft.kept.items()}
        total = 0.0
        for layer in self.cost.layers:
            for product in layer.products:
                macs = float(product.macs(lambda axis: sizes.get(axis, axis.size)))
                (left, left_bits), (right, right_bits) = (
                    self._operand(o, draft) for o in (product.left, product.right)
                )
                i, j = place.get(left, -1), place.get(right, -1)  # -1: nothing to decide
                if i < 0 and j < 0:
                    continue
                total += macs * left_bits * right_bits
                if i < 0:
                    costs[j][row] += macs * left_bits * values[j]
                elif j < 0:
                    costs[i][row] += macs * right_bits * values[i]
                elif i == j:
                    costs[i][row] += macs * values[i] ** 2
                else:
                    i, j = min(i, j), max(i, j)
                    table = pairs.setdefault((i, j), np.zeros((rows, len(values[i]), len(values[j]))))
                    table[row] += macs * np.outer(values[i], values[j])
        return total

    @staticmethod
    def _operand(operand: tuple[str, str] | None, draft: Draft) -> tuple[tuple[str, str], int]:
        """Its decision, if it is one, and its bits in the draft."""
        if operand is None:
            return ("", ""), FLOAT_BITS
        kind, name = operand
        return (kind[0], name), (draft.weight_bits if kind == "weight" else draft.activation_bits)[name]

    def _slopes(self, draft: Draft) -> tuple[dict[str, float], dict[str, dict[tuple[str, str], float]]]:
        """Costs by measure, and their slopes by measure and decision, in bits and kept counts."""
        tensors = {
            "c": {n: torch.tensor(float(len(k)), dtype=torch.float64) for n, k in draft.kept.items()},
            "w": {n: torch.tensor(float(b), dtype=torch.float64) for n, b in draft.weight_bits.items()},
            "a": {n: torch.tensor(float(b), dtype=torch.float64) for n, b in draft.activation_bits.items()},
        }
        leaves = [(kind, n, t.requires_grad_()) for kind, table in tensors.items() for n, t in table.items()]
        costs = self.cost.expected(tensors["c"], tensors["w"], tensors["a"])
        slopes: dict[str, dict[tuple[str, str], float]] = {}
        now: dict[str, float] = {}
        for m in self.limits:
            value: Any = torch.as_tensor(costs[m], dtype=torch.float64)
            grads = (
                torch.autograd.grad(value, [t for _, _, t in leaves], allow_unused=True, retain_graph=True)
                if value.requires_grad
                else [None] * len(leaves)
            )
            now[m] = float(value.detach())
            slopes[m] = {(k, n): 0.0 if g is None else float(g) for (k, n, _), g in zip(leaves, grads, strict=True)}
        return now, slopes

    def _bound(self, draft: Draft, decisions: Sequence[Decision]) -> float:
        """No plan that keeps the budget has less loss: tangents of the costs in logarithms, at the draft and at what
        each knapsack with these tangents gives, as long as that is over the budget."""
        cuts: list[tuple[list[Array], Array]] = []
        bound = -np.inf
        for _ in range(_CUTS):
            now, slopes = self._slopes(draft)
            costs, limits = [], np.array([limit - now[m] for m, limit in self.limits.items()])
            for x in decisions:
                logs = np.log(np.array(x.choices, dtype=float) / x.value(draft))
                costs.append(np.array([slopes[m][x.kind, x.name] * x.value(draft) * logs for m in self.limits]))
            cuts.append((costs, limits))
            problem = Knapsack(
                [np.array(x.losses) for x in decisions],
                [np.concatenate([c[i] for c, _ in cuts]) for i in range(len(decisions))],
                np.concatenate([limit for _, limit in cuts]),
            )
            found = allocate(problem, self.time_limit)
            bound = max(bound, found.bound)
            for x, choice in zip(decisions, found.choices, strict=True):
                draft = x.applied(draft, choice)
            if self.fits(draft):
                break
        return bound


def _kinds(decisions: Sequence[Decision]) -> tuple[list[Decision], list[Decision]]:
    """Those of bits, and those of channels."""
    return [x for x in decisions if x.kind != "c"], [x for x in decisions if x.kind == "c"]
