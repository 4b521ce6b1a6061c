"""Budget repair: the last moves that bring a plan just under its limits.

In: a searchable graph, a problem, a plan, a few batches. Out: a plan within the limits. Each move (one tensor to the
next bitwidth, one group to the next count) is judged by the loss it costs on those batches per share of the limit it
frees, with the ranges that suit the bits; then what is left over is spent the same way, backwards.
Holds: the result never exceeds a limit; the same inputs give the same moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.data.batches import Tensors, read_batches
from sbs_fx.passes import activation_gates, channel_gates, weight_gates
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.passes.graph import input_count
from sbs_fx.plan import Plan
from sbs_fx.plan.plan import Kind
from sbs_fx.search.problem import Problem
from sbs_fx.search.ranges import Ranges, put_at
from sbs_fx.search.space import Choice
from sbs_fx.training.evaluation import device_of, mode
from sbs_fx.training.task import Outputs, task_of

Batch = tuple[Tensors, Outputs]  # inputs, and what the task keeps of the float model's output

_GATES: Mapping[Kind, Any] = {"weight": weight_gates, "activation": activation_gates, "channels": channel_gates}
_KEPT = 2 << 30  # bytes of values that are kept between judgements
_SLACK = 0.99  # of the budget that should be used at least
_SWAPS = 6
_STEPS = 24  # down, at most, to make room for one move up


@dataclass(frozen=True)
class Move:
    """One decision changed: `value` is bits, or kept coordinates."""

    kind: Kind
    name: str
    value: int | tuple[int, ...]

    def applied(self, plan: Plan) -> Plan:
        return plan.with_value(self.kind, self.name, self.value)


class Harm:
    """How much a move raises the divergence from the float model, on batches that stay the same; batch norms use the
    batch's own statistics, since the running ones belong to other decisions.

    What a move does not reach is not computed again: of the plan that it is judged at, all values are kept, up to
    `_KEPT` bytes.
    """

    def __init__(self, network: fx.GraphModule, batches: Sequence[Batch], ranges: Ranges) -> None:
        self.network, self.batches, self.ranges = network, batches, ranges
        self.task = task_of(network)
        self.norms = {m: m.momentum for m in network.modules() if isinstance(m, BatchNorm)}
        self._judged: dict[tuple[Kind, str, Any, Any], float] = {}
        self._last: tuple[Plan, float] | None = None
        self._values: list[dict[fx.Node, Any]] = []  # of the last plan, by batch
        self._reached: dict[tuple[Kind, str], list[fx.Node]] = {}

    def __call__(self, plan: Plan, move: Move) -> float:
        """Of the move itself, or minus that of the move back if that was judged."""
        before = plan.value(move.kind, move.name)
        before = tuple(before) if move.kind == "channels" else before  # reason: a plan may have any sequence
        key, back = (move.kind, move.name, before, move.value), (move.kind, move.name, move.value, before)
        if key not in self._judged:
            if self._last is None or self._last[0] is not plan:
                self._last = plan, self.divergence(plan)
            self._judged[key] = self.divergence(move.applied(plan), move) - self._last[1]
            self._judged.setdefault(back, -self._judged[key])
        return self._judged[key]

    @torch.no_grad()
    def divergence(self, plan: Plan, move: Move | None = None) -> float:
        """From the float model to the network at a plan, as the task has it (for logits KL in nats an image). `move`:
        from the last plan that was judged without one to this."""
        put_at(self.network, plan, self.ranges)
        partial, total = move is not None and bool(self._values), 0.0
        kept: list[dict[fx.Node, Any]] = []
        with mode(self.network, training=False):
            for module in self.norms:
                module.train()
                module.momentum = 0.0
            for index, (inputs, teacher) in enumerate(self.batches):
                run = fx.Interpreter(self.network, garbage_collect_values=False)
                if partial and move is not None:
                    run.env = dict(self._values[index])
                    for node in self._reached_by(move):
                        run.env[node] = run.run_node(node)
                else:
                    run.run(*inputs)
                    kept.append(run.env)
                total += float(self.task.divergence(run.env[self._output], teacher))
        for module, momentum in self.norms.items():
            module.momentum = momentum
        if move is None:
            sizes = (v.nbytes for env in kept for v in env.values() if isinstance(v, Tensor))
            self._values = kept if sum(sizes) <= _KEPT else []
        return total / len(self.batches)

    @property
    def _output(self) -> fx.Node:
        return next(iter(self.network.graph.find_nodes(op="output")))

    def _reached_by(self, move: Move) -> list[fx.Node]:
        """Nodes whose values a decision can change, in order."""
        key = (move.kind, move.name)
        if key not in self._reached:
            gate, reached = _GATES[move.kind](self.network)[move.name], set[fx.Node]()
            for node in self.network.graph.nodes:
                is_gate = node.op == "call_module" and self.network.get_submodule(str(node.target)) is gate
                if is_gate or any(source in reached for source in node.all_input_nodes):
                    reached.add(node)
            self._reached[key] = [node for node in self.network.graph.nodes if node in reached]
        return self._reached[key]


def judged_on(teacher: fx.GraphModule, data: Iterable[Any], count: int | None = None) -> list[Batch]:
    """The first `count` batches as `Harm` takes them."""
    device = device_of(teacher)
    batches = []
    with mode(teacher, training=False), torch.no_grad():
        for _, inputs, _ in read_batches(data, inputs=input_count(teacher), max_batches=count):
            inputs = tuple(x.to(device) for x in inputs)
            batches.append((inputs, task_of(teacher).reference(teacher(*inputs))))
    return batches


class BudgetRepair:
    """Moves within one problem.

    Args:
        harm: judges moves. scores: group -> importance of its channels, (size,). kinds: of decisions that may change.

    A move is judged once, at the decisions of the moment, and its harm is taken to stay the same afterwards.
    """

    def __init__(
        self,
        problem: Problem,
        harm: Harm,
        scores: Mapping[str, Tensor],
        kinds: Sequence[Kind] = ("weight", "activation", "channels"),
    ) -> None:
        self.problem, self.harm = problem, harm
        self.scores = {name: of_group.tolist() for name, of_group in scores.items()}
        self.choices = [
            choice
            for kind in kinds
            for choice in problem.space.choices
            if choice.kind == kind and len(choice.values) > 1
        ]

    def __call__(self, plan: Plan) -> Plan:
        """The plan, brought just under the limits.

        Raises:
            InfeasibleBudget: the limits are not met with every move down taken.
        """
        used = self.problem.used
        while used(plan) > 1:
            ranked = self._downwards(plan)
            if not ranked:
                raise self.problem.infeasible("budget repair", plan)
            for move in ranked[: max(1, len(ranked) // 10)]:
                plan = move.applied(plan)
                if used(plan) <= 1:
                    break
        plan = self._fill(plan)
        for _ in range(_SWAPS):
            if used(plan) >= _SLACK:
                break
            better = self._swap(plan)
            if better is None:
                break
            plan = self._fill(better)
        return plan

    def _moves(self, plan: Plan, *, down: bool) -> Iterator[Move]:
        for choice in self.choices:
            if choice.kind == "channels":
                yield from self._channel_move(plan, choice, down=down)
                continue
            at = choice.values.index(plan.value(choice.kind, choice.name)) + (-1 if down else 1)
            if 0 <= at < len(choice.values):
                yield Move(choice.kind, choice.name, choice.values[at])

    def _channel_move(self, plan: Plan, choice: Choice, *, down: bool) -> Iterator[Move]:
        kept, scores = plan.kept[choice.name], self.scores[choice.name]
        if down:
            for count in [n for n in choice.values if n < len(kept)][-1:]:
                yield Move(choice.kind, choice.name, _best(kept, scores, count))
        else:
            for count in [n for n in choice.values if n > len(kept)][:1]:
                gone = [i for i in range(len(scores)) if i not in set(kept)]
                more = _best(gone, scores, count - len(kept))
                yield Move(choice.kind, choice.name, tuple(sorted([*kept, *more])))

    def _downwards(self, plan: Plan) -> list[Move]:
        """Moves down that free some of the budget, the least harmful for what it frees first."""
        here, rates = self.problem.used(plan), dict[Move, float]()
        for move in self._moves(plan, down=True):
            freed = here - self.problem.used(move.applied(plan))
            if freed > 0:
                rates[move] = self.harm(plan, move) / freed
        return sorted(rates, key=rates.__getitem__)

    def _fill(self, plan: Plan) -> Plan:
        """Moves up while the limits hold, the most useful for what it takes first."""
        while True:
            here = self.problem.used(plan)
            fitting: list[tuple[float, int, Move]] = []
            for move in self._moves(plan, down=False):
                there = self.problem.used(move.applied(plan))
                if there <= 1:
                    fitting.append((self.harm(plan, move) / max(there - here, 1e-12), len(fitting), move))
            if not fitting:
                return plan
            for _, _, move in sorted(fitting, key=lambda item: item[:2])[: max(1, len(fitting) // 4)]:
                after = move.applied(plan)
                plan = after if self.problem.used(after) <= 1 else plan

    def _swap(self, plan: Plan) -> Plan | None:
        """One move up that does not fit, and small moves down until it does: of those that use more of the budget than
        before, and nearly all of it where some do, the least harmful."""
        here, swaps = self.problem.used(plan), list[tuple[float, float, Plan]]()
        for up in self._moves(plan, down=False):
            after, total = up.applied(plan), self.harm(plan, up)
            for _ in range(_STEPS):
                if (there := self.problem.used(after)) <= 1:
                    if there > here:
                        swaps.append((there, total, after))
                    break
                moves = [m for m in self._moves(after, down=True) if (m.kind, m.name) != (up.kind, up.name)]
                reached = [(self.problem.used(m.applied(after)), m) for m in moves]
                if not reached:
                    break
                fitting = [item for item in reached if item[0] <= 1]
                small = [item for item in reached if item[1].kind == "channels"] or reached
                chosen = (max(fitting, key=lambda i: i[0]) if fitting else min(small, key=lambda i: i[0]))[1]
                total += self.harm(after, chosen)
                after = chosen.applied(after)
        close = min(_SLACK, max((there for there, _, _ in swaps), default=0.0))
        return min((item for item in swaps if item[0] >= close), key=lambda item: item[1], default=(0, 0, None))[2]


def _best(coordinates: Sequence[int], scores: Sequence[float], count: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(coordinates, key=lambda i: -scores[i])[:count]))
