"""`two_stage`: bits and channels without training, from a few hundred images.

In: a problem, images with or without labels. Out: a plan within its limits.
Source: Unified two-stage framework (Pattern Recognition 140, 2023) and MPQCO (arXiv 2110.06554): second-order estimates
of what each decision costs, a knapsack over them, and Dynamic BN to judge what comes out. Ours are: weights are rounded
in closed form before they are judged, so that what reconstruction will mend is not counted; estimates are brought to
the scale of losses measured with Dynamic BN; channels and bits meet by decomposition (`allocation`); from
the best plan on, losses are measured around it, as those of several decisions together are far more than their sum.
Holds: no weight is trained; the same seed gives the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from sbs_fx.calibration.columns import Product
from sbs_fx.calibration.rounding import InputMoments, compensated, input_moments, products, weight_parameters
from sbs_fx.data.batches import Tensors, has_rows, joined_inputs, read_batches, split_inputs, start_epoch
from sbs_fx.passes import activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.plan import Plan, Settings
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.plan import KINDS_OF_BITS, Kind
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.search.allocation import Allocator, Candidate, Decision, considered
from sbs_fx.search.dynamic_norm import Predictor
from sbs_fx.search.measuring import Measuring
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.search.ranges import gates_by_bits
from sbs_fx.search.refitted import Reading, readers_of, readings, removal
from sbs_fx.search.registry import Run, method
from sbs_fx.search.sensitivities import Sensitivities
from sbs_fx.search.sensitivity import Sensitivity, sensitivity

_MOVES = (2, 4, 8, 16)  # decisions that change at once
_NOTHING = 1e-3  # nats an image: so near the float model that there is nothing to gain
_BATCH, _ELEMENTS = 64, 1 << 20  # images that gradients are taken of at a time, and numbers in them, at most
_FEWEST_JUDGED = 32
_UNBEARABLE = 0.1  # nats an image that one tensor's most bits lose alone, more than all of a sound network's together


class TwoStage(Settings):
    """Settings of the search.

    Attributes:
        images: read from the data, for ranges and gradients.
        judged: images on which losses are measured, in one batch; fewer where `effort` asks for it.
        measured: decisions whose loss is measured at most; the others keep their estimate, brought to scale.
        rounds: how often the plan's neighbours are measured and the allocation is solved again.
        levels: kept counts that are considered for a group, at most.
        effort: multiply-accumulates that measuring may take, about; the more, the longer on large networks.
        time_limit: of one run of the solver, in seconds.

    >>> TwoStage(images=64).images
    64
    """

    images: int = Field(default=1024, ge=1)
    judged: int = Field(default=256, ge=1)
    measured: int = Field(default=64, ge=0)
    rounds: int = Field(default=2, ge=0)
    levels: int = Field(default=8, ge=2)
    effort: float = Field(default=2e12, gt=0)
    time_limit: float = Field(default=20.0, gt=0)


@method(
    "two_stage",
    help="second-order loss estimates, a knapsack solved to its optimum, plans judged without training; minutes",
    needs="images",
    settings=TwoStage,
    automatic="with data",
    resumes=True,
)
def two_stage(problem: Problem, run: Run) -> SearchResult:
    """Search without training, on images or (images, labels).

    Raises:
        InfeasibleBudget: the limits are below what the fewest bits and channels cost; `least` has their shares.
        DataError: no batch, NaN or Inf, labels out of range. WeightsError: NaN or Inf in a weight or a gradient.

    >>> from sbs_fx.search.registry import METHODS
    >>> METHODS["two_stage"].search is two_stage, METHODS["two_stage"].needs
    (True, 'images')
    """
    space, search = problem.space, run.settings or TwoStage()
    problem.check_feasible("two_stage")
    free = [(kind, name) for kind in KINDS_OF_BITS for name in space.free(kind)]
    prunable = [n for n in problem.groups if space.may_be_pruned(n)]
    counts = {n: _levels(space.values("channels", n), search.levels) for n in prunable}
    if not free and not prunable:
        return SearchResult(space.most, notes=("nothing is left to decide: constraints fix every choice",))
    macs = max(1, problem.cost.reference.macs)
    judged = int(search.effort / (macs * (search.measured + 2 * len(free) + 2 * len(counts))))
    judged = min(search.judged, max(_FEWEST_JUDGED, judged))
    evidence, predictor = evidence_of(problem, run, search.model_copy(update={"judged": judged}))
    readers = readers_of(problem.cost, predictor.readings, evidence.outputs)
    decisions = [
        *(Decision(k, n, space.values(k, n), _losses(evidence, k, n, space.values(k, n))) for k, n in free),
        *(_channel_decision(evidence, n, counts[n], readers.get(n, ())) for n in counts),
    ]
    start = space.most
    opened = replace(
        start,
        weight_bits=dict.fromkeys(start.weight_bits, FLOAT_BITS),
        activation_bits=dict.fromkeys(start.activation_bits, FLOAT_BITS),
    )
    measuring = Measuring(predictor, run.executor, run.checkpoints, run.step)
    floor = measuring(opened)
    passes = int(search.effort / (macs * predictor.images))
    decisions = _measured(decisions, opened, floor, measuring, min(search.measured, passes // 4))
    decisions = [_with_float(each) if space.may_stay_float(each.kind, each.name) else each for each in decisions]
    table = Sensitivities.of(problem, "two_stage", decisions)
    allocator = Allocator(problem, search.time_limit)
    scored = _scored(allocator.candidates(decisions), measuring)
    worse: list[tuple[float, Candidate]] = []
    for _ in range(search.rounds):
        loss, best = min(scored, key=lambda item: item[0])
        if loss < floor + _NOTHING or len(measuring.asked) + 2 * len(decisions) > passes:
            break
        near = _around(decisions, best, loss, measuring)
        moves = [allocator.moved(near, best, most) for most in _MOVES]
        moved = _scored([candidate for candidate in moves if candidate is not None], measuring)
        scored += [item for item in moved if item[0] < loss - _NOTHING]
        worse += [item for item in moved if item[0] >= loss - _NOTHING]
        if scored[-1][0] >= loss:
            break
    predictor.reset()
    _, best = min(scored, key=lambda item: item[0])
    notes = [] if evidence.labelled else ["the data has no labels: the model's own predictions stood in for them"]
    if not best.proven:
        notes.append(f"the solver stopped before its end; the plan is at most {best.gap:.1%} above the bound")
    notes += [
        f"the activation {d.name!r} stays in float: {d.choices[-2]} bits alone would lose {d.losses[-2]:.2g} nats"
        for d in decisions
        if d.kind == "activation" and d.choices[-1] == FLOAT_BITS == best.plan.activation_bits[d.name]
    ]
    made = considered(problem, decisions, [*scored, *worse], allocator.over, best)
    return SearchResult(best.plan, notes=tuple(notes), considered=made, sensitivities=table)


def evidence_of(problem: Problem, run: Run, search: TwoStage) -> tuple[Sensitivity, Predictor]:
    """All that is learned from the data: estimates for all that is free, and what predicts the loss of any plan.
    Raises: as `two_stage`."""
    device, space = problem.inputs[0].device, problem.space
    data = _read(run.data, search.images, len(problem.inputs))
    batches = [(tuple(x.to(device) for x in inputs), targets) for inputs, targets in data]
    images = [inputs for inputs, _ in batches]
    prunable = [n for n in problem.groups if space.may_be_pruned(n)]
    network = insert_gates(problem.graph, problem.groups, channels=space.settings.prune)
    names = list(weight_gates(network)), list(activation_gates(network))
    gates = gates_by_bits(network, space, images, problem.inputs, run.ranges, len(images))
    apply_bits(network, *(dict.fromkeys(each, FLOAT_BITS) for each in names))
    ranges = {key: gate.grid for key, gate in gates.items()}
    judged = split_inputs(joined_inputs(images), search.judged)[0]
    parameters, product = weight_parameters(network), {n: p for n, (_, p) in products(network).items()}
    moments = input_moments(network, images, parameters)
    rounded = _rounded(parameters, product, moments, gates)
    read = readings(problem.cost, product, parameters, moments)
    forms: dict[Kind, dict[str, Any]] = {
        kind: {n: {b: gates[kind, n, b] for b in space.values(kind, n)} for n in space.free(kind)}
        for kind in KINDS_OF_BITS
    }
    for name, of_name in forms["weight"].items():
        forms["weight"][name] = {**of_name, **{b: _constant(value) for b, value in rounded.get(name, {}).items()}}
    evidence = sensitivity(network, problem.groups, batches, forms, prunable, problem.seed)
    return evidence, Predictor(network, ranges, rounded, judged, problem.graph, read)


def _read(data: Iterable[Any], count: int, tensors: int) -> list[tuple[Tensors, Tensor | None]]:
    """The first `count` images, in batches of at most `_BATCH` and `_ELEMENTS`, each of that many tensors."""
    start_epoch(data, 0)
    batches: list[tuple[Tensors, Tensor | None]] = []
    for _, inputs, targets in read_batches(data, inputs=tensors):
        images = len(inputs[0])
        size = max(1, min(_BATCH, _ELEMENTS // inputs[0][0].numel()))
        parts = split_inputs(split_inputs(inputs, count)[0], size)
        labels = targets[:count].split(size) if has_rows(targets, images) else [None] * len(parts)
        batches += zip(parts, labels, strict=True)
        count -= min(count, images)
        if not count:
            break
    return batches


def _levels(counts: Sequence[int], levels: int) -> tuple[int, ...]:
    """Kept counts of a group, descending: all of it, and the others, evenly spaced if there are too many."""
    *below, size = counts
    if len(below) >= levels:
        below = sorted({below[round(i * (len(below) - 1) / max(1, levels - 2))] for i in range(levels - 1)})
    return (size, *reversed(below))


def _rounded(
    parameters: Mapping[str, Tensor],
    product: Mapping[str, Product],
    moments: Mapping[str, InputMoments],
    gates: dict[tuple[Kind, str, int], SuperBitQuantizer],
) -> dict[str, dict[int, Tensor]]:
    """Weight name -> bits -> the parameter, rounded in closed form where the layer allows it."""
    rounded: dict[str, dict[int, Tensor]] = {}
    for (kind, name, bits), gate in gates.items():
        if kind == "weight" and name in moments and not gate.is_float:
            rounded.setdefault(name, {})[bits] = compensated(
                parameters[name], gate, product[name], moments[name].matrix
            )
    return rounded


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _losses(evidence: Sensitivity, kind: Kind, name: str, values: Sequence[int]) -> tuple[float, ...]:
    return tuple(evidence.bits[kind][name][b] for b in values)


def _channel_decision(
    evidence: Sensitivity, name: str, counts: Sequence[int], readers: Sequence[tuple[Reading, Tensor]]
) -> Decision:
    """By what is lost once the layers that read the channels are refitted; by what channels do, where one cannot be."""
    if readers:
        order, lost = removal(name, counts[0], counts[-1], readers)
        losses = tuple(lost[counts[0] - count] for count in counts)
        order += sorted(set(range(counts[0])) - set(order))
    else:
        order = evidence.channels[name].square().mean(0).argsort(stable=True).tolist()
        losses = tuple(evidence.of_removing(name, order[: len(order) - count]) for count in counts)
    return Decision("channels", name, tuple(counts), losses, order)


def _scored(candidates: Sequence[Candidate], measuring: Measuring) -> list[tuple[float, Candidate]]:
    return list(zip(measuring.of([candidate.plan for candidate in candidates]), candidates, strict=True))


def _measured(decisions: list[Decision], start: Plan, base: float, measuring: Measuring, count: int) -> list[Decision]:
    """Losses measured one by one from the float model, whose own is `base`, the greatest estimates first; the rest
    scaled as its kind is, by the median ratio of measured to estimated."""
    ranked = sorted(
        ((loss, i, k) for i, decision in enumerate(decisions) for k, loss in enumerate(decision.losses)),
        key=lambda item: (-item[0], item[1:]),
    )
    asked = [(loss, i, k) for loss, i, k in ranked[:count] if loss > 0 and not decisions[i].is_harmless(k)]
    measured: dict[tuple[int, int], float] = {}
    ratios: dict[str, list[float]] = {}
    for (loss, i, k), found in zip(
        asked, measuring.of([decisions[i].applied(start, k) for _, i, k in asked]), strict=True
    ):
        measured[i, k] = max(found - base, 0.0)
        ratios.setdefault(decisions[i].kind, []).append(measured[i, k] / loss)
    scale = {kind: float(torch.tensor(of_kind).median()) for kind, of_kind in ratios.items()}
    return [
        decision.with_losses(
            [measured.get((i, k), loss * scale.get(decision.kind, 1.0)) for k, loss in enumerate(decision.losses)]
        )
        for i, decision in enumerate(decisions)
    ]


def _with_float(decision: Decision) -> Decision:
    """An activation that its most bits cannot hold may stay as it is, which loses nothing."""
    if decision.losses[-1] <= _UNBEARABLE:
        return decision
    return replace(decision, choices=(*decision.choices, FLOAT_BITS), losses=(*decision.losses, 0.0))


def _around(decisions: list[Decision], centre: Candidate, loss: float, measuring: Measuring) -> list[Decision]:
    """Decisions with the next choice on either side alone, at losses measured from the plan."""
    near = []
    for decision in decisions:
        at = decision.chosen(centre.plan)
        near.append([(decision, k) for k in (at - 1, at, at + 1) if 0 <= k < len(decision.choices)])
    plans = [decision.applied(centre.plan, k) for of_one in near for decision, k in of_one]
    losses = iter(measuring.of(plans))
    return [
        decision.only([k for _, k in of_one], [next(losses) - loss for _ in of_one])
        for decision, of_one in zip(decisions, near, strict=True)
    ]
