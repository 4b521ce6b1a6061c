"""`ajpq`: two reinforcement-learning controllers choose a sparsity per layer and a bitwidth per kernel.

In: a traced float model, its analyses, a budget, a few labelled batches. Out: a policy with one bitwidth per kernel (0
prunes it) that meets the budget, and the batch-norm statistics that belong to it.
Source: Automated Model Compression by Jointly Applied Pruning and Quantization (arXiv 2011.06231): pruning is
channel-wise quantisation to 0 bit; a layer controller sets sparsity, a channel controller the bits of each kernel, both
from one importance criterion. The criterion, the reward and how the controllers learn were not at hand; ours are:

* importance: L2 norm of a kernel times the scale of the batch norm behind it (`kernels.Kernels`);
* an episode goes through the layers; in each, the layer controller's sparsity takes the least important kernels to 0
  bits, the channel controller scores the others, and what exceeds the budget, with the least bits that may be chosen
  in all later layers, is clipped; what is left at the end goes to the most important kernels: so each episode ends just
  inside the budget;
* reward: accuracy with the batch-norm statistics that belong to the policy (`reward.Reward`);
* learning: policy gradient over groups of episodes; exploration moves the scores of a layer together and along the
  importance, since noise of each kernel alone would cancel out (`controllers.draw`). The first mean is the highest
  level of scores that is in the budget without clipping, with next to no sparsity.

Holds: an episode is a function of the seed, its number and the controllers; a run that was stopped goes on after its
last group of episodes and ends as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from sbs_fx.passes import (
    ChannelGroups,
    CostModel,
)
from sbs_fx.plan import Budget, Policy, Value
from sbs_fx.plan.errors import InfeasibleBudget, InputError, SbsError
from sbs_fx.search.controllers import ChannelController, Drawn, LayerController, bits_of, draw
from sbs_fx.search.kernels import KernelBits, Kernels
from sbs_fx.search.reward import Reward
from sbs_fx.search.searched import Searched
from sbs_fx.search.uniform import end_bits
from sbs_fx.training import Checkpoints
from sbs_fx.training.progress import Observer, Progress

STAGE = "ajpq"
_OFFSETS = 24  # bisections of the first mean score


class Ajpq(Value):
    """Settings of `ajpq`.

    Attributes:
        episodes: policies that are tried. group: episodes between two updates of the controllers.
        lr: of the controllers (Adam). noise: deviation of scores at the first episode; it falls to a third.
        norm_batches: batches on which batch-norm statistics are estimated. reward_batches: the following ones, on which
            accuracy is measured; the first ones again where the data has no more.
        activation_bits: of all tensors but the ends' ones; None: the most with which weights of 4 bits fit.
        most_sparse: largest share of a layer's kernels with 0 bits.
        minor_groups: also prune the smaller factor of product axes (heads, group widths).
    """

    _error: ClassVar[type[SbsError]] = InputError

    episodes: int = Field(default=120, ge=1)
    group: int = Field(default=6, ge=1)
    lr: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    noise: float = Field(default=0.4, gt=0, allow_inf_nan=False)
    norm_batches: int = Field(default=2, ge=1)
    reward_batches: int = Field(default=4, ge=1)
    activation_bits: int | None = None
    most_sparse: float = Field(default=0.5, ge=0, lt=1)
    minor_groups: bool = False


@dataclass
class Trial:
    """A plan that was tried: bits per kernel and weight, and its reward."""

    bits: KernelBits
    reward: float = -math.inf
    scores: list[Tensor] = field(default_factory=list)


def ajpq(
    graph: fx.GraphModule,
    groups: ChannelGroups,
    cost: CostModel,
    budget: Budget,
    data: Iterable[Any],
    *,
    inputs: Sequence[Tensor],
    search: Ajpq | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    progress: Observer | None = None,
) -> Searched:
    """Search by two controllers.

    Args:
        graph: from `trace`; not changed. groups, cost: of it.
        data: yields (images, labels); only its first batches are read, once.
        inputs: example inputs of the graph.
        seed: of the controllers' weights and of all exploration.
        checkpoints: the search saves itself there after each group of episodes, and goes on from there.
        progress: called after each episode; `measures` has the best reward so far.

    Raises:
        DataError: no batch, no labels. InfeasibleBudget: the least bits are over the budget.
    """
    settings = search or Ajpq()
    kernels = kernels_of(graph, groups, cost, budget, settings)
    reward = Reward(graph, groups, kernels, data, inputs, settings.norm_batches, settings.reward_batches)
    agent = Agent(kernels, settings, seed)
    agent.resume(checkpoints)
    while agent.episode < settings.episodes:
        count = min(settings.group, settings.episodes - agent.episode)
        trials = []
        for _ in range(count):
            trials.append(agent.play())
            trials[-1].reward = reward(trials[-1].bits)
            agent.take(trials[-1])
            if progress is not None:
                progress(_report(agent, trials[-1], settings))
        agent.learn(trials)
        agent.save(checkpoints)
    assert agent.best is not None
    reward(agent.best.bits)
    return Searched(policy_of(kernels, agent.best.bits, seed), reward.statistics())


def policy_of(kernels: Kernels, bits: KernelBits, seed: int) -> Policy:
    """The policy that bits per kernel amount to."""
    return Policy(
        fingerprint=kernels.groups.fingerprint,
        method="ajpq",
        seed=seed,
        kept=kernels.kept(bits),
        sizes={g.name: g.size for g in kernels.groups.values()},
        weight_bits=kernels.weight_bits(bits),
        activation_bits=kernels.activation_bits,
    )


def kernels_of(
    graph: fx.GraphModule, groups: ChannelGroups, cost: CostModel, budget: Budget, settings: Ajpq
) -> Kernels:
    """With activation bits that leave weights a choice."""
    options = {"least_share": 1 - settings.most_sparse, "minor_groups": settings.minor_groups}
    ends = end_bits(cost).activations
    asked = (8, 4, 2) if settings.activation_bits is None else (settings.activation_bits,)
    for least in (4, 2, 0):
        for bits in asked:
            found = {**dict.fromkeys(cost.activations, bits), **ends}
            kernels = Kernels(graph, groups, cost, budget, found, **options)  # type: ignore[arg-type]
            plan = {n: [least] * len(each) if least else each for n, each in kernels.least.items()}
            if kernels.load(plan) <= 1:
                return kernels
    shares = budget.shares(kernels.cost_of(kernels.least))
    raise InfeasibleBudget.of(
        budget.limits, shares, "method 'ajpq' reaches on this model", "more sparsity (most_sparse)"
    )


class Agent:
    """The controllers, the episodes that they have played, and the best plan among them."""

    def __init__(self, kernels: Kernels, settings: Ajpq, seed: int) -> None:
        self.kernels, self.settings, self.seed = kernels, settings, seed
        self.episode = 0
        self.best: Trial | None = None
        self.baseline: float | None = None
        self.standard = {n: _standardised(kernels.importance[n]) for n in kernels.names}
        self.sizes = _size_shares(kernels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actors = nn.ModuleDict({"layer": LayerController(-3.0), "channel": ChannelController(0.0)})
        with torch.no_grad():
            channel = self.actors["channel"]
            assert isinstance(channel, ChannelController)
            channel.net[-1].bias.fill_(self._first_score())  # type: ignore[operator]
        self.optimiser = torch.optim.Adam(self.actors.parameters(), lr=settings.lr)

    def _first_score(self) -> float:
        """The highest mean of scores, before any noise, whose bits are within the budget."""
        low, high = -3.0, 3.0
        for _ in range(_OFFSETS):
            middle = (low + high) / 2
            plan = {n: bits_of(middle + 0.5 * z) for n, z in self.standard.items()}
            plan = {
                n: [max(b, least) for b, least in zip(p, self.kernels.least[n], strict=True)] for n, p in plan.items()
            }
            low, high = (middle, high) if self.kernels.load(plan) <= 1 else (low, middle)
        return low

    # -- an episode ----------------------------------------------------------------------------------------------------

    @property
    def deviation(self) -> float:
        """Of the exploration now; none in the first episode, so that the controllers' own plan is among those tried."""
        if self.episode == 0:
            return 0.0
        return self.settings.noise * 3 ** -(self.episode / max(1, self.settings.episodes))

    def play(self) -> Trial:
        """One plan, drawn layer by layer."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.episode)
        plan, scores, last = dict(self.kernels.least), [], (0.0, 0.0)
        for place, name in enumerate(self.kernels.names):
            z = self.standard[name]
            layer = self._features(place, name, plan, last)
            sparsity = draw(self.actors["layer"](layer), 2 * self.deviation, generator)
            share = self.settings.most_sparse * float(torch.sigmoid(sparsity.value))
            rank = z.argsort().argsort().float() / len(z)
            features = torch.stack([z, rank, torch.full_like(z, share)], 1)
            basis = torch.stack([torch.ones_like(z), z])
            action = draw(self.actors["channel"](layer, features), self.deviation, generator, basis)
            plan[name] = self._chosen(name, share, action)
            plan[name] = self.kernels.clip(plan, name)
            scores += [sparsity.score, action.score]
            last = (share, sum(plan[name]) / len(plan[name]) / 8)
        self.episode += 1
        return Trial(self.kernels.fill(plan), scores=scores)

    def _chosen(self, name: str, share: float, action: Drawn) -> list[int]:
        """Bits from both actions; kernels that must stay have at least 2."""
        bits, order = bits_of(action.value), self.standard[name].argsort(stable=True).tolist()
        for kernel in order[: int(share * len(order))]:
            bits[kernel] = 0
        return [max(b, least) for b, least in zip(bits, self.kernels.least[name], strict=True)]

    def _features(self, place: int, name: str, plan: KernelBits, last: tuple[float, float]) -> Tensor:
        importance = self.kernels.importance[name]
        mean = float(importance.mean())
        spread = float(importance.std(correction=0)) / mean if mean > 0 else 0.0
        layers = self.kernels.names
        return torch.tensor(
            [
                1.0,
                place / len(layers),
                self.sizes[name],
                sum(self.sizes[n] for n in layers[place + 1 :]),
                math.log(len(importance)) / 8,
                math.log1p(mean) / 4,
                spread,
                *last,
            ]
        )

    # -- learning ------------------------------------------------------------------------------------------------------

    def take(self, trial: Trial) -> None:
        if self.best is None or trial.reward > self.best.reward:
            self.best = Trial(trial.bits, trial.reward)

    def learn(self, trials: list[Trial]) -> None:
        """One policy-gradient step: advantages over the running mean of rewards, of one size on average."""
        rewards = torch.tensor([max(t.reward, -1.0) for t in trials])
        mean = float(rewards.mean())
        self.baseline = mean if self.baseline is None else 0.7 * self.baseline + 0.3 * mean
        advantages = rewards - self.baseline
        advantages = advantages / advantages.square().mean().sqrt().clamp_min(1e-6)
        terms = [a * sum(t.scores[1:], t.scores[0]) for a, t in zip(advantages, trials, strict=True) if t.scores]
        if not terms:
            return
        self.optimiser.zero_grad()
        (-torch.stack(terms).mean()).backward()
        self.optimiser.step()

    # -- going on ------------------------------------------------------------------------------------------------------

    def save(self, checkpoints: Checkpoints | None) -> None:
        if checkpoints is None or self.best is None:
            return
        tensors = {f"actors.{n}": t for n, t in self.actors.state_dict().items()}
        for k, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{k}.{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        state = {
            "episode": self.episode,
            "baseline": self.baseline,
            "bits": self.best.bits,
            "reward": self.best.reward,
        }
        checkpoints.save(STAGE, tensors, state)

    def resume(self, checkpoints: Checkpoints | None) -> None:
        saved = None if checkpoints is None else checkpoints.load(STAGE)
        if saved is None:
            return
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimiser":
                slots.setdefault(int(rest.partition(".")[0]), {})[rest.partition(".")[2]] = value
        self.actors.load_state_dict(
            {n.partition(".")[2]: t for n, t in saved.tensors.items() if n.startswith("actors.")}
        )
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": slots, "param_groups": groups})
        self.episode, self.baseline = saved.state["episode"], saved.state["baseline"]
        self.best = Trial(saved.state["bits"], saved.state["reward"])


def _standardised(importance: Tensor) -> Tensor:
    """Logarithms with mean 0 and deviation 1, float32; all 0 where kernels weigh alike."""
    logs = importance.clamp_min(1e-12).log()
    logs = logs - logs.mean()
    return (logs / logs.std(correction=0).clamp_min(1e-6)).float()


def _size_shares(kernels: Kernels) -> dict[str, float]:
    """Each layer's share of the weights that are decided on."""
    counts = {
        n: math.prod(x.size for x in dims) for layer in kernels.cost.layers for n, (dims, _) in layer.weights.items()
    }
    total = sum(counts[n] for n in kernels.names) or 1
    return {n: counts[n] / total for n in kernels.names}


def _report(agent: Agent, trial: Trial, settings: Ajpq) -> Progress:
    assert agent.best is not None
    shares = agent.kernels.budget.shares(agent.kernels.cost_of(trial.bits))
    return Progress(
        stage=STAGE,
        epoch=0,
        epochs=1,
        step=agent.episode,
        steps=settings.episodes,
        loss=-trial.reward,
        rate=settings.lr,
        measures={**shares, "budget": agent.kernels.budget.limits, "reward": trial.reward, "best": agent.best.reward},
    )
