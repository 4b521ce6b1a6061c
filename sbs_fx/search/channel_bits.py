"""Bits by output channel: what channels weigh, which of them a choice of bits drops, and how it stays within limits.

In: a problem. Out: bits per weight, one number for each of its output channels, and the plan that they amount to.
Holds: a channel group loses a coordinate exactly where every layer that makes it gives it 0 bits (and one coordinate
stays); what is clipped or filled never exceeds a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sbs_fx.passes import insert_gates
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.channels.inference import operand
from sbs_fx.passes.folding import TRANSPOSED
from sbs_fx.passes.graph import channel_rows
from sbs_fx.passes.static.fold import Constants, batch_norm_folds
from sbs_fx.plan import Plan
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.plan import Bits
from sbs_fx.search.problem import Problem

BitsByChannel = dict[str, list[int]]


class ChannelBits:
    """The output channels of one graph's weights, and the prices of bits for them.

    Args:
        activation_bits: of every tensor, fixed beforehand.
        least_share: of a layer's channels that keep at least the fewest bits; constraints may ask for more.

    Attributes:
        names: weights that are decided on, in graph order: those whose bits, or else whose channels, no constraint
            fixes. fixed: bits of the others.
        levels: weight name -> what a channel of it may have, ascending; 0 only where channels may go.
        importance: weight name -> L2 norm of each channel, times the scale of the batch norm that it is folded with.
        least: weight name -> the fewest bits of each channel.
    """

    def __init__(self, problem: Problem, activation_bits: Mapping[str, int], least_share: float) -> None:
        self.problem, self.activation_bits, space = problem, dict(activation_bits), problem.space
        self.importance = _importance(problem)
        bound = {n for scope in space.scopes if scope.constraint.weight_bits is not None for n in scope.weights}
        fixed = space.fixed("weight")
        # reason: of one candidate the bits are no choice, but 0 is
        self.fixed = {n: b for n, b in fixed.items() if n in bound or b == FLOAT_BITS or not space.settings.prune}
        self.names = [n for n in problem.cost.weights if n not in self.fixed]
        self.levels: dict[str, tuple[int, ...]] = {}
        self.least: BitsByChannel = {}
        for name in self.names:
            scores = self.importance[name]
            bits = tuple(b for b in space.values("weight", name) if b != FLOAT_BITS)
            stay = max(1, round(max(least_share, space.least_share(name)) * len(scores)))
            chosen = set(scores.argsort(descending=True, stable=True)[:stay].tolist())
            self.least[name] = [bits[0] if i in chosen else 0 for i in range(len(scores))]
            self.levels[name] = bits if stay == len(scores) else (0, *bits)
        self._order = {n: s.argsort(stable=True).tolist() for n, s in self.importance.items()}

    # -- what a plan amounts to ----------------------------------------------------------------------------------------

    @cached_property
    def _makers(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Group -> the weights that make its channels, and the coordinate that each of their channels makes or -1; no
        entry where a layer that is not decided on is one of them."""
        makers_of: dict[str, list[tuple[str, Tensor]]] = {}
        for group in self.problem.groups.values():
            if not self.problem.space.may_be_pruned(group.name):
                continue
            makers = [
                (n, coordinates(dim, group.axis))
                for n, dim in self.problem.groups.outputs.items()
                if group.axis in d.axes(dim)
            ]
            if makers and all(n in self.importance and n not in self.fixed for n, _ in makers):
                makers_of[group.name] = makers
        return makers_of

    def kept(self, bits: BitsByChannel) -> dict[str, tuple[int, ...]]:
        """Group -> coordinates that stay."""
        result = {g.name: tuple(range(g.size)) for g in self.problem.groups.values()}
        for name, makers in self._makers.items():
            alive = torch.zeros(self.problem.groups[name].size, dtype=torch.bool)
            for weight, places in makers:
                made = torch.tensor(bits[weight]) > 0
                alive[places[made & (places >= 0)]] = True
            result[name] = tuple(alive.nonzero().flatten().tolist()) or (0,)
        return result

    def plan(self, bits: BitsByChannel) -> Plan:
        """What the bits amount to, one number where all channels of a layer agree."""
        chosen: dict[str, Bits] = dict(self.fixed)
        for name, each in bits.items():
            chosen[name] = each[0] if len(set(each)) == 1 and each[0] else tuple(each)
        return Plan(self.kept(bits), {name: chosen[name] for name in self.problem.cost.weights}, self.activation_bits)

    def used(self, bits: BitsByChannel) -> float:
        """Price over limit, the largest of all measures: at most 1 is within the limits."""
        return self.problem.used(self.plan(bits))

    # -- staying within the limits -------------------------------------------------------------------------------------

    def clip(self, plan: BitsByChannel, name: str) -> list[int]:
        """The bits of one layer, lowered until all are within the limits.

        The least important channels go first: all to the second most bits at most, then to the third, and in the end
        to `least`. With `least` in this layer, all must be within the limits.
        """
        asked, order = plan[name], self._order[name]
        ceilings: list[int | None] = [*sorted(set(self.levels[name]) - {0}, reverse=True)[1:], None]

        def lowered(steps: int) -> list[int]:
            result = list(asked)
            for turn, most in enumerate(ceilings):
                for channel in order[: max(0, steps - turn * len(order))]:
                    result[channel] = min(result[channel], self.least[name][channel] if most is None else most)
            return result

        if self.used(plan) <= 1:
            return asked
        low, high = 1, len(ceilings) * len(order)
        while low < high:
            middle = (low + high) // 2
            if self.used({**plan, name: lowered(middle)}) <= 1:
                high = middle
            else:
                low = middle + 1
        return lowered(low)

    def fill(self, plan: BitsByChannel) -> BitsByChannel:
        """Bits within the limits, raised while they stay there: first all channels of the fewest bits to the next, then
        those of the next, the most important of their layers first; what has 0 bits keeps them."""
        ranked = sorted(
            (-place / len(self._order[name]), name, channel)
            for name in self.names
            for place, channel in enumerate(self._order[name])
        )
        following = {name: _successors(self.levels[name]) for name in self.names}
        starts = sorted({bits for table in following.values() for bits in table})

        def more(steps: int) -> BitsByChannel:
            result = {name: list(plan[name]) for name in self.names}
            for start in starts:
                turn = [
                    (name, channel)
                    for _, name, channel in ranked
                    if result[name][channel] == start and start in following[name]
                ]
                for name, channel in turn[:steps]:
                    result[name][channel] = following[name][start]
                steps = max(0, steps - len(turn))
            return result

        low, high = 0, len(starts) * len(ranked)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.used(more(middle)) <= 1 else (low, middle - 1)
        return more(low)


def _successors(levels: Sequence[int]) -> dict[int, int]:
    """The next bits after each but 0 and the last."""
    bits = [level for level in levels if level]
    return dict(zip(bits, bits[1:], strict=False))


def coordinates(dim: Dim, axis: Axis) -> Tensor:
    """Which coordinate of an axis each position of a type belongs to, int64 (size,); -1 where to none."""
    dim = d.resolve(dim)
    if isinstance(dim, Axis):
        return torch.arange(dim.size) if dim == axis else torch.full((dim.size,), -1)
    if isinstance(dim, d.Sum):
        return torch.cat([coordinates(item, axis) for item in dim.items])
    result = torch.full((1,), -1)
    for part in dim.factors if isinstance(dim, d.Prod) else ():
        inner = coordinates(part, axis)
        result = torch.maximum(result[:, None], inner[None, :]).flatten()
    return result if isinstance(dim, d.Prod) else torch.full((dim.size,), -1)


def _importance(problem: Problem) -> dict[str, Tensor]:
    constants = Constants(insert_gates(problem.graph, problem.groups, channels=False))
    nodes = {node.name: node for node in constants.module.graph.nodes}
    factors = {layer.name: fold.factor for layer, fold in batch_norm_folds(constants).items()}
    importance = {}
    for name, places in problem.cost.weights.items():
        layer, path = places[0]
        weight = constants.value(operand(nodes[layer.name], path)).detach().double()
        norms = channel_rows(weight, layer.outputs % weight.ndim).norm(dim=1)
        if layer.name in factors and nodes[layer.name].target not in TRANSPOSED:
            norms = norms * factors[layer.name].abs().to(norms.device)
        importance[name] = torch.nan_to_num(norms).cpu()
    return importance
