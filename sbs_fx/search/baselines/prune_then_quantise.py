"""`prune_then_quantise`: the two decisions one after the other, what joint search is compared with.

In and out: as `sbs`. First channels alone are searched, at float precision, down to a share of the MACs; then bits
alone are searched in the slim network, down to the limits. Weights are trained in both, each with half of the epochs.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sbs_fx.passes import CostModel, channel_groups, cost_model, slim
from sbs_fx.passes.channels.slim import scatter
from sbs_fx.passes.graph import attribute, with_tensors
from sbs_fx.plan import OF_CHANNELS, Plan
from sbs_fx.search.gate_search import Search
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.search.registry import Run, method
from sbs_fx.search.sbs import GateTraining
from sbs_fx.search.space import Space

PRUNED_MACS = 1 / 1.5  # share that pruning leaves if no limit says it: that of the published prune-only networks


@method(
    "prune_then_quantise",
    help="channels first, then bits, each learned with the weights: what joint search is compared with",
    needs="labels",
    trains=True,
    settings=Search,
    section="search",
    resumes=True,
)
def prune_then_quantise(problem: Problem, run: Run) -> SearchResult:
    """Two searches, one after the other; `epochs` are those of both together, at least one each.

    Raises: as `sbs`.

    >>> from sbs_fx.search.registry import METHODS
    >>> METHODS["prune_then_quantise"].search is prune_then_quantise
    True
    """
    problem.check_feasible("prune_then_quantise")
    search: Search = run.settings or Search()
    if not problem.space.free("channels"):  # reason: nothing may be pruned, and bits alone have all epochs
        return GateTraining(problem, run, name="quantise").result()
    first = max(1, search.epochs // 2)
    one = replace(run, settings=search.model_copy(update={"epochs": first}))
    pruned = GateTraining(_pruning(problem), one, name="prune").result()
    kept = pruned.plan.kept
    least = replace(problem.space.least, kept=kept)
    if not problem.fits(least):
        raise problem.infeasible("prune_then_quantise", least)
    slimmed = slim(with_tensors(problem.graph, pruned.tensors), problem.groups, kept)
    two = replace(run, settings=search.model_copy(update={"epochs": max(1, search.epochs - first)}))
    quantised = GateTraining(
        _quantising(problem, cost_model(slimmed, channel_groups(slimmed))), two, name="quantise"
    ).result()
    whole = {n: attribute(problem.graph, n).detach() for n in quantised.tensors}
    tensors = {n: scatter(problem.groups, kept, n, whole[n], part) for n, part in quantised.tensors.items()}
    return SearchResult(Plan(kept, quantised.plan.weight_bits, quantised.plan.activation_bits), tensors)


def _pruning(problem: Problem) -> Problem:
    """Channels alone, down to what the limits say of work or time, which bits do not change."""
    limits = {m: limit for m, limit in problem.limits.items() if m in OF_CHANNELS}
    if not limits:  # reason: no less than constraints leave
        least = problem.cost.price(problem.space.least)["macs"]
        limits = {"macs": max(least, math.floor(PRUNED_MACS * problem.cost.whole["macs"]))}
    return replace(problem, limits=limits, space=problem.space.of_channels())


def _quantising(problem: Problem, cost: CostModel) -> Problem:
    """Bits alone in the slim graph, under the same limits; what pruning has met is left out."""
    limits = {m: limit for m, limit in problem.limits.items() if m not in OF_CHANNELS}
    space = Space(cost.groups, cost, problem.space.settings.model_copy(update={"prune": False}))
    graph = cost.groups.inference.graph_module
    return replace(
        problem, graph=graph, groups=cost.groups, cost=cost, limits=limits or {"macs": cost.whole["macs"]}, space=space
    )
