"""`two_stage`: bits and channels without training, from a few hundred images.

In: a traced float model, its analyses, a budget, images with or without labels. Out: a policy that meets the budget.
Source: Unified two-stage framework (Pattern Recognition 140, 2023) and MPQCO (arXiv 2110.06554): second-order estimates
of what each decision costs, a knapsack over them, and Dynamic BN to judge what comes out. Ours are: weights are rounded
in closed form before they are judged, so that what `refine` will mend is not counted; estimates are brought to the
scale of losses measured with Dynamic BN; channels and bits meet by decomposition (`solvers.allocation`); from
the best plan on, losses are measured around it, as those of several decisions together are far more than their sum.
Holds: no weight is trained; the same seed gives the same policy; the budget is met.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from sbs_fx.calibration.rounding import compensated, input_moments, weight_parameters
from sbs_fx.data.batches import read_batches, start_epoch
from sbs_fx.passes import ChannelGroups, CostModel, activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.passes.channels.importance import kernel_multiple
from sbs_fx.plan import Budget, Value
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.errors import InputError
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.search.dynamic_norm import Predictor
from sbs_fx.search.gate_search import Draft, Search, may_be_pruned
from sbs_fx.search.searched import Searched, policy_of
from sbs_fx.search.sensitivity import Sensitivity, sensitivity
from sbs_fx.search.settle import gates_by_bits
from sbs_fx.search.solvers.allocation import Allocator, Decision, Plan
from sbs_fx.search.uniform import end_bits

_MOVES = (2, 4, 8, 16)  # decisions that change at once
_NOTHING = 1e-3  # nats an image: so near the float model that there is nothing to gain
_BATCH, _ELEMENTS = 64, 1 << 20  # images that gradients are taken of at a time, and numbers in them, at most
_FEWEST_JUDGED = 32


class TwoStage(Value):
    """Settings of the search.

    Attributes:
        images: read from the data, for ranges and gradients.
        judged: images on which losses are measured, in one batch; fewer where `effort` asks for it.
        measured: decisions whose loss is measured at most; the others keep their estimate, brought to scale.
        rounds: how often the plan's neighbours are measured and the allocation is solved again.
        decisions: "joint", or "bits" alone (every channel stays).
        block: channels that are decided together; None: as many as kernels like (`kernel_multiple`).
        levels: kept counts that are considered for a group, at most.
        inner_only: prune only channels inside a residual branch.
        minor_groups: also prune the smaller factor of product axes (heads, group widths).
        effort: multiply-accumulates that measuring may take, about; the more, the longer on large networks.
        time_limit: of one run of the solver, in seconds.
    """

    _error = InputError

    images: int = Field(default=1024, ge=1)
    judged: int = Field(default=256, ge=1)
    measured: int = Field(default=64, ge=0)
    rounds: int = Field(default=2, ge=0)
    decisions: Literal["joint", "bits"] = "joint"
    block: int | None = Field(default=None, ge=1)
    levels: int = Field(default=8, ge=2)
    inner_only: bool = False
    minor_groups: bool = False
    effort: float = Field(default=6e12, gt=0)
    time_limit: float = Field(default=20.0, gt=0)


@dataclass(frozen=True)
class Score:
    """A plan that was considered: how it came about, its loss as estimated and as Dynamic BN predicts it, the gap to
    the bound on the estimated loss, and whether the solver ran to its end."""

    name: str
    estimated: float
    predicted: float
    gap: float
    proven: bool


@dataclass(frozen=True)
class TwoStageSearched(Searched):
    """A plan, and how it was chosen.

    Attributes:
        draft: the policy's decisions. scores: of all plans that were considered; it is that of least predicted loss.
        labelled: False: the data has no labels, and the model's own predictions stood in for them.
    """

    draft: Draft = field(default_factory=lambda: Draft({}, {}, {}))
    scores: tuple[Score, ...] = ()
    labelled: bool = True


def two_stage(
    graph: fx.GraphModule,
    groups: ChannelGroups,
    cost: CostModel,
    budget: Budget,
    data: Iterable[Any],
    *,
    inputs: Sequence[Tensor],
    search: TwoStage | None = None,
    grid: Any = "symmetric",
    candidates: tuple[int, ...] = (2, 4, 8),
    seed: int = 0,
    ranges: str = "mse",
) -> TwoStageSearched:
    """Search without training.

    Args:
        graph: from `trace`; not changed. groups, cost: of it.
        data: yields images or (images, labels).
        inputs: example inputs of the graph. ranges: method of `calibrate`.
        seed: of the predictions that are drawn where there are no labels.

    Raises:
        InfeasibleBudget: the budget is below what the fewest bits and channels cost; `least` has their shares.
        DataError: no batch, NaN or Inf, labels out of range. WeightsError: NaN or Inf in a weight or a gradient.
    """
    search = search or TwoStage()
    options = Search(
        decisions=search.decisions, minor_groups=search.minor_groups, inner_only=search.inner_only, block=search.block
    )
    prunable = {
        n: search.block or kernel_multiple(groups[n], None, cost.timing)
        for n in groups
        if may_be_pruned(groups, cost, n, options)
    }
    fixed = end_bits(cost)
    start = Draft(
        {n: fixed.weights.get(n, max(candidates)) for n in cost.weights},
        {n: fixed.activations.get(n, max(candidates)) for n in cost.activations},
        {n: list(range(g.size)) for n, g in groups.items()},
    )
    allocator = Allocator(cost, budget, start, search.time_limit)
    free = [("w", n) for n in cost.weights if n not in fixed.weights]
    free += [("a", n) for n in cost.activations if n not in fixed.activations]
    counts = {n: _counts(groups[n].size, step, search.levels) for n, step in prunable.items()}
    allocator.check(free, min(candidates), {n: min(c) for n, c in counts.items()})

    wanted = search.measured + 2 * len(free) + 2 * len(prunable)
    judged = int(search.effort / (max(1, cost.reference.macs) * wanted))
    found, predictor = evidence(
        graph,
        groups,
        data,
        inputs=inputs,
        search=search.model_copy(update={"judged": min(search.judged, max(_FEWEST_JUDGED, judged))}),
        weights=[n for kind, n in free if kind == "w"],
        activations=[n for kind, n in free if kind == "a"],
        prunable=prunable,
        grid=grid,
        candidates=candidates,
        seed=seed,
        ranges=ranges,
    )
    orders = {n: found.channels[n].square().mean(0).argsort(stable=True).tolist() for n in prunable}
    decisions = [
        *(Decision(k, n, candidates, _bits_losses(found, k, n, candidates)) for k, n in free),
        *(
            Decision("c", n, c, tuple(found.of_removing(n, orders[n][: groups[n].size - k]) for k in c), orders[n])
            for n, c in counts.items()
        ),
    ]
    open_ = replace(
        start,
        weight_bits=dict.fromkeys(start.weight_bits, FLOAT_BITS),
        activation_bits=dict.fromkeys(start.activation_bits, FLOAT_BITS),
    )
    floor = predictor(open_)
    passes = int(search.effort / (max(1, cost.reference.macs) * len(predictor.images)))
    decisions = _measured(decisions, open_, floor, predictor, min(search.measured, passes // 4))
    scored = [(predictor(plan.draft), plan) for plan in allocator.plans(decisions)]
    for _ in range(search.rounds):
        loss, best = min(scored, key=lambda item: item[0])
        if loss < floor + _NOTHING or predictor.passes + 2 * len(decisions) > passes:
            break
        near = _around(decisions, best, loss, predictor)
        found_moves = [allocator.moved(near, best, most) for most in _MOVES]
        moved = [(predictor(plan.draft), plan) for plan in found_moves if plan is not None]
        scored += [item for item in moved if item[0] < loss - _NOTHING]
        if scored[-1][0] >= loss:
            break
    predictor.reset()
    _, best = min(scored, key=lambda item: item[0])
    notes = [] if found.labelled else ["the data has no labels: the model's own predictions stood in for them"]
    if not best.proven:
        notes.append(f"the solver stopped before its end; the plan is at most {best.gap:.1%} above the bound")
    return TwoStageSearched(
        policy_of(best.draft, groups, "two_stage", seed, grid),
        {},
        notes=tuple(notes),
        draft=best.draft,
        scores=tuple(Score(p.name, p.loss, loss, p.gap, p.proven) for loss, p in scored),
        labelled=found.labelled,
    )


def evidence(
    graph: fx.GraphModule,
    groups: ChannelGroups,
    data: Iterable[Any],
    *,
    inputs: Sequence[Tensor],
    search: TwoStage,
    weights: Sequence[str],
    activations: Sequence[str],
    prunable: Iterable[str],
    grid: Any = "symmetric",
    candidates: Sequence[int] = (2, 4, 8),
    seed: int = 0,
    ranges: str = "mse",
) -> tuple[Sensitivity, Predictor]:
    """All that is learned from the data: estimates for these weights, tensors and groups, and what predicts the loss of
    any draft. Raises: as `two_stage`."""
    device = inputs[0].device
    batches = [(x.to(device), labels) for x, labels in _read(data, search.images)]
    images = [x for x, _ in batches]
    network = insert_gates(graph, groups, channels=search.decisions == "joint", candidates=tuple(candidates))
    names = list(weight_gates(network)), list(activation_gates(network))
    gates = gates_by_bits(network, *names, candidates, images, inputs, ranges, len(images))
    apply_bits(network, *(dict.fromkeys(each, FLOAT_BITS) for each in names))
    tops = {key: gate.range.detach() for key, gate in gates.items()}
    judged = torch.cat(images)[: search.judged]
    forms = _rounded(network, judged.split(len(images[0])), gates)
    found = sensitivity(
        network,
        groups,
        batches,
        {n: {b: _form(forms.get(n, {}).get(b), gates["w", n, b]) for b in candidates} for n in weights},
        {n: {b: gates["a", n, b] for b in candidates} for n in activations},
        prunable=prunable,
        seed=seed,
    )
    return found, Predictor(network, tops, forms, judged, graph)


def _read(data: Iterable[Any], count: int) -> list[tuple[Tensor, Tensor | None]]:
    """The first `count` images, in batches of at most `_BATCH` and `_ELEMENTS`."""
    start_epoch(data, 0)
    found: list[tuple[Tensor, Tensor | None]] = []
    for _, (images,), labels in read_batches(data):
        size = max(1, min(_BATCH, _ELEMENTS // images[0].numel()))
        parts = images[:count].split(size)
        found += zip(parts, [None] * len(parts) if labels is None else labels[:count].split(size), strict=True)
        count -= min(count, len(images))
        if not count:
            break
    return found


def _counts(size: int, step: int, levels: int) -> tuple[int, ...]:
    """Kept counts of a group, descending: all of it, and multiples of `step`, evenly spaced if there are too many."""
    below = list(range(step, size, step))
    if len(below) >= levels:
        below = sorted({below[round(i * (len(below) - 1) / (levels - 2))] for i in range(levels - 1)})
    return (size, *reversed(below))


def _rounded(
    network: fx.GraphModule, images: Iterable[Tensor], gates: dict[tuple[str, str, int], SuperBitQuantizer]
) -> dict[str, dict[int, Tensor]]:
    """Weight name -> bits -> the parameter, rounded in closed form where the layer allows it."""
    parameters = weight_parameters(network)
    moments = input_moments(network, images, parameters)
    found: dict[str, dict[int, Tensor]] = {}
    for (kind, name, bits), gate in gates.items():
        if kind == "w" and name in moments:
            found.setdefault(name, {})[bits] = compensated(parameters[name], gate, moments[name])
    return found


def _form(value: Tensor | None, gate: SuperBitQuantizer) -> Any:
    return gate if value is None else lambda _: value


def _bits_losses(found: Sensitivity, kind: str, name: str, candidates: Sequence[int]) -> tuple[float, ...]:
    table = (found.weights if kind == "w" else found.activations)[name]
    return tuple(table[b] for b in candidates)


def _measured(decisions: list[Decision], start: Draft, base: float, predictor: Predictor, count: int) -> list[Decision]:
    """Losses measured one by one from the float model, whose own is `base`, the greatest estimates first; the rest
    scaled as its kind is, by the median ratio of measured to estimated."""
    ranked = sorted(
        ((loss, i, k) for i, decision in enumerate(decisions) for k, loss in enumerate(decision.losses)),
        key=lambda item: (-item[0], item[1:]),
    )
    known: dict[tuple[int, int], float] = {}
    ratios: dict[str, list[float]] = {}
    for loss, i, k in ranked[:count]:
        decision = decisions[i]
        if loss <= 0 or decision.is_harmless(k):
            continue
        known[i, k] = max(predictor(decision.applied(start, k)) - base, 0.0)
        ratios.setdefault(decision.kind, []).append(known[i, k] / loss)
    scale = {kind: float(torch.tensor(found).median()) for kind, found in ratios.items()}
    return [
        decision.with_losses(
            [known.get((i, k), loss * scale.get(decision.kind, 1.0)) for k, loss in enumerate(decision.losses)]
        )
        for i, decision in enumerate(decisions)
    ]


def _around(decisions: list[Decision], plan: Plan, loss: float, predictor: Predictor) -> list[Decision]:
    """Decisions with the next choice on either side alone, at losses measured from the plan."""
    found = []
    for decision in decisions:
        at = decision.chosen(plan.draft)
        near = [k for k in (at - 1, at, at + 1) if 0 <= k < len(decision.choices)]
        losses = [0.0 if k == at else predictor(decision.applied(plan.draft, k)) - loss for k in near]
        found.append(decision.only(near, losses))
    return found
