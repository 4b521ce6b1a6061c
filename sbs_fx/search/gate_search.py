"""`GateSearch`: a training stage in which gates choose bits and channels under a budget.

In: a searchable graph (`insert_gates`), a problem. Out: the same graph, trained, and the plan that its gates
decided on. Source: Single-path Bit Sharing (arXiv 2101.04935). The penalty is sum_m lambda_m log(R_m / B_m) with R_m
the price at the gates of the moment and B_m the limit of measure m.
Ours are: thresholds may start at a plan (`start_at`) and then move within the budget, the part of their gradients that
would change the cost being projected out; from open gates lambda is found by multiplicative dual ascent, unless one is
given; gradients are brought to a mean square of 1 per kind of gate, since their size is that of the loss; what the
gates chose most often in the last third is the draft.
Holds: gates are decided without random numbers, and the same way in all processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from sbs_fx.data.batches import Tensors
from sbs_fx.passes import activation_gates, channel_gates, weight_gates
from sbs_fx.passes.channels.importance import group_importance
from sbs_fx.plan import Plan, Settings
from sbs_fx.plan.plan import Kind
from sbs_fx.quantizer.channel_gate import ChannelGate
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.search.problem import Problem
from sbs_fx.training import Training, TrainingStage

_FIRST_MULTIPLIER = 0.1
_BOUNDS = (1e-4, 1e3)
_UNKNOWN_STEPS = 1000  # of data without a length
# How far steps of the mean size move a threshold in all: the norms of gates are about 0.29. From a warm start they need
# not go far, and steps are to be small beside the margin, or noise decides.
_TRAVEL, _WARM_TRAVEL = 1.0, 0.25
_RETURN = 10.0  # times log(cost / path): by how many mean gradients thresholds are brought back
_LARGEST = 10.0  # of a threshold's gradient, in mean sizes
_MARGIN = 0.05  # between a gate's norm and its threshold at the start; a fifth of the norms of evenly spread residuals
_VOTING = 2 / 3  # share of the search after which decisions count


class Search(Settings):
    """Settings of a search by gates.

    Attributes:
        epochs, lr: of the search; `lr` is the weights' rate, which stays the same after a rise: fine-tuning brings it
            down.
        lam: a fixed multiplier, as in the paper; None: found so that the budget is met.
        threshold_lr: highest rate of the gates' thresholds; None: so that they can travel the whole way.
        warm_start: begin at decisions that meet the budget: at 4 bits, brought down by bits of weights and channels,
            where that is at most half, else at what `two_stage` finds (where channels alone are searched, at measured
            moves); False: all gates open, as in the paper.
        reach: share of the search after which the cost should be at the budget, where it begins above it.
        stiffness: how fast multipliers answer, where there are any: their logarithm grows by this times log(cost /
            path) in a whole search over which that stays the same.
        repair_batches: batches on which the last moves to the budget are judged.

    >>> sbs_fx.Config(search=Search(epochs=3)).methods["search"].epochs
    3
    """

    epochs: int = Field(default=4, ge=1)
    lr: float = Field(default=1e-2, gt=0, allow_inf_nan=False)
    lam: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    threshold_lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    warm_start: bool = True
    reach: float = Field(default=0.6, gt=0, le=1)
    stiffness: float = Field(default=20.0, gt=0)
    repair_batches: int = Field(default=2, ge=1)


_STATE = ("multipliers", "first", "last", "squares", "mask_votes")


class GateSearch(TrainingStage):
    """Gates and weights trained together.

    Args:
        network: from `insert_gates` on the problem's graph, calibrated; channel gates only if they are to decide.
        fixed: plan whose bits are not searched; None: what the problem's space leaves no choice for.
        steps: of the whole stage; None if unknown.
    """

    method: ClassVar[str] = "sbs"
    starts_warm: ClassVar[bool] = True

    def __init__(
        self,
        network: fx.GraphModule,
        problem: Problem,
        search: Search,
        *,
        fixed: Plan | None = None,
        steps: int | None = None,
        name: str = "search",
    ) -> None:
        super().__init__(network, name)
        self.problem, self.search = problem, search
        self.steps = steps or _UNKNOWN_STEPS
        self.weights, self.activations = weight_gates(network), activation_gates(network)
        self.channels: dict[str, ChannelGate] = {
            n: g for n, g in channel_gates(network).items() if problem.space.may_be_pruned(n)
        }
        self.parameters = {
            n: p for n, p in network.named_parameters() if not n.startswith(("weight_gates.", "activation_gates."))
        }
        fixed = fixed or Plan({}, problem.space.fixed("weight"), problem.space.fixed("activation"))
        self.searched: dict[Kind, dict[str, SuperBitQuantizer]] = {}
        gates: tuple[tuple[Kind, Mapping[str, SuperBitQuantizer], Mapping[str, Any]], ...] = (
            ("weight", self.weights, fixed.weight_bits),
            ("activation", self.activations, fixed.activation_bits),
        )
        for kind, of_kind, bits in gates:
            self.searched[kind] = {n: g for n, g in of_kind.items() if n not in bits}
            for name_, gate in of_kind.items():
                if name_ in bits:
                    gate.fix(bits[name_])
                else:
                    gate.search()
        self.multipliers = dict.fromkeys(problem.limits, _FIRST_MULTIPLIER if search.lam is None else search.lam)
        self.first: dict[str, float] = {}  # log of cost over limit, at the first step
        self.last: dict[str, float] = {}  # the same, at the last one
        self.squares: dict[str, float] = {}  # kind of gate -> mean square of the thresholds' gradients, a running mean
        self.votes: dict[Kind, dict[str, dict[int, int]]] = {"weight": {}, "activation": {}}
        self.mask_votes: dict[str, list[int]] = {}
        self.start: Plan | None = None
        self.slopes: dict[str, dict[Tensor, Tensor]] = {}  # measure -> threshold -> d log(cost) by it, of this step
        self.done = 0.0

    @property
    def is_warm(self) -> bool:
        """Whether the search is to begin at measured decisions; not with the paper's fixed multiplier."""
        return self.starts_warm and self.search.warm_start and self.search.lam is None

    @torch.no_grad()
    def start_at(self, plan: Plan, inputs: Tensors) -> None:
        """Put every threshold beside its gate's norm on these inputs, on the side that the plan asks for; of a group's
        blocks the largest stay, as many as the plan keeps."""
        self.start = plan
        self._decide_channels()
        for gates in self.searched.values():
            for gate in gates.values():
                gate.search()
                gate.frozen = False
        for name, channel in self.channels.items():
            norms = channel.block_norms.sort(descending=True).values
            count = max(1, round(len(plan.kept[name]) / channel.block))
            following = norms[count] if count < len(norms) else 0.5 * norms[-1]
            channel.threshold.copy_((norms[count - 1] + following) / 2)
        self.network(*inputs)
        for kind, of_kind in self.searched.items():
            for name, gate in of_kind.items():
                bits = plan.value(kind, name)
                opened = torch.tensor([b <= bits for b in gate.candidates[1:]], device=gate.norms.device)
                gate.threshold.copy_(torch.where(opened, gate.norms - _MARGIN, gate.norms + _MARGIN))

    # -- hooks -------------------------------------------------------------------------------------------------------

    def optimizers(self, settings: Training) -> list[torch.optim.Optimizer]:
        thresholds = [gate.threshold for gates in self._kinds().values() for gate in gates.values()]
        travel = _WARM_TRAVEL if self.is_warm else _TRAVEL
        lr = self.search.threshold_lr or travel / (0.5 * self.steps)  # reason: 0.5 is the mean of a cosine
        # reason: steps of momentum add up to ten times the rate
        return [torch.optim.SGD(thresholds, lr=0.1 * lr, momentum=0.9)] if thresholds else []

    def _kinds(self) -> dict[str, dict[str, Any]]:
        return {"weight": self.searched["weight"], "activation": self.searched["activation"], "channels": self.channels}

    def before_step(self, step: int, done: float) -> None:
        """Weight gates and activation gates take turns, as in the paper; those whose turn it is not are frozen."""
        self.done = done
        for turn, gates in enumerate(self.searched.values()):
            for quantiser in gates.values():
                quantiser.frozen = step % 2 == turn
        self._decide_channels()

    def _decide_channels(self) -> None:
        """By the norms of the weights as they are now."""
        if self.channels:
            norms = group_importance(self.problem.groups, "l1", self.parameters)
            for name, gate in self.channels.items():
                gate.gate_from(norms[name] / norms[name].mean().clamp_min(1e-30))

    def penalty(self) -> Tensor | None:
        total: Tensor | None = None
        for measure, excess in self._excess().items():
            self.last[measure] = float(excess.detach())
            self.first.setdefault(measure, self.last[measure])
            if self.is_warm:
                self.slopes[measure] = self._slopes(excess)
                continue
            part = self.multipliers[measure] * excess
            total = part if total is None else total + part
        return total

    def _slopes(self, excess: Tensor) -> dict[Tensor, Tensor]:
        thresholds = [gate.threshold for gates in self._kinds().values() for gate in gates.values()]
        if not excess.requires_grad:  # reason: a network of two layers has nothing to decide
            return {}
        slopes = torch.autograd.grad(excess, thresholds, allow_unused=True, retain_graph=True)
        return {t: torch.zeros_like(t) if slope is None else slope for t, slope in zip(thresholds, slopes, strict=True)}

    def before_update(self, step: int) -> None:
        """Sizes of gradients are brought to 1; frozen gates learn nothing, from the penalty neither."""
        scales: dict[Tensor, float] = {}
        for kind, gates in self._kinds().items():
            grads = [g.threshold.grad for g in gates.values() if g.threshold.grad is not None]
            if not grads:
                continue
            square = float(torch.cat([g.flatten() for g in grads]).double().square().mean())
            self.squares[kind] = 0.98 * self.squares.get(kind, square) + 0.02 * square
            for gate in gates.values():
                if isinstance(gate, SuperBitQuantizer) and gate.frozen:
                    gate.threshold.grad = None
                elif gate.threshold.grad is not None:
                    scales[gate.threshold] = max(self.squares[kind], 1e-60) ** -0.5
        for measure in self.slopes:
            self._keep_to_path(measure, scales)
        for threshold, scale in scales.items():
            assert threshold.grad is not None
            threshold.grad.mul_(scale).clamp_(-_LARGEST, _LARGEST)

    def _keep_to_path(self, measure: str, scales: Mapping[Tensor, float]) -> None:
        """Take out of the thresholds' gradients what would change the cost, and add what brings it back to its path.

        The cost changes only when gates do: under a multiplier nearly all thresholds were seen to rise together, at the
        same cost, until several gates closed at once. Gradients are as they come here, to be multiplied by `scales`: so
        what is taken out is one multiplier's share in all kinds of gates, harm and cost being compared in true sizes.
        """
        slopes = {t: slope.double() for t, slope in self.slopes[measure].items() if t in scales}
        square = sum(scales[t] * float(slope.square().sum()) for t, slope in slopes.items())
        if not square:
            return
        error = min(1.0, max(-1.0, self.last[measure] - self.path(measure)))
        along = sum(scales[t] * float((t.grad * slope).sum()) for t, slope in slopes.items() if t.grad is not None)
        total = sum(scales[t] ** 2 * float(slope.square().sum()) for t, slope in slopes.items())
        size = (total / sum(t.numel() for t in slopes)) ** 0.5
        for t, slope in slopes.items():
            assert t.grad is not None
            t.grad.add_((_RETURN * error / size - along / square) * slope)

    def after_step(self, step: int) -> None:
        if self.done >= _VOTING:
            self._vote()
        if self.search.lam is not None or self.is_warm:
            return
        for measure, multiplier in self.multipliers.items():
            error = min(1.0, max(-1.0, self.last[measure] - self.path(measure)))
            grown = multiplier * math.exp(self.search.stiffness / self.steps * error)
            self.multipliers[measure] = min(_BOUNDS[1], max(_BOUNDS[0], grown))

    def measures(self) -> dict[str, Any]:
        limits = self.problem.shares
        histograms = {}
        for key, gates in (("weight_bits", self.weights), ("activation_bits", self.activations)):
            bits = [bits_of(gate) for gate in gates.values()]
            histograms[key] = {b: bits.count(b) for b in sorted(set(bits))}
        masks = [gate.mask for gate in self.channels.values()]
        closed = sum(int((m < 0.5).sum()) for m in masks)
        return {
            **{m: limit * math.exp(self.last.get(m, 0.0)) for m, limit in limits.items()},
            "budget": limits,
            "pruned": closed / sum(len(m) for m in masks) if masks else 0.0,
            "multiplier": {} if self.is_warm else dict(self.multipliers),
            **histograms,
        }

    def state(self) -> dict[str, Any]:
        plain: dict[str, Any] = {k: getattr(self, k) for k in _STATE}
        plain["norms"] = {
            kind: {n: g.norms.tolist() for n, g in gates.items() if bool(g.norms.isfinite().all())}
            for kind, gates in self.searched.items()
        }
        plain["start"] = None if self.start is None else asdict(self.start)
        return {**plain, "votes": {k: {n: [*v.items()] for n, v in t.items()} for k, t in self.votes.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])
        self.start = None if state["start"] is None else Plan(**state["start"])
        if self.start is not None:
            self.start = replace(self.start, kept={n: tuple(kept) for n, kept in self.start.kept.items()})
        for kind, norms in state["norms"].items():
            for name, values in norms.items():
                self.searched[kind][name].norms.copy_(torch.tensor(values))
        self.votes = {k: {n: {int(b): int(c) for b, c in v} for n, v in t.items()} for k, t in state["votes"].items()}

    # -- decisions -----------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What the gates chose most often towards the end; what they amount to now, if nothing was counted."""
        kept = {name: tuple(range(group.size)) for name, group in self.problem.groups.items()}
        for name, gate in self.channels.items():
            counts = self.mask_votes.get(name)
            often = [] if counts is None else [i for i, n in enumerate(counts) if 2 * n > self.mask_votes["steps"][0]]
            kept[name] = tuple(often or (gate.mask > 0.5).nonzero().flatten().tolist())

        def usual(kind: Kind, gates: Mapping[str, SuperBitQuantizer]) -> dict[str, int]:
            votes = self.votes[kind]
            return {n: max(votes[n], key=votes[n].__getitem__) if n in votes else bits_of(g) for n, g in gates.items()}

        return Plan(kept, usual("weight", self.weights), usual("activation", self.activations))

    def _vote(self) -> None:
        for kind, gates in self.searched.items():
            for name, gate in gates.items():
                counts = self.votes[kind].setdefault(name, {})
                counts[bits_of(gate)] = counts.get(bits_of(gate), 0) + 1
        for name, channel in self.channels.items():
            so_far, chosen = self.mask_votes.get(name, [0] * channel.size), (channel.mask > 0.5).tolist()
            self.mask_votes[name] = [n + c for n, c in zip(so_far, chosen, strict=True)]
        self.mask_votes["steps"] = [self.mask_votes.get("steps", [0])[0] + 1]

    def path(self, measure: str) -> float:
        """Where the log of the cost over its limit should be now."""
        return max(0.0, self.first[measure]) * max(0.0, 1 - self.done / self.search.reach)

    def expectations(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """What `CostModel.expected` takes, at the gates of the moment: channels kept by group name, bits by weight name
        and bits by tensor name."""
        return (
            {name: gate().sum() for name, gate in self.channels.items()},
            {name: gate.expected_bits() for name, gate in self.weights.items()},
            {name: gate.expected_bits() for name, gate in self.activations.items()},
        )

    def _excess(self) -> dict[str, Tensor]:
        """Measure -> log of the cost over its limit, differentiable in the thresholds."""
        price = self.problem.cost.expected(*self.expectations(), self.problem.limits)
        return {measure: torch.log(price[measure] / limit) for measure, limit in self.problem.limits.items()}


def while_searching(settings: Training) -> Training:
    """What a search does not need: rates that fall, and sound batch-norm statistics at its end."""
    return settings.model_copy(update={"schedule": "constant", "norm_batches": 0, "frozen_norm_epochs": 0})


def bits_of(gate: SuperBitQuantizer) -> int:
    """The one bitwidth that a gate has, or has decided on."""
    return gate.bits if isinstance(gate.bits, int) else gate.decided_bits()
