"""`opq`: channels or single weights, and bits, allocated in one shot from the weights alone, in seconds.

In: a problem. Out: a plan within its limits, and batch-norm statistics; where single weights go, also the weights
with zeros in their places. Holds: no data is read, the same weights give the same plan.
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
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.calibration.norm_shift import NormShift
from sbs_fx.passes import apply_bits, channel_gates, insert_gates
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.facts import non_negative
from sbs_fx.passes.channels.importance import group_importance, most_important
from sbs_fx.passes.graph import attribute
from sbs_fx.plan import Plan, Settings
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.errors import WeightsError
from sbs_fx.plan.plan import Kind
from sbs_fx.quantizer.grid import max_level
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.search.registry import Run, method
from sbs_fx.search.solvers.lagrangian import Array, Decision, Load, minimise
from sbs_fx.search.solvers.laplace import laplace_fit, least_rounding_error
from sbs_fx.search.sparse import SingleWeights, masked_tensors, single_weights, stored_singly, weight_tensors

_ELEMENTS = 2 * 3 * 224 * 224  # in a batch of noise; at most 64 images
_TRIES = 8


class Opq(Settings):
    """Settings of `opq`.

    Attributes:
        prunes: "channels" as a whole, or single "weights", which the size budget then counts as stored: a bit for each
            and the codes of those that stay.
        shifts_norms: batch-norm statistics follow what the plan does to synthetic noise (`NormShift`).

    >>> config = sbs_fx.Config(opq=Opq())
    >>> sbs_fx.compress(net, images, method="opq", config=config).policy.method
    'opq'
    """

    prunes: Literal["channels", "weights"] = "channels"
    shifts_norms: bool = True


def restored(problem: Problem, plan: Plan, settings: Opq) -> dict[str, Tensor]:
    """What follows from a plan alone: weights with zeros, and batch-norm statistics that belong to it."""
    tensors = masked_tensors(problem, plan)
    return tensors | shifted_norms(problem, plan, tensors) if settings.shifts_norms else tensors


@method(
    "opq",
    help="one shot from the weights: bits and channels by one Lagrangian over Laplace densities; seconds",
    settings=Opq,
    automatic="without data",
    candidates=(2, 3, 4, 5, 6, 8),
    restore=restored,
)
def opq(problem: Problem, run: Run) -> SearchResult:
    """Allocate in one shot; nothing is drawn.

    Returns:
        The plan. `tensors` has batch-norm statistics, and the masked weights where single weights are pruned;
        `FrozenMasks` keeps their zeros in fine-tuning.

    Raises:
        InfeasibleBudget: even the smallest choice is over the limits; `least` has the shares it reaches.
        WeightsError: NaN or Inf in a weight.

    >>> problem.fits(opq(problem, Run()).plan)
    True
    """
    settings: Opq = run.settings or Opq()
    for name, weight in weight_tensors(problem.cost).items():
        if not bool(torch.isfinite(weight).all()):
            raise WeightsError(f"NaN or Inf in the weight {name!r}; mend the model before compressing it", names=[name])
    if settings.prunes == "weights":
        problem = problem.within(prune=False)
    plan = _allocate(problem, settings)
    return SearchResult(plan, restored(problem, plan, settings))


def shifted_norms(problem: Problem, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Batch-norm statistics for a plan by their names in the traced graph, from standard normal images alone; none if
    the graph has no batch norm, or takes anything but one batch of images."""
    inputs = problem.inputs
    if len(inputs) != 1 or not inputs[0].is_floating_point():
        return {}
    network = insert_gates(problem.graph, problem.groups)
    shape = inputs[0].shape[1:]
    generator = torch.Generator().manual_seed(0)
    count = max(2, min(64, _ELEMENTS // math.prod(shape)))
    noise = [torch.randn(count, *shape, generator=generator).to(inputs[0]) for _ in range(2)]
    norms = NormShift(network, noise)
    if not norms.names:
        return {}
    with torch.no_grad():
        for name, value in tensors.items():
            attribute(network, name).copy_(value)
    apply_bits(network, plan.weight_bits, plan.activation_bits)
    calibrate(network, None, inputs=inputs)
    for name, kept in plan.kept.items():
        channel_gates(network)[name].fix(kept)
    norms.apply()
    return {n: attribute(network, n).detach().clone() for pair in norms.names for n in pair}


def _allocate(problem: Problem, settings: Opq) -> Plan:
    """The plan of least damage within the limits. Raises InfeasibleBudget."""
    space, cost = problem.space, problem.cost
    scores = group_importance(problem.groups, space.settings.importance)
    damages = {("channels", n): _channel_damage(problem, n, scores[n]) for n in problem.groups} | _bit_damages(problem)
    choices = space.choices
    decisions = [Decision(cost.moved(c.kind, c.name, c.values), damages[c.kind, c.name]) for c in choices]
    polynomials, start = dict(cost.polynomials), cost.values(space.most)[0]
    singly = _singly(problem) if settings.prunes == "weights" and "size" in problem.limits else {}
    if singly:
        polynomials["size"], numbers = stored_singly(problem, singly)
        start = np.concatenate([start[:-1], np.zeros(len(numbers)), [1.0]])
        for k, choice in enumerate(choices):
            if choice.kind == "weight" and (each := singly.get(choice.name)):
                moved = cost.moved("weight", choice.name, each.bits)
                moved[numbers[choice.name]] = np.array(each.stored, float)
                decisions[k] = Decision(moved, len(cost.weights[choice.name]) * each.damage)
    limits = dict(problem.limits)
    for _ in range(_TRIES):
        load = Load([polynomials[m] for m in limits], list(limits.values()), start, decisions)
        chosen = minimise(decisions, load)
        if chosen is None:
            break
        plan = space.most
        for choice, at in zip(choices, chosen, strict=True):
            value: Any
            if choice.kind == "weight" and (each := singly.get(choice.name)):
                value, stay = each.bits[at], each.nonzeros[at]
                plan = replace(plan, nonzeros={**plan.nonzeros, choice.name: stay}) if stay else plan
            else:
                count = choice.values[at]
                value = tuple(most_important(scores[choice.name], count)) if choice.kind == "channels" else count
            plan = plan.with_value(choice.kind, choice.name, value)
        if problem.fits(plan):
            return plan
        # reason: what adapters store is in the price, and in no polynomial
        price = problem.price(plan)
        limits = {m: limit - max(0, price[m] - problem.limits[m]) for m, limit in limits.items()}
    nonzeros = {name: each.nonzeros[0] for name, each in singly.items()}
    raise problem.infeasible("opq", replace(space.least, nonzeros=nonzeros))


def _singly(problem: Problem) -> dict[str, SingleWeights]:
    """Weight -> what it may be where single weights go; weights that are computed, or stay in float, keep all."""
    bits = {name: problem.space.values("weight", name) for name in problem.cost.weights}
    tensors = weight_tensors(problem.cost)
    return {n: single_weights(w, bits[n]) for n, w in tensors.items() if bits[n] != (FLOAT_BITS,)}


def _bit_damages(problem: Problem) -> dict[tuple[str, str], Array]:
    """What each bitwidth of every weight and tensor does to the outputs of the layers that read it."""
    unsigned = {node.name for node in non_negative(problem.graph.graph.nodes)}
    fits = {name: laplace_fit(w) for name, w in weight_tensors(problem.cost).items()}
    damages: dict[tuple[str, str], Array] = {}
    for name, places in problem.cost.weights.items():
        damages["weight", name] = fits.get(name, 1.0) * len(places) * _errors(problem, "weight", name, signed=True)
    for name, places in problem.cost.activations.items():
        damages["activation", name] = len(places) * _errors(problem, "activation", name, signed=name not in unsigned)
    return damages


def _errors(problem: Problem, kind: Kind, name: str, *, signed: bool) -> Array:
    """Of a Laplace variable at each bitwidth, as shares of its second moment."""
    values = problem.space.values(kind, name)
    return np.array([0.0 if b == FLOAT_BITS else least_rounding_error(max_level(b, signed)) for b in values])


def _channel_damage(problem: Problem, name: str, scores: Tensor) -> Array:
    """The share of a group's importance that goes, for each number of channels that may stay."""
    axis = problem.groups[name].axis
    readers = sum(
        axis in d.axes(dim)
        for layer in problem.cost.layers
        for dims, out in layer.weights.values()
        for i, dim in enumerate(dims)
        if i != out % len(dims)
    )
    mass = scores.double().square().sort(descending=True).values
    gone = mass.flip(0).cumsum(0).flip(0) / mass.sum().clamp_min(1e-300)
    return max(1, readers) * np.append(gone.numpy(), 0.0)[list(problem.space.values("channels", name))]
