"""`bayesian_bits`: the same chain of offsets with gates that are drawn at random, a published baseline.

In and out: as `sbs`. Source: Bayesian Bits (arXiv 2005.07093): the gates of z_2 + g_4(eps_4 + g_8 eps_8) are
hard-concrete variables (`hard_concrete`), drawn anew at each step; loss = CE + mu R, where R adds up, for each operand
of each layer, (share of the MACs) * sum_b b prod_{j <= b} q(g_j > 0).
Ours are: mu, which is controlled so that a budget is met (as in `GateSearch`) unless `Search.lam` gives it; the shares,
which are of all MACs (there: of the largest layer's, a constant factor in mu); the gate of 2 bits, which there prunes
an output channel of one weight and here a block of a channel group with all its members, so that a value between 0 and
1 multiplies each of them, and counts in R on both sides of a layer; and the last moves to the budget (`BudgetRepair`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sbs_fx.passes.channels.dims import Axis
from sbs_fx.quantizer.channel_gate import ChannelGate
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.search.baselines.hard_concrete import HardConcreteChannelGate, HardConcreteQuantizer
from sbs_fx.search.gate_search import GateSearch, Search
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.search.registry import Run, method
from sbs_fx.search.sbs import GateTraining
from sbs_fx.training import Training

_TRAVEL = 10.0  # how far a phi can move in all; a gate closes at -0.9


class BayesianSearch(GateSearch):
    """Hard-concrete gates and weights trained together. Arguments are those of `GateSearch`; the network's gates are
    replaced. Gates of weights and of activations learn in the same steps, with Adam.
    """

    method: ClassVar[str] = "bayesian_bits"
    starts_warm: ClassVar[bool] = False

    def __init__(
        self,
        network: fx.GraphModule,
        problem: Problem,
        search: Search,
        **options: Any,
    ) -> None:
        _replace_gates(network)
        super().__init__(network, problem, search, **options)
        self.drawn = {n: g for n, g in self.channels.items() if isinstance(g, HardConcreteChannelGate)}
        for gate in self.drawn.values():
            gate.search()

    def optimizers(self, settings: Training) -> list[torch.optim.Optimizer]:
        gates = [*self.searched["weight"].values(), *self.searched["activation"].values(), *self.drawn.values()]
        phis = [g.phi for g in gates if isinstance(g, (HardConcreteQuantizer, HardConcreteChannelGate))]
        lr = self.search.threshold_lr or _TRAVEL / (0.5 * self.steps)  # 0.5: the mean of a cosine
        return [torch.optim.Adam(phis, lr=lr, betas=(0.9, 0.99), eps=1e-12)] if phis else []

    def before_step(self, step: int, done: float) -> None:
        self.done = done

    def before_update(self, step: int) -> None:
        """Nothing: all gates learn in each step."""

    def after_step(self, step: int) -> None:
        for gate in self.drawn.values():
            gate.decide()
        super().after_step(step)

    def _vote(self) -> None:
        """Nothing: the gates count as they are at the end, as in the paper."""

    def penalty(self) -> Tensor | None:
        """mu R. Each limited measure adds its multiplier to mu; R is the same for all, as the paper has but one.

        A gate that is always 0 gets no gradient from the loss, so a controlled mu is 0 while cost is below its path.
        """
        mu = 0.0
        with torch.no_grad():
            for measure, excess in self._excess().items():
                self.last[measure] = float(excess)
                self.first.setdefault(measure, self.last[measure])
                if self.search.lam is not None or self.last[measure] > self.path(measure):
                    mu += self.multipliers[measure]
        return mu * self.regulariser()

    def regulariser(self) -> Tensor:
        """R, a scalar: see the top of this file."""
        sizes: dict[Axis, Tensor] = {self.problem.groups[n].axis: g.expected_size() for n, g in self.drawn.items()}
        bits = {("weight", n): _weighted_bits(g) for n, g in self.weights.items()}
        bits |= {("activation", n): _weighted_bits(g) for n, g in self.activations.items()}
        total = torch.zeros(())
        for layer in self.problem.cost.layers:
            for product in layer.products:
                share = product.macs(lambda axis: sizes.get(axis, axis.size)) / self.problem.cost.reference.macs
                for operand in (product.left, product.right):
                    total = total + share * bits[operand] if operand in bits else total
        return total

    def expectations(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        _, weight_bits, activation_bits = super().expectations()
        return {n: g.expected_size() for n, g in self.drawn.items()}, weight_bits, activation_bits


def _weighted_bits(gate: SuperBitQuantizer) -> Tensor:
    return gate.weighted_bits() if isinstance(gate, HardConcreteQuantizer) else gate.expected_bits()


def _replace_gates(network: fx.GraphModule) -> None:
    """Hard-concrete gates of the same options in the places of all gates."""
    for target, old in list(network.named_modules()):
        new: nn.Module
        if isinstance(old, ChannelGate):
            new = HardConcreteChannelGate(old.size, old.block).to(old.mask.device)
        elif isinstance(old, SuperBitQuantizer):
            new = HardConcreteQuantizer(**old.options).to(old.range.device)
        else:
            continue
        network.set_submodule(target, new)


@method(
    "bayesian_bits",
    help="hard-concrete gates over the same chain of offsets, a published baseline",
    needs="labels",
    trains=True,
    settings=Search,
    section="search",
    resumes=True,
)
def bayesian_bits(problem: Problem, run: Run) -> SearchResult:
    """Search by hard-concrete gates. Errors are those of `sbs`; `Search.lam` is mu, and `Search.threshold_lr` the rate
    of phi.

    >>> from sbs_fx.search.registry import METHODS
    >>> METHODS["bayesian_bits"].search is bayesian_bits, METHODS["bayesian_bits"].trains
    (True, True)
    """
    return GateTraining(problem, run, BayesianSearch).result()
