"""`settle`: the last moves that bring a draft of decisions just under its budget.

In: a searchable graph with a draft, a few batches, a budget. Out: decisions that meet the budget. Each move (one tensor
to the next bitwidth, one block of channels) is judged by the loss it costs on those batches per share of the budget it
frees, with the ranges that suit the bits; then what is left over is spent the same way, backwards.
Holds: the result never exceeds the budget; the same inputs give the same moves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.passes import CostModel, activation_gates, apply_bits, channel_gates, weight_gates
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.plan import Budget, Cost
from sbs_fx.plan.errors import InfeasibleBudget
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.search.gate_search import Draft
from sbs_fx.training.evaluation import device_of, logits_of, mode

Batch = tuple[Tensor, Tensor]  # images, and the float model's log-probabilities

Ranges = Mapping[tuple[str, str, int], Tensor]  # ("w" | "a", name, bits) -> the range that suits them

_RANGE_BATCHES = 2
_SLACK = 0.99  # of the budget that should be used at least
_SWAPS = 6
_STEPS = 24  # down, at most, to make room for one move up


@dataclass(frozen=True)
class Move:
    """One decision changed: `kind` is "w", "a" or "c"; `value` is bits, or kept coordinates."""

    kind: str
    name: str
    value: int | tuple[int, ...]

    def applied(self, draft: Draft) -> Draft:
        changed = copy.copy(draft)
        if self.kind == "c":
            changed.kept = {**draft.kept, self.name: list(self.value)}  # type: ignore[arg-type]
        elif self.kind == "w":
            changed.weight_bits = {**draft.weight_bits, self.name: self.value}  # type: ignore[dict-item]
        else:
            changed.activation_bits = {**draft.activation_bits, self.name: self.value}  # type: ignore[dict-item]
        return changed


@dataclass(frozen=True)
class Space:
    """What may still change: names of weights and tensors, and per group its scores and the size of a block."""

    weights: tuple[str, ...]
    activations: tuple[str, ...]
    channels: Mapping[str, tuple[Tensor, int]]
    candidates: tuple[int, ...] = (2, 4, 8)


def gates_by_bits(
    network: fx.GraphModule,
    weights: Sequence[str],
    activations: Sequence[str],
    candidates: Sequence[int],
    data: Iterable[Any],
    inputs: Sequence[Tensor],
    method: str = "mse",
    max_batches: int = _RANGE_BATCHES,
) -> dict[tuple[str, str, int], SuperBitQuantizer]:
    """Copies of these gates, fixed at each of the candidates and calibrated for it, all channels there, by ("w" or "a",
    name, bits); the network's own end at the last of them."""
    for gate in channel_gates(network).values():
        gate.fix(range(gate.size))
    found: dict[tuple[str, str, int], SuperBitQuantizer] = {}
    kinds = (("w", weights, weight_gates(network)), ("a", activations, activation_gates(network)))
    for bits in candidates if weights or activations else ():
        apply_bits(network, dict.fromkeys(weights, bits), dict.fromkeys(activations, bits))
        calibrate(network, data, inputs=inputs, method=method, max_batches=max_batches)
        found |= {(kind, name, bits): copy.deepcopy(gates[name]) for kind, names, gates in kinds for name in names}
    return found


def ranges_by_bits(network: fx.GraphModule, space: Space, data: Iterable[Any], inputs: Sequence[Tensor]) -> Ranges:
    """The range of least error of each gate in `space` at each of its candidates; see `gates_by_bits`."""
    gates = gates_by_bits(network, space.weights, space.activations, space.candidates, data, inputs)
    return {key: gate.range.detach() for key, gate in gates.items()}


@torch.no_grad()
def decide(network: fx.GraphModule, draft: Draft, ranges: Ranges) -> None:
    """Fix the gates of a network at a draft, with the ranges that suit its bits where they are known."""
    weights, activations = weight_gates(network), activation_gates(network)
    apply_bits(
        network,
        {n: b for n, b in draft.weight_bits.items() if n in weights},
        {n: b for n, b in draft.activation_bits.items() if n in activations},
    )
    use_ranges(network, draft, ranges)
    for name, gate in channel_gates(network).items():
        gate.fix(draft.kept[name])


@torch.no_grad()
def use_ranges(network: fx.GraphModule, draft: Draft, ranges: Ranges) -> None:
    """Put into gates the ranges that suit the bits of a draft, where they are known."""
    for kind, gates, table in (
        ("w", weight_gates(network), draft.weight_bits),
        ("a", activation_gates(network), draft.activation_bits),
    ):
        for name, gate in gates.items():
            known = ranges.get((kind, name, table.get(name, 0)))
            if known is not None:
                gate.range.copy_(known)


def settle(
    network: fx.GraphModule,
    cost: CostModel,
    budget: Budget,
    draft: Draft,
    space: Space,
    batches: list[Batch],
    ranges: Ranges | None = None,
) -> Draft:
    """Bring a draft just under its budget.

    The result's `loss` is its divergence from the float model.

    A move is judged once, at the decisions of the moment, and its harm is taken to stay the same afterwards.

    Raises:
        InfeasibleBudget: the budget is not met with every move down taken.
    """
    load, harm = _Load(cost, budget), _Harm(network, batches, ranges or {})
    while load(draft) > 1:
        ranked = _downwards(draft, space, load, harm)
        if not ranked:
            least = budget.shares(load.cost_of(draft))
            raise InfeasibleBudget.of(budget.limits, least, "this search reaches", "more decisions")
        for move in ranked[: max(1, len(ranked) // 10)]:
            draft = move.applied(draft)
            if load(draft) <= 1:
                break
    draft = _fill(draft, space, load, harm)
    for _ in range(_SWAPS):
        if load(draft) >= _SLACK:
            break
        better = _swap(draft, space, load, harm)
        if better is None:
            break
        draft = _fill(better, space, load, harm)
    draft.loss = harm.divergence(draft)
    return draft


def divergence_of(network: fx.GraphModule, draft: Draft, batches: list[Batch], ranges: Ranges) -> float:
    """KL(float model || network at a draft) on these batches, batch norms using the batch's own statistics."""
    return _Harm(network, batches, ranges).divergence(draft)


class _Load:
    """Cost over limit, the largest over all measures: at most 1 is within the budget."""

    def __init__(self, cost: CostModel, budget: Budget) -> None:
        self.cost, self.budget = cost, budget

    def cost_of(self, draft: Draft) -> Cost:
        return self.cost.evaluate(draft.kept, draft.weight_bits, draft.activation_bits)

    def __call__(self, draft: Draft) -> float:
        return self.budget.used_by(self.cost_of(draft))


class _Harm:
    """How much a move raises the divergence from the float model, on batches that stay the same; batch norms use the
    batch's own statistics, since the running ones belong to other decisions."""

    def __init__(self, network: fx.GraphModule, batches: list[Batch], ranges: Ranges) -> None:
        self.network, self.batches, self.ranges = network, batches, ranges
        self.norms = {m: m.momentum for m in network.modules() if isinstance(m, BatchNorm)}
        self._known: dict[tuple[str, str, Any, Any], float] = {}
        self._last: tuple[Draft, float] | None = None

    def __call__(self, draft: Draft, move: Move) -> float:
        """Of the move itself, or minus that of the move back if that is what is known."""
        before = _value(draft, move.kind, move.name)
        key, back = (move.kind, move.name, before, move.value), (move.kind, move.name, move.value, before)
        if key not in self._known:
            if self._last is None or self._last[0] is not draft:
                self._last = draft, self.divergence(draft)
            self._known[key] = self.divergence(move.applied(draft)) - self._last[1]
            self._known.setdefault(back, -self._known[key])
        return self._known[key]

    @torch.no_grad()
    def divergence(self, draft: Draft) -> float:
        decide(self.network, draft, self.ranges)
        total = 0.0
        with mode(self.network, training=False):
            for module in self.norms:
                module.train()
                module.momentum = 0.0
            for images, wanted in self.batches:
                found = F.log_softmax(logits_of(self.network(images)).float(), dim=1)
                total += float(F.kl_div(found, wanted, reduction="batchmean", log_target=True))
        for module, momentum in self.norms.items():
            module.momentum = momentum
        return total / len(self.batches)


def _value(draft: Draft, kind: str, name: str) -> int | tuple[int, ...]:
    """What a draft has decided in the place of a move."""
    if kind == "c":
        return tuple(draft.kept[name])
    return (draft.weight_bits if kind == "w" else draft.activation_bits)[name]


def judged_on(teacher: nn.Module, data: Iterable[tuple[int, tuple[Tensor, ...], Tensor | None]]) -> list[Batch]:
    """Batches as `settle` takes them."""
    device = device_of(teacher)
    found = []
    with mode(teacher, training=False), torch.no_grad():
        for _, (images,), _ in data:
            images = images.to(device)
            found.append((images, F.log_softmax(logits_of(teacher(images)).float(), dim=1)))
    return found


def _moves(draft: Draft, space: Space, *, down: bool) -> Iterator[Move]:
    for kind, names, table in (
        ("w", space.weights, draft.weight_bits),
        ("a", space.activations, draft.activation_bits),
    ):
        for name in names:
            at = space.candidates.index(table[name]) + (-1 if down else 1)
            if 0 <= at < len(space.candidates):
                yield Move(kind, name, space.candidates[at])
    for name, (scores, block) in space.channels.items():
        kept = draft.kept[name]
        count = len(kept) - block if down else min(len(scores), len(kept) + block)
        if down and count >= 1:
            yield Move("c", name, _best(kept, scores, count))
        elif not down and count > len(kept):
            gone = [i for i in range(len(scores)) if i not in set(kept)]
            yield Move("c", name, tuple(sorted([*kept, *_best(gone, scores, count - len(kept))])))


def _downwards(draft: Draft, space: Space, load: _Load, harm: _Harm) -> list[Move]:
    """Moves down that free some of the budget, the least harmful for what it frees first."""
    here, rates = load(draft), dict[Move, float]()
    for move in _moves(draft, space, down=True):
        freed = here - load(move.applied(draft))
        if freed > 0:
            rates[move] = harm(draft, move) / freed
    return sorted(rates, key=rates.__getitem__)


def _best(coordinates: list[int], scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(coordinates, key=lambda i: -float(scores[i]))[:count]))


def _fill(draft: Draft, space: Space, load: _Load, harm: _Harm) -> Draft:
    """Moves up while the budget holds, the most useful for what it takes first."""
    while True:
        here = load(draft)
        found: list[tuple[float, int, Move]] = []
        for move in _moves(draft, space, down=False):
            there = load(move.applied(draft))
            if there <= 1:
                found.append((harm(draft, move) / max(there - here, 1e-12), len(found), move))
        if not found:
            return draft
        for _, _, move in sorted(found, key=lambda item: item[:2])[: max(1, len(found) // 4)]:
            after = move.applied(draft)
            draft = after if load(after) <= 1 else draft


def _swap(draft: Draft, space: Space, load: _Load, harm: _Harm) -> Draft | None:
    """One move up that does not fit, and small moves down until it does: of those that use more of the budget than
    before, and nearly all of it where some do, the least harmful."""
    here, found = load(draft), list[tuple[float, float, Draft]]()
    for up in _moves(draft, space, down=False):
        after, total = up.applied(draft), harm(draft, up)
        for _ in range(_STEPS):
            if (there := load(after)) <= 1:
                if there > here:
                    found.append((there, total, after))
                break
            moves = [m for m in _moves(after, space, down=True) if (m.kind, m.name) != (up.kind, up.name)]
            reached = [(load(m.applied(after)), m) for m in moves]
            if not reached:
                break
            fitting = [item for item in reached if item[0] <= 1]
            small = [item for item in reached if item[1].kind == "c"] or reached
            chosen = (max(fitting, key=lambda i: i[0]) if fitting else min(small, key=lambda i: i[0]))[1]
            total += harm(after, chosen)
            after = chosen.applied(after)
    close = min(_SLACK, max((there for there, _, _ in found), default=0.0))
    return min((item for item in found if item[0] >= close), key=lambda item: item[1], default=(0, 0, None))[2]
