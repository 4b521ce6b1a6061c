"""Bits by channel: what a plan amounts to, clipping, the policy gradient, episodes that go on, the way to the file."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.compression import compress
from sbs_fx.config import Config
from sbs_fx.export.pt2 import load_pt2, save_pt2
from sbs_fx.passes import (
    CostModel,
    activation_gates,
    apply_bits,
    channel_groups,
    cost_model,
    insert_gates,
    slim,
    weight_gates,
)
from sbs_fx.passes.channels.slim import Slices, slim_bits
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.graph import with_tensors
from sbs_fx.plan import Budget, Plan, Policy
from sbs_fx.plan.errors import CheckpointMismatch, DataError, InfeasibleBudget, WeightsError
from sbs_fx.search import Ajpq, Run, SearchResult, ajpq
from sbs_fx.search.ajpq import Agent, Trial, channel_bits_of
from sbs_fx.search.channel_bits import BitsByChannel, ChannelBits
from sbs_fx.search.controllers import bits_of, draw
from sbs_fx.search.reward import Reward
from sbs_fx.training import Checkpoints, Training
from tests.oracles.gated import check_static
from tests.oracles.problems import cost_of, problem_of

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BUDGET = Budget(size=0.2)
LEVELS = (0, 2, 4, 8)
SHORT = Ajpq(episodes=9, group=3, norm_batches=1, reward_batches=1)


class Residual(nn.Module):
    """A stream made by two layers, a depthwise convolution, and a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.second = nn.Conv2d(12, 8, 1)
        self.third, self.third_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.depthwise(torch.relu(self.first_norm(self.first(x)))))
        x = torch.relu(self.third_norm(self.third(self.second(y)))) + torch.relu(self.second(y))
        return self.head(torch.relu(self.inner(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def cost() -> CostModel:
    torch.manual_seed(0)
    module = Residual()
    for p in module.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.2, 1.5)
    return cost_of(module, IMAGES)


def channels_of(cost: CostModel, budget: Budget = BUDGET, settings: Ajpq = SHORT) -> ChannelBits:
    return channel_bits_of(problem_of(cost, IMAGES, budget), settings)


def searched(
    cost: CostModel, budget: Budget = BUDGET, data: Any = None, settings: Ajpq = SHORT, seed: int = 0, **options: Any
) -> SearchResult:
    problem = problem_of(cost, IMAGES, budget, seed)
    return ajpq(problem, Run(batches() if data is None else data, settings, **options))


def batches(count: int = 2, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def drawn(channels: ChannelBits, seed: int) -> BitsByChannel:
    generator = random.Random(seed)
    return {n: [generator.choice(LEVELS) for _ in channels.importance[n]] for n in channels.names}


def spent(channels: ChannelBits, bits: BitsByChannel) -> Any:
    return channels.problem.cost.evaluate(channels.plan(bits))


# What a plan amounts to


def test_a_channel_goes_where_all_its_makers_say_so(cost: CostModel) -> None:
    channels = channels_of(cost)
    assert channels.names == ["first", "depthwise", "second", "third", "inner"]
    assert set(channels.levels.values()) == {LEVELS}
    bits = {n: [8] * len(channels.importance[n]) for n in channels.names}
    bits["first"][3] = 0
    kept = channels.kept(bits)
    owner = {m.tensor: g.name for g in cost.groups.values() for m in g.members if m.dim == 0}
    inner = owner["first.weight"]
    assert kept[inner] == tuple(range(12)), "the depthwise kernel still makes that channel"
    bits["depthwise"][3] = 0
    assert channels.kept(bits)[inner] == tuple(i for i in range(12) if i != 3)
    stream = owner["third.weight"]
    bits["third"][0] = 0
    assert 0 in channels.kept(bits)[stream], "two layers make the stream"
    bits["second"][0] = 0
    assert 0 not in channels.kept(bits)[stream]
    bits["inner"] = [0] * 16
    assert channels.kept(bits)[owner["inner.weight"]] == (0,), "one stays"


@pytest.mark.parametrize("seed", range(6))
def test_bits_by_channel_survive_to_the_file(cost: CostModel, seed: int, tmp_path: Path) -> None:
    """Costs agree, zero rows and all; what is pruned counts nothing; the static graph has the gated one's codes, and
    comes back from its file as it was."""
    groups, channels = cost.groups, channels_of(cost)
    plan = channels.plan(drawn(channels, seed))
    policy = channels.problem.policy(plan, "ajpq")
    assert Policy.from_json(policy.to_json()) == policy
    policy.check(groups.fingerprint, {g.name: g.size for g in groups.values()}, cost.weights, cost.activations)
    bits = slim_bits(groups, policy.plan)
    whole = cost.evaluate(plan)
    assert cost.evaluate(policy.plan) == whole
    assert channels.problem.price(plan) == {"size": whole.stored_bits}
    slimmed = slim(groups.inference.graph_module, groups, policy.kept)
    after = cost_model(slimmed, channel_groups(slimmed))
    assert after.evaluate(Plan({}, bits, policy.activation_bits)).bops == whole.bops
    gated = insert_gates(slimmed, groups, channels=False)
    apply_bits(gated, bits, policy.activation_bits)
    calibrate(gated, None, inputs=(IMAGES,))
    static = check_static(gated, torch.randn(8, 1, 8, 8))
    for name, stored in static_of(static).weights.items():
        codes = dict(static.named_buffers())[name].movedim(stored.axis, 0).flatten(1)
        each = [stored.bits] * len(codes) if isinstance(stored.bits, int) else stored.bits
        assert all(not row.any() for row, b in zip(codes, each, strict=True) if b == 0)
        assert all(row.abs().max() <= (1 << b - 1) - 1 for row, b in zip(codes, each, strict=True) if b)
    path = tmp_path / "model.pt2"
    save_pt2(static, (IMAGES,), str(path))
    assert torch.equal(load_pt2(str(path))(IMAGES), static(IMAGES))


def test_bits_by_channel_are_fine_tuned() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 1, 8, 8), torch.arange(8) % 5) for _ in range(3)]
    config = Config(ajpq=SHORT, epochs=1, training=Training(norm_batches=1))
    result = compress(Residual().eval(), IMAGES, budget=BUDGET, data=data, method="ajpq", config=config)
    assert any(not isinstance(bits, int) for bits in result.policy.weight_bits.values())
    assert torch.isfinite(result.model(IMAGES)).all()


def test_stored_bits_are_counted_by_hand(cost: CostModel) -> None:
    channels = channels_of(cost)
    bits = drawn(channels, 3)
    kept = channels.kept(bits)
    by_name = {
        next(iter(layer.weights)): row for layer, row in zip(cost.layers, spent(channels, bits).layers, strict=True)
    }
    owner = {m.tensor: g.name for g in cost.groups.values() for m in g.members if m.dim == 0}
    inputs = len(kept[owner["stem.weight"]])
    first = [bits["first"][i] for i in kept[owner["first.weight"]]]
    places = 16 * len(first)  # channels are stored by their bits, so each has a place
    assert by_name["first"].stored_bits == 9 * inputs * sum(first) + places


def test_the_gated_network_is_the_slim_one(cost: CostModel) -> None:
    """The reward is measured on masks; on the slim graph, statistics included, it is the same."""
    groups, channels = cost.groups, channels_of(cost)
    reward = Reward(channels, batches(), 1, 1)
    for seed in range(3):
        bits = drawn(channels, seed)
        reward.apply(bits)
        plan = channels.plan(bits)
        slimmed = slim(with_tensors(groups.inference.graph_module, reward.statistics()), groups, plan.kept)
        gated = insert_gates(slimmed, groups, channels=False)
        apply_bits(gated, slim_bits(groups, plan), plan.activation_bits)
        for gates_in in (weight_gates, activation_gates):
            for name, gate in gates_in(gated).items():
                grid = gates_in(reward.network)[name].grid
                if gates_in is weight_gates:
                    grid = grid._replace(range=grid.range[Slices(groups, plan.kept).index(groups.outputs[name])])
                gate.use(grid)
        x = batches()[0][0]
        with torch.no_grad():
            assert torch.allclose(gated(x), reward.network(x), atol=1e-4)


# Staying in the budget


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [Budget(size=0.2), Budget(bops=0.04), Budget(size=0.25, macs=0.8)])
def test_every_episode_ends_inside_the_budget(cost: CostModel, seed: int, budget: Budget) -> None:
    channels = channels_of(cost, budget)
    agent = Agent(channels, SHORT, seed)
    agent.episode = seed
    assert budget.is_satisfied_by(spent(channels, agent.play().bits))
    bits = dict(channels.least)
    for name in channels.names:
        bits[name] = channels.clip({**bits, name: [8] * len(bits[name])}, name)
    assert budget.is_satisfied_by(spent(channels, bits))
    assert channels.used(bits) <= 1


def test_clipping_takes_the_least_important_first(cost: CostModel) -> None:
    channels = channels_of(cost, Budget(size=0.15))
    bits = {**channels.least, "third": [8] * 8}
    clipped = channels.clip(bits, "third")
    order = channels.importance["third"].argsort().tolist()
    assert clipped != bits["third"]
    assert all(clipped[a] <= clipped[b] for a, b in itertools.pairwise(order))
    loose = channels_of(cost, Budget(size=0.9))
    assert loose.clip(bits, "third") == bits["third"]


def test_out_of_reach_says_what_is_reachable(cost: CostModel) -> None:
    for measure in ("size", "bops"):
        with pytest.raises(InfeasibleBudget) as caught:
            searched(cost, Budget(**{measure: 1e-3}))
        least = caught.value.least[measure]
        assert least > 1e-3
        short = SHORT.model_copy(update={"episodes": 1})
        assert searched(cost, Budget(**{measure: least}), settings=short)


# The controllers


def test_scores_become_bits() -> None:
    scores = torch.tensor([-9.0, -1.51, -1.5, -0.51, -0.5, 0.49, 0.5, 9.0])
    assert bits_of(scores, LEVELS) == [0, 0, 2, 2, 4, 4, 8, 8]
    assert bits_of(scores, (3, 6)) == [3, 3, 3, 3, 3, 3, 6, 6]
    assert bits_of(scores, (8,)) == [8] * 8


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    mean = torch.randn(6, requires_grad=True)
    z = torch.randn(6)
    basis = torch.stack([torch.ones(6), z - z.mean()])
    action = draw(mean, 0.3, torch.Generator().manual_seed(0), basis)
    (found,) = torch.autograd.grad(action.score, mean)
    # the density of u over its span: independent normals along the two directions
    coordinates = [(v / v.norm()) for v in basis]
    value = mean.detach().clone().requires_grad_()
    log_p = sum(
        torch.distributions.Normal(value @ c, 0.3 * float(v.norm())).log_prob(action.value @ c)
        for c, v in zip(coordinates, basis, strict=True)
    )
    (expected,) = torch.autograd.grad(log_p, value)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_controllers_learn_what_is_rewarded(cost: CostModel) -> None:
    """A reward that counts bits in one layer and against those of another moves both the right way."""
    settings = Ajpq(episodes=150, group=5, lr=0.02)
    channels = channels_of(cost, settings=settings)

    def bits(plan: Any, name: str) -> float:
        return sum(plan[name]) / len(plan[name])

    agent = Agent(channels, settings, 0)
    before = agent.play().bits
    while agent.episode < settings.episodes:
        trials = [agent.play() for _ in range(settings.group)]
        for trial in trials:
            trial.reward = (bits(trial.bits, "third") - bits(trial.bits, "first")) / 8
        agent.learn(trials)
    after = [agent.play().bits for _ in range(10)]
    gained = sum(bits(p, "third") - bits(p, "first") for p in after) / len(after)
    # reason: what is left of a budget goes to channels of 2 bits first, so the first layer does not stay that low
    assert gained > bits(before, "third") - bits(before, "first") + 1


# Runs


def test_deterministic_and_within_the_budget(cost: CostModel) -> None:
    graph = cost.groups.inference.graph_module
    one, two = (searched(cost, seed=5) for _ in range(2))
    assert one.plan == two.plan
    assert all(torch.equal(v, two.tensors[n]) for n, v in one.tensors.items())
    assert one.tensors.keys() == dict(graph.named_buffers()).keys()
    assert BUDGET.is_satisfied_by(cost.evaluate(one.plan))
    assert one.plan.weight_bits["stem"] == one.plan.weight_bits["head"] == 8


def test_a_stopped_run_ends_as_one_that_was_not(cost: CostModel, tmp_path: Path) -> None:
    whole = searched(cost, seed=2)

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise Stop

    def run(observer: Any, identity: Any = 1) -> SearchResult:
        with Checkpoints(tmp_path, {"run": identity}) as checkpoints:
            return searched(cost, seed=2, checkpoints=checkpoints, observer=observer)

    with pytest.raises(Stop):
        run(stop)
    seen: list[int] = []
    again = run(lambda p: seen.append(p.step))
    assert seen == [4, 5, 6, 7, 8, 9]
    assert again.plan == whole.plan
    assert all(torch.equal(v, whole.tensors[n]) for n, v in again.tensors.items())
    with pytest.raises(CheckpointMismatch):
        run(None, identity=2)


def test_one_image_is_enough_and_labels_are_needed(cost: CostModel) -> None:
    found = searched(cost, data=batches(1, 1))
    assert all(torch.isfinite(t).all() for t in found.tensors.values())
    with pytest.raises(DataError, match="no labels"):
        searched(cost, data=[IMAGES])
    with pytest.raises(DataError, match="no batch"):
        searched(cost, data=[])


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_zero_and_constant_weights(value: float) -> None:
    module = Residual()
    with torch.no_grad():
        module.third.weight.fill_(value)
    found = searched(cost_of(module, IMAGES))
    assert all(torch.isfinite(t).all() for t in found.tensors.values())


def test_a_network_with_nothing_to_decide() -> None:
    found = searched(cost_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), IMAGES), Budget(bops=1 / 16))
    assert found.plan.weight_bits == {"1": 8}
    assert Trial({}).reward == float("-inf")


def test_non_finite_weights_are_named() -> None:
    cost = cost_of(Residual(), IMAGES)
    with torch.no_grad():
        cost.groups.inference.graph_module.get_parameter("third.weight")[0, 0] = torch.inf
    with pytest.raises(WeightsError, match="'third'"):
        searched(cost)
