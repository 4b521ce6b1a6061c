"""Bits per kernel: what a plan amounts to, clipping, the policy gradient, episodes that go on, the way to the file."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.compress import compress, kept_bits
from sbs_fx.config import Config
from sbs_fx.export.pt2 import load_pt2, save_pt2
from sbs_fx.passes import (
    activation_gates,
    apply_bits,
    channel_groups,
    cost_model,
    insert_gates,
    slim,
    trace,
    weight_gates,
)
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.graph import with_tensors
from sbs_fx.plan import Budget, Policy
from sbs_fx.plan.errors import CheckpointMismatch, DataError, InfeasibleBudget, WeightsError
from sbs_fx.search.ajpq import Agent, Ajpq, Trial, ajpq, kernels_of, policy_of
from sbs_fx.search.controllers import LEVELS, bits_of, draw
from sbs_fx.search.kernels import Kernels
from sbs_fx.search.reward import Reward
from sbs_fx.training import Checkpoints, Training
from tests.oracles.gated import check_static

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BUDGET = Budget(size=0.2)
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


def analysed(module: nn.Module, x: Tensor = IMAGES) -> Any:
    graph = trace(module.eval(), x)
    groups = channel_groups(graph)
    return graph, groups, cost_model(graph, groups)


@pytest.fixture(scope="module")
def parts() -> Any:
    torch.manual_seed(0)
    module = Residual()
    for p in module.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.2, 1.5)
    return analysed(module)


def batches(count: int = 2, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def drawn(kernels: Kernels, seed: int, levels: Any = LEVELS) -> dict[str, list[int]]:
    generator = random.Random(seed)
    return {n: [generator.choice(levels) for _ in kernels.importance[n]] for n in kernels.names}


# What a plan amounts to


def test_a_channel_goes_where_all_its_makers_say_so(parts: Any) -> None:
    kernels = kernels_of(*parts, BUDGET, SHORT)
    assert kernels.names == ["first", "depthwise", "second", "third", "inner"]
    plan = {n: [8] * len(kernels.importance[n]) for n in kernels.names}
    plan["first"][3] = 0
    kept = kernels.kept(plan)
    owner = {m.tensor: g.name for g in parts[1].values() for m in g.members if m.dim == 0}
    inner = owner["first.weight"]
    assert kept[inner] == list(range(12)), "the depthwise kernel still makes that channel"
    plan["depthwise"][3] = 0
    assert kernels.kept(plan)[inner] == [i for i in range(12) if i != 3]
    stream = owner["third.weight"]
    plan["third"][0] = 0
    assert 0 in kernels.kept(plan)[stream], "two layers make the stream"
    plan["second"][0] = 0
    assert 0 not in kernels.kept(plan)[stream]
    plan["inner"] = [0] * 16
    assert kernels.kept(plan)[owner["inner.weight"]] == [0], "one stays"


@pytest.mark.parametrize("seed", range(6))
def test_a_policy_per_kernel_survives_to_the_file(parts: Any, seed: int, tmp_path: Path) -> None:
    """Costs agree, zero rows and all; what is pruned counts nothing; the static graph has the gated one's codes, and
    comes back from its file as it was."""
    graph, groups, cost = parts
    kernels = kernels_of(*parts, BUDGET, SHORT)
    plan = drawn(kernels, seed)
    policy = policy_of(kernels, plan, 0)
    assert Policy.from_json(policy.to_json()) == policy
    policy.check(groups.fingerprint, {g.name: g.size for g in groups.values()}, cost.weights, cost.activations)
    bits = kept_bits(groups, cost, policy)
    total = cost.evaluate(policy.kept, bits, policy.activation_bits)
    assert total == kernels.cost_of(plan)
    slimmed = slim(graph, groups, policy.kept)
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


def test_bits_per_kernel_are_fine_tuned() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 1, 8, 8), torch.arange(8) % 5) for _ in range(3)]
    config = Config(ajpq=SHORT, epochs=1, training=Training(norm_batches=1))
    result = compress(Residual().eval(), IMAGES, budget=BUDGET, data=data, method="ajpq", config=config)
    assert any(not isinstance(bits, int) for bits in result.policy.weight_bits.values())
    assert torch.isfinite(result.model(IMAGES)).all()


def test_stored_bits_are_counted_by_hand(parts: Any) -> None:
    _, groups, cost = parts
    kernels = kernels_of(*parts, BUDGET, SHORT)
    plan = drawn(kernels, 3)
    kept = kernels.kept(plan)
    by_name = {
        next(iter(layer.weights)): row for layer, row in zip(cost.layers, kernels.cost_of(plan).layers, strict=True)
    }
    owner = {m.tensor: g.name for g in groups.values() for m in g.members if m.dim == 0}
    inputs = len(kept[owner["stem.weight"]])
    bits = [plan["first"][i] for i in kept[owner["first.weight"]]]
    assert by_name["first"].stored_bits == 9 * inputs * sum(bits)


def test_the_gated_network_is_the_slim_one(parts: Any) -> None:
    """The reward is measured on masks; on the slim graph, statistics included, it is the same."""
    graph, groups, cost = parts
    kernels = kernels_of(*parts, BUDGET, SHORT)
    reward = Reward(graph, groups, kernels, batches(), (IMAGES,), 1, 1)
    for seed in range(3):
        plan = drawn(kernels, seed)
        reward.apply(plan)
        policy = policy_of(kernels, plan, 0)
        slimmed = slim(with_tensors(graph, reward.statistics()), groups, policy.kept)
        gated = insert_gates(slimmed, groups, channels=False)
        bits = kept_bits(groups, cost, policy)
        apply_bits(gated, bits, policy.activation_bits)
        for gates_in in (weight_gates, activation_gates):
            wide = gates_in(reward.network)
            for name, gate in gates_in(gated).items():
                value = wide[name].range.detach()
                if gates_in is weight_gates:
                    index = kernels.outputs[name]
                    value = value[Slices(groups, policy.kept).index(index)]
                with torch.no_grad():
                    gate.range.copy_(value)
        x = batches()[0][0]
        with torch.no_grad():
            assert torch.allclose(gated(x), reward.network(x), atol=1e-4)


# Staying in the budget


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [Budget(size=0.2), Budget(bops=0.04), Budget(size=0.25, macs=0.8)])
def test_every_episode_ends_inside_the_budget(parts: Any, seed: int, budget: Budget) -> None:
    kernels = kernels_of(*parts, budget, SHORT)
    agent = Agent(kernels, SHORT, seed)
    agent.episode = seed
    assert kernels.load(agent.play().bits) <= 1
    plan = dict(kernels.least)
    for name in kernels.names:
        plan[name] = kernels.clip({**plan, name: [8] * len(plan[name])}, name)
    assert kernels.load(plan) <= 1


def test_clipping_takes_the_least_important_first(parts: Any) -> None:
    kernels = kernels_of(*parts, Budget(size=0.15), SHORT)
    plan = {**kernels.least, "third": [8] * 8}
    clipped = kernels.clip(plan, "third")
    order = kernels.importance["third"].argsort().tolist()
    assert clipped != plan["third"]
    assert all(clipped[a] <= clipped[b] for a, b in itertools.pairwise(order))
    loose = kernels_of(*parts, Budget(size=0.9), SHORT)
    assert loose.clip(plan, "third") == plan["third"]


def test_out_of_reach_says_what_is_reachable(parts: Any) -> None:
    for measure in ("size", "bops"):
        with pytest.raises(InfeasibleBudget) as caught:
            ajpq(*parts, Budget(**{measure: 1e-3}), batches(), inputs=(IMAGES,), search=SHORT)
        least = caught.value.least[measure]
        assert least > 1e-3
        short = SHORT.model_copy(update={"episodes": 1})
        assert ajpq(*parts, Budget(**{measure: least}), batches(), inputs=(IMAGES,), search=short)


# The controllers


def test_scores_become_bits() -> None:
    assert bits_of(torch.tensor([-9.0, -1.51, -1.5, -0.51, -0.5, 0.49, 0.5, 9.0])) == [0, 0, 2, 2, 4, 4, 8, 8]


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


def test_the_controllers_learn_what_is_rewarded(parts: Any) -> None:
    """A reward that counts bits in one layer and against those of another moves both the right way."""
    settings = Ajpq(episodes=150, group=5, lr=0.02)
    kernels = kernels_of(*parts, BUDGET, settings)

    def bits(plan: Any, name: str) -> float:
        return sum(plan[name]) / len(plan[name])

    agent = Agent(kernels, settings, 0)
    before = agent.play().bits
    while agent.episode < settings.episodes:
        trials = [agent.play() for _ in range(settings.group)]
        for trial in trials:
            trial.reward = (bits(trial.bits, "third") - bits(trial.bits, "first")) / 8
        agent.learn(trials)
    after = [agent.play().bits for _ in range(10)]
    gained = sum(bits(p, "third") - bits(p, "first") for p in after) / len(after)
    # reason: what is left of a budget goes to kernels of 2 bits first, so the first layer does not stay that low
    assert gained > bits(before, "third") - bits(before, "first") + 1


# Runs


def test_deterministic_and_within_the_budget(parts: Any) -> None:
    graph, _, _ = parts
    one, two = (ajpq(*parts, BUDGET, batches(), inputs=(IMAGES,), search=SHORT, seed=5) for _ in range(2))
    assert one.policy == two.policy
    assert all(torch.equal(v, two.tensors[n]) for n, v in one.tensors.items())
    assert one.tensors.keys() == dict(graph.named_buffers()).keys()
    bits = kept_bits(parts[1], parts[2], one.policy)
    assert BUDGET.is_satisfied_by(parts[2].evaluate(one.policy.kept, bits, one.policy.activation_bits))
    assert one.policy.weight_bits["stem"] == one.policy.weight_bits["head"] == 8


def test_a_stopped_run_ends_as_one_that_was_not(parts: Any, tmp_path: Path) -> None:
    whole = ajpq(*parts, BUDGET, batches(), inputs=(IMAGES,), search=SHORT, seed=2)

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise Stop

    def run(progress: Any, identity: Any = 1) -> Any:
        with Checkpoints(tmp_path, {"run": identity}) as checkpoints:
            return ajpq(
                *parts, BUDGET, batches(), inputs=(IMAGES,), search=SHORT, seed=2, checkpoints=checkpoints,
                progress=progress,
            )  # fmt: skip

    with pytest.raises(Stop):
        run(stop)
    seen: list[int] = []
    again = run(lambda p: seen.append(p.step))
    assert seen == [4, 5, 6, 7, 8, 9]
    assert again.policy == whole.policy
    assert all(torch.equal(v, whole.tensors[n]) for n, v in again.tensors.items())
    with pytest.raises(CheckpointMismatch):
        run(None, identity=2)


def test_one_image_is_enough_and_labels_are_needed(parts: Any) -> None:
    found = ajpq(*parts, BUDGET, batches(1, 1), inputs=(IMAGES,), search=SHORT)
    assert all(torch.isfinite(t).all() for t in found.tensors.values())
    with pytest.raises(DataError, match="no labels"):
        ajpq(*parts, BUDGET, [IMAGES], inputs=(IMAGES,), search=SHORT)
    with pytest.raises(DataError, match="no batch"):
        ajpq(*parts, BUDGET, [], inputs=(IMAGES,), search=SHORT)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_zero_and_constant_weights(value: float) -> None:
    module = Residual()
    with torch.no_grad():
        module.third.weight.fill_(value)
    parts = analysed(module)
    found = ajpq(*parts, BUDGET, batches(), inputs=(IMAGES,), search=SHORT)
    assert all(torch.isfinite(t).all() for t in found.tensors.values())


def test_a_network_with_nothing_to_decide() -> None:
    parts = analysed(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    found = ajpq(*parts, Budget(bops=1 / 16), batches(), inputs=(IMAGES,), search=SHORT)
    assert found.policy.weight_bits == {"1": 8}
    assert Trial({}).reward == float("-inf")


def test_non_finite_weights_are_named() -> None:
    graph, groups, cost = analysed(Residual())
    with torch.no_grad():
        graph.get_parameter("third.weight")[0, 0] = torch.inf
    with pytest.raises(WeightsError, match="'third'"):
        ajpq(graph, groups, cost, BUDGET, batches(), inputs=(IMAGES,), search=SHORT)
