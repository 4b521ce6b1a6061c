"""`opq`: channels or single weights, and bits, allocated in one shot from the weights alone, in seconds.

In: a traced float model, its analyses, a budget. Out: a policy that meets it, and batch-norm statistics; where single
weights are pruned, also the weights with zeros in their places. Holds: no data is read, the same weights give the same
policy, the budget is never exceeded.
Source: One-shot Pruning-Quantization (arXiv 2205.11141): a Laplace density per layer, one Lagrange multiplier for
pruning and quantisation, one codebook and a scale per channel in each layer, masks and steps frozen while fine-tuning.
Its equations were not at hand, and it prunes single weights alone; the damage below is our derivation:

    sum over weights w      E_w(b_w)            E: least squared error of a Laplace variable at b bits, as a share of
  + sum over tensors x      readers_x E_x(b_x)     its second moment (`laplace`); for a weight times 2 (mean |w|)^2 /
  + sum over groups g       readers_g share_g      mean w^2, which is 1 where the fit is exact (c_i = 1/|W_i|^2)

with share_g the removed channels' share of their group's squared importance, and `readers` the layers that take the
tensor, or the channels, in: relative errors of the operands add up to that of a layer's output, and all layers count
alike. Weighing them by gradients on synthetic input was tried, and was no better. Batch norms then get the statistics
that belong to the policy, from the difference that it makes to synthetic noise (`NormShift`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, fx

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.calibration.norm_shift import NormShift
from sbs_fx.passes import ChannelGroup, ChannelGroups, CostModel, apply_bits, channel_gates, insert_gates
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.facts import non_negative
from sbs_fx.passes.channels.importance import Norm, group_importance, kernel_multiple, most_important
from sbs_fx.passes.graph import attribute
from sbs_fx.plan import Budget, Policy, Value
from sbs_fx.plan.errors import InfeasibleBudget, InputError, SbsError, WeightsError
from sbs_fx.quantizer.superbit import max_level
from sbs_fx.search.gate_search import Draft
from sbs_fx.search.searched import Searched, policy_of
from sbs_fx.search.solvers.lagrangian import Decision, Load, Polynomial, minimise
from sbs_fx.search.solvers.laplace import laplace_fit, least_rounding_error
from sbs_fx.search.sparse import prune_weights, weight_tensors
from sbs_fx.search.uniform import end_bits


class Opq(Value):
    """Settings of `opq`.

    Attributes:
        prunes: "channels" as a whole; single "weights", which the size budget then counts as coded (`sparse_cost`);
            or "nothing", so that bits alone are chosen.
        weight_bits, activation_bits: of all layers but the first and the last; None: chosen.
        importance: norm by which the channels of a group are ranked.
        round_to: kept channels are a multiple of this; None: see `kernel_multiple`; 1: any number.
        shifts_norms: batch-norm statistics follow what the policy does to synthetic noise (`NormShift`).
        minor_groups: also prune the smaller factor of product axes (heads, group widths).
    """

    _error: ClassVar[type[SbsError]] = InputError

    prunes: Literal["channels", "weights", "nothing"] = "channels"
    weight_bits: Literal[2, 4, 8] | None = None
    activation_bits: Literal[2, 4, 8] | None = None
    importance: Norm = "l2"
    round_to: int | None = Field(default=None, ge=1)
    minor_groups: bool = False
    shifts_norms: bool = True


T = TypeVar("T")
_ELEMENTS = 2 * 3 * 224 * 224  # in a batch of noise; at most 64 images
Name = tuple[str, str]  # ("w" | "a" | "c", name of a weight, of a tensor, of a group)


def opq(
    graph: fx.GraphModule,
    groups: ChannelGroups,
    cost: CostModel,
    budget: Budget,
    *,
    inputs: Sequence[Tensor],
    settings: Opq | None = None,
    seed: int = 0,
) -> Searched:
    """Allocate in one shot.

    Args:
        graph: from `trace`; not changed. groups, cost: of it.
        inputs: example inputs of the graph; they give shapes, dtypes and device.
        seed: recorded in the policy; nothing is drawn.

    Returns:
        The policy. `tensors` has batch-norm statistics, and the masked weights where single weights are pruned. The
        size limit then holds for `sparse_cost(cost, policy, tensors)`, and `FrozenMasks` keeps zeros in fine-tuning.

    Raises:
        InfeasibleBudget: even the smallest choice is over the budget; `least` has the shares it reaches.
        WeightsError: NaN or Inf in a weight.
    """
    settings = settings or Opq()
    for name, weight in weight_tensors(graph, cost).items():
        if not bool(torch.isfinite(weight).all()):
            raise WeightsError(f"NaN or Inf in the weight {name!r}; mend the model before compressing it", names=[name])
    limits = budget.limits
    if settings.prunes == "weights":
        limits = {m: share for m, share in limits.items() if m != "size"} or {"bops": 1.0}
    policy, tensors = _allocate(graph, groups, cost, Budget(**limits), settings, seed), dict[str, Tensor]()
    if settings.prunes == "weights" and budget.size is not None:
        bits, tensors = prune_weights(graph, cost, policy, budget.size, choose_bits=settings.weight_bits is None)
        policy = policy.model_copy(update={"weight_bits": {**policy.weight_bits, **bits}})
    if settings.shifts_norms:
        tensors |= shifted_norms(graph, groups, Searched(policy, tensors), inputs)
    return Searched(policy, tensors)


def shifted_norms(
    graph: fx.GraphModule, groups: ChannelGroups, found: Searched, inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Batch-norm statistics for a plan by their names in the traced graph, from standard normal images alone; none if
    the graph has no batch norm, or takes anything but one batch of images."""
    if len(inputs) != 1 or not inputs[0].is_floating_point():
        return {}
    network = insert_gates(graph, groups)
    shape = inputs[0].shape[1:]
    generator = torch.Generator().manual_seed(0)
    count = max(2, min(64, _ELEMENTS // math.prod(shape)))
    noise = [torch.randn(count, *shape, generator=generator).to(inputs[0]) for _ in range(2)]
    norms = NormShift(network, noise)
    if not norms.names:
        return {}
    with torch.no_grad():
        for name, value in found.tensors.items():
            attribute(network, name).copy_(value)
    apply_bits(network, found.policy.weight_bits, found.policy.activation_bits)
    calibrate(network, None, inputs=inputs)
    for name, kept in found.policy.kept.items():
        channel_gates(network)[name].fix(kept)
    norms.apply()
    return {n: attribute(network, n).detach().clone() for pair in norms.names for n in pair}


def _allocate(
    graph: fx.GraphModule, groups: ChannelGroups, cost: CostModel, budget: Budget, settings: Opq, seed: int
) -> Policy:
    scores = group_importance(groups, settings.importance)
    decisions = _bit_decisions(graph, cost, settings)
    if settings.prunes == "channels":
        for group in groups.values():
            if group.primary or settings.minor_groups:
                decisions["c", group.name] = _channel_decision(group, cost, scores[group.name], settings.round_to)
    values = _meeting(cost, budget, decisions)
    kept = {g.name: list(range(g.size)) for g in groups.values()}
    for name, count in _of("c", values).items():
        kept[name] = most_important(scores[name], count)
    return policy_of(Draft(_of("w", values), _of("a", values), kept), groups, "opq", seed, "symmetric")


def _meeting(cost: CostModel, budget: Budget, decisions: Mapping[Name, Decision]) -> dict[Name, int]:
    """Values of all decisions, within the budget. Raises InfeasibleBudget."""
    for slack in (1.0, 1 - 1e-9):  # reason: what is exactly at a limit may be a rounding above it
        chosen = minimise(list(decisions.values()), _load(cost, budget, list(decisions), slack))
        if chosen is not None:
            values = {key: int(d.values[i]) for (key, d), i in zip(decisions.items(), chosen, strict=True)}
            if budget.is_satisfied_by(cost.evaluate(_of("c", values), _of("w", values), _of("a", values))):
                return values
    raise _infeasible(cost, budget, decisions)


def _bit_decisions(graph: fx.GraphModule, cost: CostModel, settings: Opq) -> dict[Name, Decision]:
    """Bits of every weight and tensor, with what each candidate does to the outputs of the layers that read it."""
    ends = end_bits(cost)
    unsigned = {node.name for node in non_negative(graph.graph.nodes)}
    fits = {name: laplace_fit(w) for name, w in weight_tensors(graph, cost).items()}
    decisions = {}
    for name, places in cost.weights.items():
        bits = _candidates(ends.weights.get(name), settings.weight_bits)
        errors = [least_rounding_error(max_level(b, signed=True)) for b in bits]
        decisions["w", name] = Decision(np.array(bits, float), fits.get(name, 1.0) * len(places) * np.array(errors))
    for name, places in cost.activations.items():
        bits = _candidates(ends.activations.get(name), settings.activation_bits)
        errors = [least_rounding_error(max_level(b, signed=name not in unsigned)) for b in bits]
        decisions["a", name] = Decision(np.array(bits, float), len(places) * np.array(errors))
    return decisions


def _candidates(fixed: int | None, asked: int | None) -> tuple[int, ...]:
    return (fixed,) if fixed is not None else (2, 4, 8) if asked is None else (asked,)


def _channel_decision(group: ChannelGroup, cost: CostModel, scores: Tensor, round_to: int | None) -> Decision:
    """How many channels of a group stay, with the share of the importance that goes with the others."""
    step = kernel_multiple(group, round_to, cost.timing)
    counts = np.array(sorted({*range(step, group.size, step), group.size}))
    readers = sum(
        group.axis in d.axes(dim)
        for layer in cost.layers
        for dims, out in layer.weights.values()
        for i, dim in enumerate(dims)
        if i != out % len(dims)
    )
    mass = scores.double().square().sort(descending=True).values
    gone = mass.flip(0).cumsum(0).flip(0) / mass.sum().clamp_min(1e-300)
    return Decision(counts.astype(float), max(1, readers) * np.append(gone.numpy(), 0.0)[counts])


def _load(cost: CostModel, budget: Budget, names: list[Name], slack: float = 1.0) -> Load:
    variables = {name: Polynomial.variable(i) for i, name in enumerate(names)}
    found = cost.expected(*(_of(kind, variables) for kind in "cwa"))
    whole = cost.reference.by_measure
    return Load([found[m] * (1 / (slack * share * whole[m])) for m, share in budget.limits.items()], len(names))


def _of(kind: str, table: Mapping[Name, T]) -> dict[str, T]:
    return {name: value for (k, name), value in table.items() if k == kind}


def _infeasible(cost: CostModel, budget: Budget, decisions: Mapping[Name, Decision]) -> InfeasibleBudget:
    least = {name: int(decision.values[0]) for name, decision in decisions.items()}
    shares = budget.shares(cost.evaluate(_of("c", least), _of("w", least), _of("a", least)))
    return InfeasibleBudget.of(
        budget.limits, shares, "method 'opq' reaches on this model", "lower bits or smaller multiples (round_to)"
    )
