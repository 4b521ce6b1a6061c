"""Single weights pruned: how many of each layer stay, so that what is stored keeps a limit.

In: a problem with a limit on the size, a plan of bits. Out: the plan with `nonzeros`, the number of single weights that
stay where others go: they are the largest, so that the number says which. Holds: stored is a bit for each weight, which
stay, and the codes of those that do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sbs_fx.passes import CostModel
from sbs_fx.passes.channels.inference import operand
from sbs_fx.passes.graph import attribute
from sbs_fx.plan import Plan
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.search.problem import Problem
from sbs_fx.search.solvers.laplace import Choices, allocate, choices, laplace_fit, pruned_share

_LOG_FACTOR, _BISECTIONS = 2.0, 40  # of a common factor on all thresholds


def parameters_of(cost: CostModel) -> dict[str, str]:
    """Weight name -> its parameter, where it is one."""
    nodes = {node.name: node for node in cost.groups.inference.graph_module.graph.nodes}
    sources = {name: operand(nodes[places[0][0].name], places[0][1]) for name, places in cost.weights.items()}
    return {name: str(node.target) for name, node in sources.items() if node.op == "get_attr"}


def weight_tensors(cost: CostModel) -> dict[str, Tensor]:
    """Weight name -> its parameter's value; weights that are computed have none."""
    graph = cost.groups.inference.graph_module
    return {name: attribute(graph, parameter).detach() for name, parameter in parameters_of(cost).items()}


def masked_tensors(problem: Problem, plan: Plan) -> dict[str, Tensor]:
    """Parameter name -> the weight with zeros in the places of those that the plan prunes one by one."""
    weights, parameters = weight_tensors(problem.cost), parameters_of(problem.cost)
    return {parameters[name]: largest(weights[name], count) for name, count in plan.nonzeros.items()}


def largest(weight: Tensor, count: int) -> Tensor:
    """A copy with all but the `count` largest magnitudes at zero; of equal ones the later stay."""
    order = weight.abs().flatten().argsort(stable=True)
    result = weight.flatten().clone()
    result[order[: len(order) - count]] = 0
    return result.view(weight.shape)


def prune_weights(problem: Problem, plan: Plan) -> Plan:
    """Prune single weights and lower bits until the stored size is within its limit.

    Damage is the squared error of each weight as a share of its second moment, sizes are those of `laplace.choices`;
    the smallest weights of a layer go, as many as its threshold prunes of a Laplace density. Then bits and forms stay,
    thresholds alone are allocated again, and a common factor on them makes the stored size meet the limit. Weights that
    are computed, and those in float, keep all.

    Args:
        plan: whose weight bits are the most that a weight may have; channels are all kept.

    Raises:
        InfeasibleBudget: the limit is below what is left with one weight a layer.
    """
    weights, limit = weight_tensors(problem.cost), problem.limits["size"]
    most = {n: b for n, b in plan.weight_bits.items() if isinstance(b, int) and b < FLOAT_BITS}
    tables = {
        n: choices(tuple(x for x in problem.space.values("weight", n) if x <= b), "any" if n in weights else "dense")
        for n, b in most.items()
    }
    counts = {n: math.prod(x.size for x in dims) for n, (dims, _) in problem.cost.dims_of_weights.items() if n in most}
    worth = {n: laplace_fit(w) for n, w in weights.items()}
    fixed = problem.cost.price(plan)["size"] - sum(counts[n] * b for n, b in most.items())
    solutions = allocate(counts, tables, limit - fixed, worth)
    for at in solutions[::-1] if solutions else ():
        # reason: beyond the limit first, as its forms use all of it once thresholds are raised
        assert solutions is not None
        forms = {n: _same_form(tables[n], i, at[n] != solutions[0][n]) for n, i in at.items()}
        bits = {**plan.weight_bits, **{n: int(table.bits[0]) for n, table in forms.items()}}
        again = allocate(counts, forms, limit - fixed, worth)
        chosen = again[0] if again else {n: len(table.size) - 1 for n, table in forms.items()}
        thresholds = {n: float(forms[n].threshold[i]) for n, i in chosen.items() if n in weights}
        pruned = _scaled_to(problem, replace(plan, weight_bits=bits), weights, thresholds)
        if pruned is not None:
            return pruned
    least = {n: min(problem.space.values("weight", n)) if n in most else b for n, b in plan.weight_bits.items()}
    alone = {n: 1 for n in weights if n in most}
    raise problem.infeasible("opq", replace(plan, weight_bits=least, nonzeros=alone))


def _scaled_to(
    problem: Problem, plan: Plan, weights: Mapping[str, Tensor], thresholds: Mapping[str, float]
) -> Plan | None:
    """The plan with as many weights as are above thresholds, all of these times the least factor that meets the
    limit."""
    present = {n: int(torch.count_nonzero(weights[n])) for n in thresholds}

    def pruned(log_factor: float) -> Plan:
        nonzeros = {}
        for name, threshold in thresholds.items():
            total = weights[name].numel()
            gone = round(total * float(pruned_share(threshold * math.exp(log_factor))))
            if gone:
                nonzeros[name] = max(1, min(total - gone, present[name]))
        return replace(plan, nonzeros=nonzeros)

    low, high = -_LOG_FACTOR, _LOG_FACTOR
    if not problem.fits(pruned(high)):
        return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if problem.fits(pruned(middle)) else (middle, high)
    return pruned(high)


def _same_form(table: Choices, i: int, on_the_limit: bool) -> Choices:
    """What may still change: thresholds at these bits, of a weight that is stored sparse, or that is what goes beyond
    the limit."""
    bits = int(table.bits[i])
    is_fixed = len(table.size) == 1 or (table.size[i] >= bits and not on_the_limit)
    return choices((bits,), "dense" if is_fixed else "sparse")
