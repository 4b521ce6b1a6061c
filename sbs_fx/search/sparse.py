"""Single weights pruned: how many of each layer may stay, what they take to store and what goes with the others.

In: a problem. Out: per weight the choices of bits and numbers of single weights that stay: they are the largest, so
that the number says which. Holds: stored is a bit for each weight, which stay, and the codes of those that do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sbs_fx.passes import CostModel
from sbs_fx.passes.cost.layers import weight_sources
from sbs_fx.passes.cost.polynomial import Array, Polynomial
from sbs_fx.passes.graph import attribute
from sbs_fx.plan import Plan
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.quantizer.grid import max_level
from sbs_fx.search.problem import Problem
from sbs_fx.search.solvers.laplace import laplace_fit, least_rounding_error, masked_errors, pruned_share


def parameters_of(cost: CostModel) -> dict[str, str]:
    """Weight name -> its parameter, where it is one."""
    nodes = {node.name: node for node in cost.groups.inference.graph_module.graph.nodes}
    sources = weight_sources(nodes, cost.weights)
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


class SingleWeights(NamedTuple):
    """What one weight may be, from the smallest: bits of its codes, how many single weights stay (0: all, and no mask),
    bits that it takes to store and the damage (choices,) as a share of its second moment."""

    bits: tuple[int, ...]
    nonzeros: tuple[int, ...]
    stored: tuple[int, ...]
    damage: Array


def single_weights(weight: Tensor, candidates: Iterable[int]) -> SingleWeights:
    """The choices of which none is as small and does as little damage."""
    total, present = weight.numel(), max(1, int(torch.count_nonzero(weight)))
    rows: list[tuple[int, float, int, int]] = []  # stored, damage, bits, nonzeros
    for bits in candidates:
        if bits == FLOAT_BITS:
            rows.append((total * bits, 0.0, bits, 0))
            continue
        rows.append((total * bits, least_rounding_error(max_level(bits, signed=True)), bits, 0))
        for threshold, error in zip(*masked_errors(bits), strict=True):
            count = max(1, min(total - round(total * float(pruned_share(threshold))), present))
            rows.append((total + count * bits, float(error), bits, count))
    best: list[tuple[int, float, int, int]] = []
    for row in sorted(rows):
        if not best or row[1] < best[-1][1]:
            best.append(row)
    stored, damage, bits_, nonzeros = zip(*best, strict=True)
    return SingleWeights(bits_, nonzeros, stored, laplace_fit(weight) * np.array(damage))


def stored_singly(problem: Problem, names: Iterable[str]) -> tuple[Polynomial, dict[str, int]]:
    """The size where what these weights take is a variable of its own, and the numbers of these variables, behind those
    of the cost model."""
    names = list(names)
    theirs = {problem.cost.number["weight", name] for name in names}  # type: ignore[index]
    size = problem.cost.polynomials["size"].terms.items()
    rest = Polynomial({key: value for key, value in size if not theirs & set(key)})
    numbers = {name: len(problem.cost.variables) + i for i, name in enumerate(names)}
    return sum((Polynomial.variable(number) for number in numbers.values()), start=rest), numbers
