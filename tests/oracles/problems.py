"""Problems for tests, from a module and a budget."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sbs_fx.passes import CostModel, channel_groups, cost_model, trace
from sbs_fx.plan import Budget, Plan
from sbs_fx.search import Keep, Problem, Space, SpaceSettings


def cost_of(module: nn.Module, *example: Tensor) -> CostModel:
    """The cost model of a traced module, which leads to its groups and its graph."""
    graph = trace(module.eval(), example)
    return cost_model(graph, channel_groups(graph))


def problem_of(network: nn.Module | CostModel, example: Tensor, budget: Budget, seed: int = 0, **space: Any) -> Problem:
    """The problem of a module, or of one whose cost is there already; `space` are fields of `SpaceSettings`."""
    cost = network if isinstance(network, CostModel) else cost_of(network, example)
    return Problem.of(cost, budget, (example,), SpaceSettings(**space), seed)


def even_plan(cost: CostModel, weight_bits: int, activation_bits: int, ends: int = 8) -> Plan:
    """The same bits everywhere but in the first and last layers, all channels."""
    settings = SpaceSettings(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        constraints=(Keep(place="ends", weight_bits=ends, activation_bits=ends),),
    )
    return Space(cost.groups, cost, settings).most
