"""The methods of `compress`: which there are, what each needs, and how each is called.

In: a traced graph with its analyses, a budget, maybe data. Out: a plan, and maybe tensors that go with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from sbs_fx.config import Config
from sbs_fx.passes import ChannelGroups, CostModel
from sbs_fx.plan import Budget, Policy
from sbs_fx.plan.errors import DataError, MethodError
from sbs_fx.search import SEARCHES, Searched, ajpq, opq, two_stage, uniform
from sbs_fx.search.opq import shifted_norms
from sbs_fx.search.sparse import sparse_cost
from sbs_fx.training import Checkpoints
from sbs_fx.training.progress import Observer

_WITHOUT_DATA = ("uniform", "opq")
_UNTRAINED = ("two_stage", "ajpq")
QUICK = (*_WITHOUT_DATA, "two_stage")  # leave no checkpoints of their own
METHODS = ("auto", *_WITHOUT_DATA, *_UNTRAINED, *SEARCHES)
_COMFORTABLE_SHARE = 0.7


@dataclass(frozen=True)
class Traced:
    """A float model after the analyses."""

    graph: fx.GraphModule
    groups: ChannelGroups
    cost: CostModel
    inputs: tuple[torch.Tensor, ...]
    metadata: dict[str, Any] = field(default_factory=dict)  # mean and std of images, if the model says so


def chosen_method(method: str, has_data: bool, epochs: int) -> str:
    """What "auto" stands for. Raises MethodError for an unknown name, DataError where data is missing."""
    if method not in METHODS:
        raise MethodError(f"unknown method {method!r}; expected one of {METHODS}", known=METHODS)
    if method == "auto":
        return ("sbs" if epochs else "two_stage") if has_data else "opq"
    if not has_data and method not in _WITHOUT_DATA:
        raise DataError(f"method {method!r} needs data; give it, or use one of {_WITHOUT_DATA}")
    return method


def find_plan(
    traced: Traced,
    method: str,
    budget: Budget,
    data: Iterable[Any] | None,
    config: Config,
    checkpoints: Checkpoints | None,
    observer: Observer | None,
) -> Searched:
    """The plan of a method, and the tensors that go with it; from the checkpoints if they have it already."""
    plan = (traced.graph, traced.groups, traced.cost, budget)
    inputs, seed = traced.inputs, config.seed
    if method == "uniform":
        return Searched(_uniform(traced, budget, config), {})
    if method == "opq":
        shared = ("weight_bits", "activation_bits", "importance", "round_to", "minor_groups")
        settings = config.opq.model_copy(update={name: getattr(config, name) for name in shared})
        found = opq(*plan, inputs=inputs, settings=settings, seed=seed)
        masked = settings.prunes == "weights" and budget.size is not None
        return replace(found, coded=sparse_cost(traced.cost, found.policy, found.tensors) if masked else None)
    saved = None if checkpoints is None else checkpoints.load("searched")
    if saved is not None:
        return Searched(Policy.from_json(saved.state["policy"]), saved.tensors, notes=tuple(saved.state["notes"]))
    assert data is not None
    searched: Searched
    if method == "two_stage":
        searched = two_stage(*plan, data, inputs=inputs, search=config.two_stage, seed=seed, ranges=config.ranges)
    elif method == "ajpq":
        searched = ajpq(
            *plan, data, inputs=inputs, search=config.ajpq, seed=seed, checkpoints=checkpoints, progress=observer
        )
    else:
        searched = SEARCHES[method](
            *plan,
            data,
            inputs=inputs,
            search=config.search,
            settings=config.training,
            seed=seed,
            checkpoints=checkpoints,
            progress=observer,
        )
    if checkpoints is not None:
        state = {"policy": searched.policy.to_json(), "notes": searched.notes}
        checkpoints.save("searched", searched.tensors, state)
    return searched


def with_norms(traced: Traced, policy: Policy, config: Config) -> Searched:
    """A saved policy with the batch-norm statistics that its method gives, where they follow from it alone."""
    found = Searched(policy, {})
    if policy.method != "opq" or not config.opq.shifts_norms:
        return found
    return Searched(policy, shifted_norms(traced.graph, traced.groups, found, traced.inputs))


def _uniform(traced: Traced, budget: Budget, config: Config) -> Policy:
    return uniform(
        traced.groups,
        traced.cost,
        budget,
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        importance=config.importance,
        round_to=config.round_to,
        # reason: what is pruned and not trained again is lost
        comfortable_share=_COMFORTABLE_SHARE if config.epochs else 1.0,
        minor_groups=config.minor_groups,
        seed=config.seed,
    )
