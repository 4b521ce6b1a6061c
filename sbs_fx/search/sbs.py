"""`sbs`: bits and channels learned with the weights, in one training run (arXiv 2101.04935).

In: a traced float model, its analyses, a budget, labelled data. Out: a policy that meets the budget, and the weights as
the search left them. Every candidate bitwidth shares one weight and one chain of offsets; gates choose; what they chose
is settled just under the budget. If what they began with is better, by the divergence from the float model with weights
from before the search times that with those from after it, that is the policy, with the better of these weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.data.batches import read_batches, start_epoch
from sbs_fx.passes import ChannelGroups, CostModel, insert_gates
from sbs_fx.passes.channels.importance import group_importance, kernel_multiple
from sbs_fx.plan import Budget
from sbs_fx.plan.errors import DataError, InfeasibleBudget
from sbs_fx.search.gate_search import Draft, GateSearch, Search, may_be_pruned, while_searching
from sbs_fx.search.searched import Searched, policy_of
from sbs_fx.search.settle import Ranges, Space, divergence_of, judged_on, ranges_by_bits, settle, use_ranges
from sbs_fx.search.two_stage import TwoStage, two_stage
from sbs_fx.search.uniform import end_bits, uniform_bits
from sbs_fx.training import Checkpoints, Training, train
from sbs_fx.training.evaluation import device_of
from sbs_fx.training.progress import Observer
from sbs_fx.training.randomness import random_state_kept, seed_everything

_EVEN_BITS = 4
_MOST_OVER = 2.0  # cost of 4 bits and all channels over the budget, from which an even start may come down


def sbs(
    graph: fx.GraphModule,
    groups: ChannelGroups,
    cost: CostModel,
    budget: Budget,
    data: Iterable[Any],
    *,
    inputs: Sequence[Tensor],
    search: Search | None = None,
    settings: Training | None = None,
    grid: Any = "symmetric",
    candidates: tuple[int, ...] = (2, 4, 8),
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    progress: Observer | None = None,
    name: str = "search",
    stage: type[GateSearch] = GateSearch,
) -> Searched:
    """Search by super-bit gates.

    Args:
        graph: from `trace`; not changed. groups, cost: of it.
        data: yields (images, labels), iterable more than once.
        inputs: example inputs of the graph.
        grid: of the quantisers; "paper" is the zero-free one.
        seed: of everything random.
        checkpoints, progress: of the training; see `train`. name: of the stage in them.
        stage: what is trained; another kind brings gates of its own (`sbs_fx.search.baselines.bayesian_bits`).

    Raises:
        DataError: data that is unlabelled, of one class alone, or not as the graph takes it.
        InfeasibleBudget: the budget is not met with every gate closed.
        and whatever `train` raises.
    """
    search, settings = search or Search(), settings or Training()
    check_training_data(data)
    blocks = {name: search.block or kernel_multiple(groups[name], None, cost.timing) for name in groups}
    network = insert_gates(graph, groups, channels=search.decisions != "bits", candidates=candidates, block=blocks)
    ends = end_bits(cost)
    fixed = (ends.weights, ends.activations)
    steps = search.epochs * len(data) if isinstance(data, Sized) else None
    training = stage(network, groups, cost, budget, search, fixed=fixed, steps=steps, name=name)
    calibrate(network, data, inputs=inputs)
    start_epoch(data, 0)
    batches = judged_on(graph, read_batches(data, max_batches=search.settle_batches))

    bits = Space(tuple(training.searched["w"]), tuple(training.searched["a"]), {}, candidates)

    def ranges() -> Ranges:
        """Those that suit each bitwidth, with the weights of the moment."""
        with random_state_kept(device_of(network)):  # reason: data may be shuffled, and a resumed run has drawn less
            seed_everything(seed, 0, 0, 0)
            return ranges_by_bits(network, bits, data, inputs)

    def settled(draft: Draft, known: Ranges, *, activations: bool = True) -> Draft:
        """Within the budget, the bits of activations left alone or not, and what it then diverges by."""
        scores = group_importance(groups, "l1", dict(network.named_parameters()))
        channels = {n: (scores[n], blocks[n]) for n in groups if may_be_pruned(groups, cost, n, search)}
        space = replace(bits, channels=channels, activations=bits.activations if activations else ())
        return settle(network, cost, budget, draft, space, batches, known)

    begun = checkpoints is not None and checkpoints.existing(name) is not None
    if training.is_warm and not begun:
        known, even = ranges(), _even(training, blocks, candidates)
        if even is None:
            start = _planned(graph, training, data, inputs, grid, candidates, seed)
        else:
            start = settled(even, known, activations=False)
        start = settled(start, known)
        use_ranges(network, start, known)
        training.start_at(start, batches[0][0])
    train(
        training,
        data,
        epochs=search.epochs,
        lr=search.lr,
        settings=while_searching(settings),
        teacher=graph if settings.distillation else None,
        seed=seed,
        checkpoints=checkpoints,
        progress=progress,
    )
    given = dict(graph.named_parameters()) | dict(graph.named_buffers())
    state = network.state_dict()
    tensors = {n: state[n].detach().clone() for n in given if n in state}
    known = ranges()
    decided = settled(training.draft(), known)
    if training.start is not None:
        start = settled(training.start, known)
        network.load_state_dict(given, strict=False)
        known = ranges()
        decided_before, start_before = (divergence_of(network, draft, batches, known) for draft in (decided, start))
        # reason: the weights have been trained for what the gates chose, and were not for either before
        if start.loss * start_before < decided.loss * decided_before:
            tensors = tensors if start.loss < start_before else {n: given[n].detach().clone() for n in tensors}
            decided = start
    return Searched(policy_of(decided, groups, stage.method, seed, grid), tensors)


def _even(training: GateSearch, blocks: Mapping[str, int], candidates: tuple[int, ...]) -> Draft | None:
    """4 bits everywhere and all channels, where fewer bits of weights and fewer channels can bring that to the budget.

    Plans that are judged without training leave activations 2 bits too often: for 2-bit weights and fewer channels
    training makes up better. On the CIFAR-100 network of the benchmark, ten epochs of it, one run each: at 66 times
    fewer bit operations, 4 bits with 7 % of the MACs pruned ended at 68.4 %, the plan of `two_stage` at 68.1; at 100
    times, 4 bits brought down by weights and channels ended at 67.5, by weights alone at 67.3 (66.7 before joins), a
    search from the plan of `two_stage`, with 2-bit activations, at 66.4, and one from 40 % pruned MACs at 65.0.
    """
    search, cost, budget, groups = training.search, training.cost, training.budget, training.groups
    if search.decisions == "channels" or _EVEN_BITS not in candidates:
        return None
    bits, fewer = (uniform_bits(cost, weights, _EVEN_BITS) for weights in (_EVEN_BITS, candidates[0]))
    fewest = {n: min(g.size, blocks[n]) for n, g in groups.items() if may_be_pruned(groups, cost, n, search)}
    whole = cost.evaluate({}, bits.weights, bits.activations)
    least = cost.evaluate(fewest, fewer.weights, fewer.activations)
    if not 1 < budget.used_by(whole) <= _MOST_OVER or not budget.is_satisfied_by(least):
        return None
    return Draft(bits.weights, bits.activations, {n: list(range(group.size)) for n, group in groups.items()})


def _planned(
    graph: fx.GraphModule,
    training: GateSearch,
    data: Iterable[Any],
    inputs: Sequence[Tensor],
    grid: Any,
    candidates: tuple[int, ...],
    seed: int,
) -> Draft:
    """The best decisions that are found without training; all gates open where channels alone are searched, or where
    the plan's coarser choices do not meet the budget."""
    search = training.search
    if search.decisions == "channels":
        return training.draft()
    options = TwoStage(
        decisions=search.decisions,
        block=search.block,
        inner_only=search.inner_only,
        minor_groups=search.minor_groups,
    )
    with random_state_kept(device_of(training.network)):  # reason: as above
        seed_everything(seed, 0, 0, 0)
        try:
            found = two_stage(
                graph,
                training.groups,
                training.cost,
                training.budget,
                data,
                inputs=inputs,
                search=options,
                grid=grid,
                candidates=candidates,
                seed=seed,
            )
        except InfeasibleBudget:
            return training.draft()
    return found.draft


def check_training_data(data: Iterable[Any]) -> None:
    """Refuse data that nothing can be learned from. Raises DataError."""
    seen: set[int] = set()
    for index, _, labels in read_batches(data, max_batches=8):
        if labels is None:
            raise DataError(f"batch {index} has no labels; a search that trains needs (images, labels)")
        seen |= set(torch.unique(labels).tolist())
    if len(seen) < 2:
        raise DataError(f"the first batches hold the label {seen} alone; expected several classes, in mixed order")
