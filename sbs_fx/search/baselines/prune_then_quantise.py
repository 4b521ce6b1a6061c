"""`prune_then_quantise`: the two decisions one after the other, what joint search is compared with.

In and out: as `sbs`. First channels alone are searched, at float precision, down to a share of the MACs; then bits
alone are searched in the slim network, down to the budget. Weights are trained in both, each with half of the epochs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from sbs_fx.passes import ChannelGroups, CostModel, channel_groups, cost_model, slim
from sbs_fx.passes.channels.slim import scatter
from sbs_fx.passes.graph import attribute, with_tensors
from sbs_fx.plan import Budget, Cost
from sbs_fx.search.gate_search import Search
from sbs_fx.search.sbs import sbs
from sbs_fx.search.searched import Searched
from sbs_fx.training import Checkpoints, Training
from sbs_fx.training.progress import Observer

PRUNED_MACS = 1 / 1.5  # share that pruning leaves if the budget names none: that of the published prune-only networks


def prune_then_quantise(
    graph: fx.GraphModule,
    groups: ChannelGroups,
    cost: CostModel,
    budget: Budget,
    data: Iterable[Any],
    *,
    inputs: Sequence[Tensor],
    search: Search | None = None,
    settings: Training | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    progress: Observer | None = None,
) -> Searched:
    """Two searches, one after the other; `search.epochs` are those of both together, at least one each.

    Raises: as `sbs`.
    """
    search = search or Search()
    first = max(1, search.epochs // 2)
    shared: dict[str, Any] = {
        "inputs": inputs,
        "settings": settings,
        "seed": seed,
        "checkpoints": checkpoints,
        "progress": progress,
    }
    pruned = sbs(
        graph,
        groups,
        cost,
        Budget(macs=budget.macs or PRUNED_MACS),
        data,
        search=search.model_copy(update={"epochs": first, "decisions": "channels"}),
        name="prune",
        **shared,
    )
    kept = pruned.policy.kept
    slimmed = slim(with_tensors(graph, pruned.tensors), groups, kept)
    slim_groups = channel_groups(slimmed)
    slim_cost = cost_model(slimmed, slim_groups)
    quantised = sbs(
        slimmed,
        slim_groups,
        slim_cost,
        _rest(budget, cost.reference, slim_cost.reference),
        data,
        search=search.model_copy(update={"epochs": max(1, search.epochs - first), "decisions": "bits"}),
        name="quantise",
        **shared,
    )
    policy = pruned.policy.model_copy(
        update={
            "method": "prune_then_quantise",
            "weight_bits": quantised.policy.weight_bits,
            "activation_bits": quantised.policy.activation_bits,
        }
    )
    whole = {n: attribute(graph, n).detach() for n in quantised.tensors}
    return Searched(policy, {n: scatter(groups, kept, n, whole[n], t) for n, t in quantised.tensors.items()})


def _rest(budget: Budget, whole: Cost, slim: Cost) -> Budget:
    """The same absolute limits on bit operations and size as shares of the slim network."""
    limits = {}
    for measure, before, after in (("bops", whole.bops, slim.bops), ("size", whole.stored_bits, slim.stored_bits)):
        if measure in budget.limits:
            limits[measure] = min(1.0, budget.limits[measure] * before / after)
    return Budget(**limits or {"macs": 1.0})
