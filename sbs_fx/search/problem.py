"""`Problem`: what every searcher is given; `SearchResult`: what it gives back.

In: a traced float model, its analyses, a budget, settings. Out: limits in absolute numbers, the space, prices of plans.
Holds: a plan fits if its price is at most every limit, by whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from sbs_fx.passes import ChannelGroups, CostModel
from sbs_fx.plan import Budget, Plan, Policy
from sbs_fx.plan.errors import InfeasibleBudget
from sbs_fx.search.space import Space, SpaceSettings

_USED_UP = 0.9  # of a budget


@dataclass(frozen=True)
class Considered:
    """A plan that was considered: how it came about, its loss as estimated and as predicted (None: it was not asked
    for), the gap to the bound on the estimated loss, and whether the solver ran to its end.

    `shares` are what it costs of what is limited; `reason` says why it was not taken, "" of the one that was.

    >>> Considered("bits", estimated=0.3, predicted=0.31, gap=0.0, proven=True).name
    'bits'
    """

    name: str
    estimated: float
    predicted: float | None
    gap: float
    proven: bool
    shares: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class SearchResult:
    """A plan, and what belongs to it.

    Attributes:
        tensors: parameters and buffers that the search left, by their names in the traced graph.
        notes: for the report. considered: plans that were compared; this one is that of least predicted loss.
        sensitivities: what was measured on the way, a `sbs_fx.search.sensitivities.Sensitivities`.

    >>> SearchResult(problem.space.most).notes
    ()
    """

    plan: Plan
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    considered: tuple[Considered, ...] = ()
    sensitivities: Any = None


@dataclass(frozen=True)
class Problem:
    """One search: a graph, its price, what may be decided and how much may be left.

    Attributes:
        graph: from `trace`; nothing changes it. groups, cost: of it.
        limits: measure -> the most that a plan may cost, whole numbers but for latency.
        inputs: example inputs of the graph. seed: of everything random.

    >>> problem = Problem.of(cost, sbs_fx.Budget(bops=0.05), (images,))
    >>> problem.fits(problem.space.least)
    True
    """

    graph: fx.GraphModule
    groups: ChannelGroups
    cost: CostModel
    limits: Mapping[str, Any]
    space: Space
    inputs: tuple[Tensor, ...]
    seed: int = 0

    @classmethod
    def of(
        cls,
        cost: CostModel,
        budget: Budget,
        inputs: tuple[Tensor, ...],
        space: SpaceSettings | None = None,
        seed: int = 0,
    ) -> Problem:
        """The problem of a traced graph, that of the cost model, under a budget."""
        groups = cost.groups
        graph, limits = groups.inference.graph_module, budget.absolute(cost.whole)
        return cls(graph, groups, cost, limits, Space(groups, cost, space), tuple(inputs), seed)

    def under(self, budget: Budget, **settings: Any) -> Problem:
        """The same problem under another budget."""
        changed = self.within(**settings) if settings else self
        return replace(changed, limits=budget.absolute(self.cost.whole))

    def within(self, **settings: Any) -> Problem:
        """The same problem in a space with other settings."""
        changed = self.space.settings.model_copy(update=settings)
        return replace(self, space=Space(self.groups, self.cost, changed))

    # -- prices --------------------------------------------------------------------------------------------------------

    def price(self, plan: Plan) -> dict[str, Any]:
        """Cost by measure of what is limited."""
        price = self.cost.price(plan)
        return {measure: price[measure] for measure in self.limits}

    def fits(self, plan: Plan) -> bool:
        price = self.price(plan)
        return all(price[measure] <= limit for measure, limit in self.limits.items())

    def used(self, plan: Plan) -> float:
        """Price over limit, the largest of all measures: at most 1 is within the limits."""
        price = self.price(plan)
        return max(
            price[measure] / limit if limit else math.inf if price[measure] else 0.0
            for measure, limit in self.limits.items()
        )

    def slack(self, plan: Plan) -> tuple[str, ...]:
        """What there is to say of a limit that a plan leaves unused, for the report."""
        used = self.used(plan)
        if used >= _USED_UP or not all(self.cost.whole[measure] for measure in self.limits):
            return ()
        costs = " and ".join(f"{share:.2%} of the float {measure}" for measure, share in self.shares_of(plan).items())
        if plan == self.space.most:
            return (f"the budget limits nothing: all channels at their most bits cost {costs}; ask for less",)
        return (f"{used:.0%} of the budget is used ({costs}): bits, multiples of channels and constraints go in steps",)

    @cached_property
    def shares(self) -> dict[str, float]:
        """The limits as shares of the float model."""
        return {m: limit / self.cost.whole[m] if self.cost.whole[m] else 1.0 for m, limit in self.limits.items()}

    def shares_of(self, plan: Plan) -> dict[str, float]:
        """What a plan costs of what is limited, as shares of the float model."""
        whole = self.cost.whole
        return {
            measure: price / whole[measure] if whole[measure] else 0.0 for measure, price in self.price(plan).items()
        }

    def check_feasible(self, method: str) -> None:
        """Raise InfeasibleBudget if the least of everything is over a limit: prices grow with each decision."""
        if not self.fits(self.space.least):
            raise self.infeasible(method, self.space.least)

    def infeasible(self, method: str, least: Plan) -> InfeasibleBudget:
        """The error that says what a method reaches, and which constraints and settings keep it from less."""
        price = self.price(least)
        reached = self.shares_of(least)
        over = [measure for measure, limit in self.limits.items() if price[measure] > limit] or list(self.limits)
        binding, of_space = [], self.price(self.space.least)
        for name, settings in self.space.relaxations():
            relaxed = self.price(Space(self.groups, self.cost, settings).least)
            shares = [f"{measure} {relaxed[measure] / self.cost.whole[measure]:.4g}" for measure in over]
            if any(relaxed[measure] < min(price[measure], of_space[measure]) for measure in over):
                binding.append(f"{name} (without it {', '.join(shares)})")
        in_float = [
            f"{measure} {getattr(cost, measure) / self.cost.whole[measure]:.4g} for {layer.name}"
            for layer, cost in zip(self.cost.layers, self.cost.reference.layers, strict=True)
            for measure in over
            if layer.kind == "float" and measure in ("bops", "macs")
        ]
        return InfeasibleBudget.of(self.shares, reached, f"method {method!r} reaches", binding, in_float)

    def policy(self, plan: Plan, method: str) -> Policy:
        """A plan with the identity of the model that it is for."""
        return Policy.of(
            plan, self.groups.fingerprint, {g.name: g.size for g in self.groups.values()}, method, self.seed
        )
