"""A bitwidth per kernel: what kernels weigh, which channels a plan of them drops, and how a plan stays in a budget.

In: a traced graph's analyses. Out: bits per weight, one number for each of its output channels, and the policy that
they amount to. Holds: a channel group loses a coordinate exactly where every layer that makes it gives it 0 bits (and
one coordinate stays); what is clipped or filled never exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, fx

from sbs_fx.passes import ChannelGroups, CostModel, insert_gates
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.channels.inference import operand
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.passes.static.fold import TRANSPOSED, Constants, batch_norm_folds
from sbs_fx.plan import Budget, Cost
from sbs_fx.search.uniform import end_bits

KernelBits = dict[str, list[int]]


class Kernels:
    """The kernels (output channels of weights) of one graph, and the costs of bits for them.

    Args:
        activation_bits: of every tensor, fixed beforehand.
        least_share: of a layer's kernels that keep at least 2 bits.

    Attributes:
        names: weights that are decided on, in graph order; the first and the last layer are not among them.
        importance: weight name -> L2 norm of each kernel, times the scale of the batch norm that it is folded with.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        groups: ChannelGroups,
        cost: CostModel,
        budget: Budget,
        activation_bits: Mapping[str, int],
        *,
        least_share: float,
        minor_groups: bool = False,
    ) -> None:
        self.groups, self.cost, self.budget = groups, cost, budget
        self.activation_bits = dict(activation_bits)
        self.fixed = end_bits(cost).weights
        self.outputs = {n: dims[out] for layer in cost.layers for n, (dims, out) in layer.weights.items()}
        self.importance = _importance(graph, groups, cost)
        self.names = [n for n in cost.weights if n not in self.fixed]
        self.least = {}
        for name in self.names:
            scores = self.importance[name]
            stay = max(1, round(least_share * len(scores)))
            chosen = set(scores.argsort(descending=True, stable=True)[:stay].tolist())
            self.least[name] = [2 if i in chosen else 0 for i in range(len(scores))]
        self._order = {n: s.argsort(stable=True).tolist() for n, s in self.importance.items()}
        self._prunable = [g for g in groups.values() if g.primary or minor_groups]

    # -- what a plan amounts to ----------------------------------------------------------------------------------------

    @cached_property
    def _makers(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Group -> the weights that make its channels, and the coordinate that each of their kernels makes or -1; no
        entry where a layer that is not decided on is one of them."""
        found: dict[str, list[tuple[str, Tensor]]] = {}
        for group in self._prunable:
            makers = [
                (n, _coordinates(dim, group.axis)) for n, dim in self.outputs.items() if group.axis in d.axes(dim)
            ]
            if makers and all(n in self.importance and n not in self.fixed for n, _ in makers):
                found[group.name] = makers
        return found

    def kept(self, bits: KernelBits) -> dict[str, list[int]]:
        """Group -> coordinates that stay."""
        result = {g.name: list(range(g.size)) for g in self.groups.values()}
        for name, makers in self._makers.items():
            alive = torch.zeros(self.groups[name].size, dtype=torch.bool)
            for weight, places in makers:
                made = torch.tensor(bits[weight]) > 0
                alive[places[made & (places >= 0)]] = True
            result[name] = alive.nonzero().flatten().tolist() or [0]
        return result

    def weight_bits(self, bits: KernelBits) -> dict[str, int | list[int]]:
        """As a policy has them: one number where all kernels of a layer agree."""
        result: dict[str, int | list[int]] = dict(self.fixed)
        for name, each in bits.items():
            result[name] = each[0] if len(set(each)) == 1 and each[0] else each
        return {name: result[name] for name in self.cost.weights}

    def cost_of(self, bits: KernelBits) -> Cost:
        kept = self.kept(bits)
        index = Slices(self.groups, kept)
        left: dict[str, int | list[int]] = {}
        for name, each in self.weight_bits(bits).items():
            chosen = each if isinstance(each, int) else [each[i] for i in index.index(self.outputs[name]).tolist()]
            left[name] = chosen
        return self.cost.evaluate(kept, left, self.activation_bits)

    def load(self, bits: KernelBits) -> float:
        """Cost over limit, the largest over all measures: at most 1 is within the budget."""
        cost = self.cost_of(bits)
        load = self.budget.used_by(cost)
        # reason: a share just above its limit may be divided down to 1
        return load if self.budget.is_satisfied_by(cost) else max(load, 1 + 1e-12)

    # -- staying within the budget -------------------------------------------------------------------------------------

    def clip(self, plan: KernelBits, name: str) -> list[int]:
        """The bits of one layer of a plan, lowered until the plan is within the budget.

        The least important kernels go first: all to at most 4 bits, then to at most 2, then to `least`. The plan must
        be within the budget with `least` in this layer.
        """
        wanted, order = plan[name], self._order[name]

        def lowered(steps: int) -> list[int]:
            result = list(wanted)
            for turn, most in enumerate((4, 2, None)):
                for kernel in order[: max(0, steps - turn * len(order))]:
                    result[kernel] = min(result[kernel], self.least[name][kernel] if most is None else most)
            return result

        if self.load(plan) <= 1:
            return wanted
        low, high = 1, 3 * len(order)
        while low < high:
            middle = (low + high) // 2
            if self.load({**plan, name: lowered(middle)}) <= 1:
                high = middle
            else:
                low = middle + 1
        return lowered(low)

    def fill(self, plan: KernelBits) -> KernelBits:
        """A plan within the budget with bits raised while it stays there: first all kernels of 2 bits to 4, then those
        of 4 to 8, the most important of their layers first; what has 0 bits keeps them."""
        ranked = sorted(
            (-place / len(self._order[name]), name, kernel)
            for name in self.names
            for place, kernel in enumerate(self._order[name])
        )
        raised = {2: 4, 4: 8}

        def more(steps: int) -> KernelBits:
            result = {name: list(plan[name]) for name in self.names}
            for start in raised:
                turn = [k for k in ranked if result[k[1]][k[2]] == start]
                for _, name, kernel in turn[:steps]:
                    result[name][kernel] = raised[start]
                steps = max(0, steps - len(turn))
            return result

        low, high = 0, 2 * len(ranked)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.load(more(middle)) <= 1 else (low, middle - 1)
        return more(low)


def _coordinates(dim: Dim, axis: Axis) -> Tensor:
    """Which coordinate of an axis each position of a type belongs to, int64 (size,); -1 where to none."""
    dim = d.resolve(dim)
    if isinstance(dim, Axis):
        return torch.arange(dim.size) if dim == axis else torch.full((dim.size,), -1)
    if isinstance(dim, d.Sum):
        return torch.cat([_coordinates(item, axis) for item in dim.items])
    result = torch.full((1,), -1)
    for part in dim.factors if isinstance(dim, d.Prod) else ():
        found = _coordinates(part, axis)
        result = torch.maximum(result[:, None], found[None, :]).flatten()
    return result if isinstance(dim, d.Prod) else torch.full((dim.size,), -1)


def _importance(graph: fx.GraphModule, groups: ChannelGroups, cost: CostModel) -> dict[str, Tensor]:
    constants = Constants(insert_gates(graph, groups, channels=False))
    nodes = {node.name: node for node in constants.module.graph.nodes}
    factors = {layer.name: fold.factor for layer, fold in batch_norm_folds(constants).items()}
    found = {}
    for name, places in cost.weights.items():
        layer, path = places[0]
        weight = constants.value(operand(nodes[layer.name], path)).detach().double()
        norms = weight.movedim(layer.outputs % weight.ndim, 0).flatten(1).norm(dim=1)
        if layer.name in factors and nodes[layer.name].target not in TRANSPOSED:
            norms = norms * factors[layer.name].abs().to(norms.device)
        found[name] = torch.nan_to_num(norms).cpu()
    return found
