"""The methods of `compress`: which there are, what each needs, and how each is called.

In: a traced graph with its analyses, a budget, maybe data. Out: a plan, and maybe tensors that go with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sbs_fx.config import Config
from sbs_fx.errors import DataError, MethodError
from sbs_fx.passes import ChannelGroups, CostModel
from sbs_fx.policy import Budget, Policy
from sbs_fx.search import SEARCHES, Searched, uniform
from sbs_fx.training import Checkpoints
from sbs_fx.training.progress import Observer

METHODS = ("auto", "uniform", *SEARCHES)
_WITHOUT_DATA = ("uniform",)
_COMFORTABLE_SHARE = 0.7


@dataclass(frozen=True)
class Traced:
    """A float model after the analyses."""

    graph: fx.GraphModule
    groups: ChannelGroups
    cost: CostModel
    inputs: tuple[torch.Tensor, ...]


def chosen_method(method: str, has_data: bool, epochs: int) -> str:
    """What "auto" stands for. Raises MethodError for an unknown name, DataError where data is missing."""
    if method not in METHODS:
        raise MethodError(f"unknown method {method!r}; expected one of {METHODS}", known=METHODS)
    if method == "auto":
        return "sbs" if has_data and epochs else "uniform"
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
    if method in _WITHOUT_DATA:
        return _from_weights(traced, budget, config)
    saved = None if checkpoints is None else checkpoints.load("searched")
    if saved is not None:
        return Searched(Policy.from_json(saved.state["policy"]), saved.tensors)
    assert data is not None
    searched = SEARCHES[method](
        traced.graph,
        traced.groups,
        traced.cost,
        budget,
        data,
        inputs=traced.inputs,
        search=config.search,
        settings=config.training,
        seed=config.seed,
        checkpoints=checkpoints,
        progress=observer,
    )
    if checkpoints is not None:
        checkpoints.save("searched", searched.tensors, {"policy": searched.policy.to_json()})
    return searched


def _from_weights(traced: Traced, budget: Budget, config: Config) -> Searched:
    policy = uniform(
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
    return Searched(policy, {})
