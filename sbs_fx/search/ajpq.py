"""`ajpq`: two reinforcement-learning controllers choose a sparsity per layer and a bitwidth per output channel.

In: a problem, a few labelled batches. Out: a plan with one bitwidth for each output channel (0 prunes it) within the
limits, and the batch-norm statistics that belong to it.
Source: Automated Model Compression by Jointly Applied Pruning and Quantization (arXiv 2011.06231): pruning is
channel-wise quantisation to 0 bit; a layer controller sets sparsity, a channel controller the bits of each output
channel, both from one importance criterion. The criterion, the reward and how the controllers learn were not at hand;
ours are:

* importance: L2 norm of a output channel times the scale of the batch norm behind it (`ChannelBits`);
* an episode goes through the layers; in each, the layer controller's sparsity takes the least important channels to 0
  bits, the channel controller scores the others, and what exceeds the budget, with the least bits that may be chosen
  in all later layers, is clipped; what is left at the end goes to the most important channels: so each episode ends
  just inside the budget;
* reward: accuracy with the batch-norm statistics that belong to the policy (`reward.Reward`);
* learning: policy gradient over groups of episodes; exploration moves the scores of a layer together and along the
  importance, since noise of each output channel alone would cancel out (`controllers.draw`). The first mean is the
  highest level of scores that is in the budget without clipping, with next to no sparsity.

Holds: an episode is a function of the seed, its number and the controllers; a run that was stopped goes on after its
last group of episodes and ends as one that was not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor, nn

from sbs_fx.plan import Settings
from sbs_fx.plan.errors import InputError
from sbs_fx.search.channel_bits import BitsByChannel, ChannelBits
from sbs_fx.search.controllers import ChannelController, Drawn, LayerController, bits_of, draw
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.search.registry import Run, method
from sbs_fx.search.reward import Reward
from sbs_fx.training import Checkpoints
from sbs_fx.training.progress import Progress

STAGE = "ajpq"
_ROOM = 4  # bits of weights that should fit beside the activations
_OFFSETS = 24  # bisections of the first mean score


class Ajpq(Settings):
    """Settings of `ajpq`.

    Attributes:
        episodes: policies that are tried. group: episodes between two updates of the controllers.
        lr: of the controllers (Adam). noise: deviation of scores at the first episode; it falls to a third.
        norm_batches: batches on which batch-norm statistics are estimated. reward_batches: the following ones, on which
            accuracy is measured; the first ones again where the data has no more.
        most_sparse: largest share of a layer's channels with 0 bits.

    >>> sbs_fx.Config(ajpq=Ajpq()).methods["ajpq"] == Ajpq()
    True
    """

    episodes: int = Field(default=120, ge=1)
    group: int = Field(default=6, ge=1)
    lr: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    noise: float = Field(default=0.4, gt=0, allow_inf_nan=False)
    norm_batches: int = Field(default=2, ge=1)
    reward_batches: int = Field(default=4, ge=1)
    most_sparse: float = Field(default=0.5, ge=0, lt=1)


@dataclass
class Trial:
    """A plan that was tried: bits by channel and weight, and its reward."""

    bits: BitsByChannel
    reward: float = -math.inf
    scores: list[Tensor] = field(default_factory=list)


@method(
    "ajpq",
    help="two controllers learn each layer's sparsity and each output channel's bits, 0 included",
    needs="labels",
    settings=Ajpq,
    resumes=True,
)
def ajpq(problem: Problem, run: Run) -> SearchResult:
    """Search by two controllers. Only the first batches of the data are read, once; the search saves itself after each
    group of episodes and goes on from there.

    Raises:
        DataError: no batch, no labels. InfeasibleBudget: the least bits are over the limits. InputError: the settings
            quantise nothing.

    >>> from sbs_fx.search.registry import METHODS
    >>> METHODS["ajpq"].search is ajpq, METHODS["ajpq"].needs
    (True, 'labels')
    """
    settings = run.settings or Ajpq()
    if not problem.space.settings.quantise:
        raise InputError("quantise=False with bits by channel, of which 0 prunes: choose another method")
    channels = channel_bits_of(problem, settings)
    reward = Reward(channels, run.data, settings.norm_batches, settings.reward_batches)
    agent = Agent(channels, settings, problem.seed)
    agent.resume(run.checkpoints)
    while agent.episode < settings.episodes:
        count = min(settings.group, settings.episodes - agent.episode)
        trials = []
        for _ in range(count):
            trials.append(agent.play())
            trials[-1].reward = reward(trials[-1].bits)
            agent.take(trials[-1])
            if run.observer is not None:
                run.observer(_report(agent, trials[-1], settings))
        agent.learn(trials)
        agent.save(run.checkpoints)
    assert agent.best is not None
    reward(agent.best.bits)
    return SearchResult(channels.plan(agent.best.bits), reward.statistics())


def channel_bits_of(problem: Problem, settings: Ajpq) -> ChannelBits:
    """With activation bits that leave weights a choice. Raises InfeasibleBudget."""
    space = problem.space
    candidates = sorted(space.settings.candidates, reverse=True)
    least_share = 1 - settings.most_sparse
    for least in (*(b for b in candidates if b <= _ROOM), 0):
        for bits in candidates:
            channels = ChannelBits(problem, space.plan(bits, bits).activation_bits, least_share)
            plan = {n: [max(least, b) for b in each] if least else each for n, each in channels.least.items()}
            if channels.used(plan) <= 1:
                return channels
    raise problem.infeasible("ajpq", channels.plan(channels.least))


class Agent:
    """The controllers, the episodes that they have played, and the best plan among them."""

    def __init__(self, channels: ChannelBits, settings: Ajpq, seed: int) -> None:
        self.channels, self.settings, self.seed = channels, settings, seed
        self.episode = 0
        self.best: Trial | None = None
        self.baseline: float | None = None
        self.standard = {n: _standardised(channels.importance[n]) for n in channels.names}
        self.sizes = _size_shares(channels)
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
            plan = {n: bits_of(middle + 0.5 * z, self.channels.levels[n]) for n, z in self.standard.items()}
            plan = {
                n: [max(b, least) for b, least in zip(p, self.channels.least[n], strict=True)] for n, p in plan.items()
            }
            low, high = (middle, high) if self.channels.used(plan) <= 1 else (low, middle)
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
        plan, scores, last = dict(self.channels.least), [], (0.0, 0.0)
        for place, name in enumerate(self.channels.names):
            z = self.standard[name]
            layer = self._features(place, name, plan, last)
            sparsity = draw(self.actors["layer"](layer), 2 * self.deviation, generator)
            share = self.settings.most_sparse * float(torch.sigmoid(sparsity.value))
            rank = z.argsort().argsort().float() / len(z)
            features = torch.stack([z, rank, torch.full_like(z, share)], 1)
            basis = torch.stack([torch.ones_like(z), z])
            action = draw(self.actors["channel"](layer, features), self.deviation, generator, basis)
            plan[name] = self._chosen(name, share, action)
            plan[name] = self.channels.clip(plan, name)
            scores += [sparsity.score, action.score]
            last = (share, sum(plan[name]) / len(plan[name]) / 8)
        self.episode += 1
        return Trial(self.channels.fill(plan), scores=scores)

    def _chosen(self, name: str, share: float, action: Drawn) -> list[int]:
        """Bits from both actions; channels that must stay have at least 2."""
        bits, order = (
            bits_of(action.value, self.channels.levels[name]),
            self.standard[name].argsort(stable=True).tolist(),
        )
        for channel in order[: int(share * len(order))]:
            bits[channel] = 0
        return [max(b, least) for b, least in zip(bits, self.channels.least[name], strict=True)]

    def _features(self, place: int, name: str, plan: BitsByChannel, last: tuple[float, float]) -> Tensor:
        importance = self.channels.importance[name]
        mean = float(importance.mean())
        spread = float(importance.std(correction=0)) / mean if mean > 0 else 0.0
        layers = self.channels.names
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
    """Logarithms with mean 0 and deviation 1, float32; all 0 where channels weigh alike."""
    logs = importance.clamp_min(1e-12).log()
    logs = logs - logs.mean()
    return (logs / logs.std(correction=0).clamp_min(1e-6)).float()


def _size_shares(channels: ChannelBits) -> dict[str, float]:
    """Each layer's share of the weights that are decided on."""
    counts = {n: math.prod(x.size for x in dims) for n, (dims, _) in channels.problem.cost.dims_of_weights.items()}
    total = sum(counts[n] for n in channels.names) or 1
    return {n: counts[n] / total for n in channels.names}


def _report(agent: Agent, trial: Trial, settings: Ajpq) -> Progress:
    assert agent.best is not None
    problem = agent.channels.problem
    price = problem.price(agent.channels.plan(trial.bits))
    shares = {measure: price[measure] / problem.cost.whole[measure] for measure in price}
    return Progress(
        stage=STAGE,
        epoch=0,
        epochs=1,
        step=agent.episode,
        steps=settings.episodes,
        loss=-trial.reward,
        rate=settings.lr,
        measures={**shares, "budget": problem.shares, "reward": trial.reward, "best": agent.best.reward},
    )
