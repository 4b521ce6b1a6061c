"""`sbs`: bits and channels learned with the weights, in one training run (arXiv 2101.04935).

In: a problem, labelled data. Out: a plan within its limits, and the weights as the search left them. Every candidate
bitwidth shares one weight and one chain of offsets; gates choose; budget repair brings what they chose just under the
limits. If what they began with is better, by the divergence from the float model with weights from before the search
times that with those from after it, that is the plan, with the better of these weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.data.batches import check_labels, read_batches, start_epoch
from sbs_fx.passes import insert_gates
from sbs_fx.passes.channels.importance import group_importance
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import DataError, InfeasibleBudget
from sbs_fx.plan.plan import Kind
from sbs_fx.search.gate_search import GateSearch, Search, while_searching
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.search.ranges import Ranges, ranges_by_bits, use_ranges
from sbs_fx.search.registry import Run, method
from sbs_fx.search.repair import BudgetRepair, Harm, judged_on
from sbs_fx.search.two_stage import two_stage
from sbs_fx.training import train
from sbs_fx.training.evaluation import device_of
from sbs_fx.training.randomness import random_state_kept, seed_everything
from sbs_fx.training.task import task_of

_EVEN_BITS = 4
_MOST_OVER = 2.0  # cost of 4 bits and all channels over the budget, from which an even start may come down


@method(
    "sbs",
    help="Single-path Bit Sharing: bits and channels are learned with the weights, then fine-tuned",
    needs="labels",
    trains=True,
    settings=Search,
    section="search",
    resumes=True,
    automatic="with training",
)
def sbs(problem: Problem, run: Run) -> SearchResult:
    """Search by super-bit gates.

    Raises:
        DataError: data that is unlabelled, of one class alone, or not as the graph takes it.
        InfeasibleBudget: the limits are not met with every gate closed.
        and whatever `train` raises.

    >>> from sbs_fx.search.registry import METHODS
    >>> METHODS["sbs"].search is sbs, METHODS["sbs"].trains
    (True, True)
    """
    return GateTraining(problem, run).result()


class GateTraining:
    """A search by gates: its network, start, training and end.

    Args:
        stage: what is trained; another kind brings gates of its own (`sbs_fx.search.baselines.bayesian_bits`).
        name: of the stage in checkpoints and progress.
    """

    def __init__(self, problem: Problem, run: Run, stage: type[GateSearch] = GateSearch, name: str = "search") -> None:
        if task_of(problem.graph).name == "classification":
            check_training_data(run.data, len(problem.inputs))
        self.problem, self.run, space = problem, run, problem.space
        self.search: Search = run.settings or Search()
        self.network = insert_gates(
            problem.graph,
            problem.groups,
            channels=space.settings.prune,
            candidates=space.values,
            block={name: space.multiple(group) for name, group in problem.groups.items()},
        )
        steps = self.search.epochs * len(run.data) if isinstance(run.data, Sized) else None
        self.stage = stage(self.network, problem, self.search, steps=steps, name=name)
        calibrate(self.network, run.data, inputs=problem.inputs)
        start_epoch(run.data, 0)
        self.batches = judged_on(problem.graph, run.data, self.search.repair_batches)

    def result(self) -> SearchResult:
        run, stage, network = self.run, self.stage, self.network
        begun = run.checkpoints is not None and run.checkpoints.existing(stage.name) is not None
        if stage.is_warm and not begun:
            self._begin()
        train(
            stage,
            run.data,
            epochs=self.search.epochs,
            lr=self.search.lr,
            settings=while_searching(run.training),
            teacher=self.problem.graph if run.training.distillation else None,
            seed=self.problem.seed,
            checkpoints=run.checkpoints,
            progress=run.observer,
        )
        before = dict(self.problem.graph.named_parameters()) | dict(self.problem.graph.named_buffers())
        state = network.state_dict()
        tensors = {n: state[n].detach().clone() for n in before if n in state}
        chosen = stage.plan()
        ranges = self._ranges()  # reason: only now, as it opens and fixes the gates
        decided = self._repaired(chosen, ranges)
        if stage.start is not None:
            start = self._repaired(stage.start, ranges)
            losses = [self._divergence(plan, ranges) for plan in (decided, start)]
            network.load_state_dict(before, strict=False)
            ranges = self._ranges()
            losses_before = [self._divergence(plan, ranges) for plan in (decided, start)]
            # reason: the weights have been trained for what the gates chose, and were not for either before
            if losses[1] * losses_before[1] < losses[0] * losses_before[0]:
                tensors = tensors if losses[1] < losses_before[1] else {n: before[n].detach().clone() for n in tensors}
                decided = start
        return SearchResult(decided, tensors)

    def _begin(self) -> None:
        """Put the gates at a plan that is within the limits."""
        ranges, even = self._ranges(), _even(self.problem)
        start = self._planned() if even is None else self._repaired(even, ranges, ("weight", "channels"))
        start = self._repaired(start, ranges)
        use_ranges(self.network, start, ranges)
        self.stage.start_at(start, self.batches[0][0])

    def _ranges(self) -> Ranges:
        """Those that suit each bitwidth, with the weights of the moment."""
        with self._seeded():
            return ranges_by_bits(self.network, self.problem.space, self.run.data, self.problem.inputs)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """The same random numbers whenever it is entered: data may be shuffled, and a resumed run has drawn less."""
        with random_state_kept(device_of(self.network)):
            seed_everything(self.problem.seed, 0, 0, 0)
            yield

    def _repaired(
        self, plan: Plan, ranges: Ranges, kinds: tuple[Kind, ...] = ("weight", "activation", "channels")
    ) -> Plan:
        scores = group_importance(self.problem.groups, "l1", dict(self.network.named_parameters()))
        return BudgetRepair(self.problem, Harm(self.network, self.batches, ranges), scores, kinds)(plan)

    def _divergence(self, plan: Plan, ranges: Ranges) -> float:
        return Harm(self.network, self.batches, ranges).divergence(plan)

    def _planned(self) -> Plan:
        """The best plan that is found without training; all gates open where channels alone are searched, or where the
        plan's coarser choices do not meet the limits."""
        problem = self.problem
        if not problem.space.settings.quantise:
            return problem.space.most
        with self._seeded():
            try:
                return two_stage(problem, Run(self.run.data, ranges=self.run.ranges)).plan
            except InfeasibleBudget:
                return problem.space.most


def _even(problem: Problem) -> Plan | None:
    """4 bits everywhere and all channels, where fewer bits of weights and fewer channels can bring that to the budget.

    Plans that are judged without training leave activations 2 bits too often: for 2-bit weights and fewer channels
    training makes up better. On the CIFAR-100 network of the benchmark, ten epochs of it, one run each: at 66 times
    fewer bit operations, 4 bits with 7 % of the MACs pruned ended at 68.4 %, the plan of `two_stage` at 68.1; at 100
    times, 4 bits brought down by weights and channels ended at 67.5, by weights alone at 67.3 (66.7 before joins), a
    search from the plan of `two_stage`, with 2-bit activations, at 66.4, and one from 40 % pruned MACs at 65.0.
    """
    space = problem.space
    if not space.settings.quantise or _EVEN_BITS not in space.settings.candidates:
        return None
    even = space.plan(_EVEN_BITS, _EVEN_BITS)
    fewest = {name: space.values("channels", name)[0] for name in problem.groups}
    least = space.plan(min(space.settings.candidates), _EVEN_BITS, fewest)
    return even if 1 < problem.used(even) <= _MOST_OVER and problem.fits(least) else None


def check_training_data(data: Iterable[Any], inputs: int = 1) -> None:
    """Refuse data that nothing can be learned from. Raises DataError."""
    seen: set[int] = set()
    for index, _, labels in read_batches(data, inputs=inputs, max_batches=8):
        if labels is None:
            raise DataError(f"batch {index} has no labels; a search that trains needs (images, labels)")
        if isinstance(labels, torch.Tensor) and labels.ndim == 2:  # a value for each class
            labels = labels.argmax(1)
        seen |= set(torch.unique(check_labels(labels, None, index)).tolist())
    if len(seen) < 2:
        raise DataError(f"the first batches hold the label {seen} alone; expected several classes, in mixed order")
