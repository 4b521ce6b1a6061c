"""The published baselines: Bayesian Bits' gates and the paths of multi-path search, and both methods end to end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks._cifar_models import CifarResNet
from sbs_fx.passes import CostModel, activation_gates, channel_gates, insert_gates, weight_gates
from sbs_fx.passes.oracles.slimming import activations
from sbs_fx.plan import Budget
from sbs_fx.plan.errors import InputError
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.search import Keep, Problem, Run, Search, SearchResult, bayesian_bits, multi_path
from sbs_fx.search.baselines.bayesian_bits import BayesianSearch
from sbs_fx.search.baselines.hard_concrete import (
    HardConcreteChannelGate,
    HardConcreteQuantizer,
    decided_gates,
    drawn_gates,
    open_probability,
)
from sbs_fx.search.baselines.multi_path import MultiPathSearch
from sbs_fx.search.baselines.split_paths import split_paths
from sbs_fx.search.repair import BudgetRepair, Harm
from sbs_fx.training import Checkpoints, Progress, Training
from tests.networks.small import digits, network
from tests.oracles.problems import cost_of, problem_of

OPEN, CLOSED = 50.0, -50.0  # phi at which every draw is 1, or 0
DIGITS = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained() -> CostModel:
    """A float network that has learned the digits."""
    module = network()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for images, labels in digits(shuffle=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(images), labels).backward()
            optimiser.step()
    return cost_of(module, DIGITS)


# Hard-concrete gates


@pytest.mark.parametrize("phi", [-2.0, -0.935, 0.0, 1.5, 6.0])
def test_probabilities_are_those_of_the_draws(phi: float) -> None:
    draws = drawn_gates(torch.full((200_000,), phi, dtype=torch.float64))
    expected = float(open_probability(torch.tensor(phi, dtype=torch.float64)))
    assert draws.min() >= 0
    assert draws.max() <= 1
    # five deviations of the mean of as many draws
    assert abs(float((draws > 0).double().mean()) - expected) < 5 * math.sqrt(expected * (1 - expected) / 200_000)
    # the mirror image of phi has as many ones as phi has zeros
    ones = float((drawn_gates(torch.full((200_000,), -phi, dtype=torch.float64)) == 1).double().mean())
    assert abs(ones - (1 - expected)) < 5 * math.sqrt(expected * (1 - expected) / 200_000) + 1e-9


def test_decisions_at_the_threshold() -> None:
    # q(g = 0) = sigmoid(beta log(-gamma/zeta) - phi) = 0.34
    edge = 2 / 3 * math.log(0.1 / 1.1) - math.log(0.34 / 0.66)
    assert decided_gates(torch.tensor([edge - 1e-4, edge + 1e-4])).tolist() == [0.0, 1.0]
    quantizer = HardConcreteQuantizer().eval()
    quantizer.search()
    x = torch.randn(500)
    for phi, bits in (((1, 1), 8), ((1, -1), 4), ((-1, 1), 2), ((-1, -1), 2)):
        with torch.no_grad():
            quantizer.phi.copy_(edge + 1e-3 * torch.tensor(phi))
        fixed = copy.deepcopy(quantizer)
        fixed.fix(bits)
        assert quantizer.decided_bits() == bits
        assert torch.equal(quantizer(x), fixed(x))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("candidates", [(2, 4, 8), (3, 5, 32)])
@pytest.mark.parametrize(("gates", "chosen"), [((1, 1), 2), ((1, 0), 1), ((0, 0), 0), ((0, 1), 0)])
def test_gates_of_zero_and_one_are_the_plain_quantiser(
    signed: bool, candidates: tuple[int, ...], gates: Any, chosen: int
) -> None:
    drawn = HardConcreteQuantizer(channels=4, signed=signed, candidates=candidates).train()
    plain = SuperBitQuantizer(channels=4, signed=signed)
    for quantizer in (drawn, plain):
        with torch.no_grad():
            quantizer.range.copy_(torch.tensor([0.3, 0.8, 1.0, 2.0]))
    with torch.no_grad():
        drawn.phi.copy_(torch.tensor([OPEN if gate else CLOSED for gate in gates]))
    drawn.search()
    plain.fix(candidates[chosen])
    results = []
    x, grad = torch.randn(4, 200), torch.randn(4, 200)
    for quantizer in (drawn, plain):
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        y.backward(grad)
        slope = quantizer.range.grad
        results.append((y.detach(), leaf.grad, torch.zeros(4) if slope is None else slope))  # None: open at float
    for found, expected in zip(*results, strict=True):
        # ties apart, which random floats do not hit: the chain rounds a residual, the plain quantiser the value
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("candidates", [(2, 4, 8), (3, 6, 32)])
@pytest.mark.parametrize("phi", [(6.0, 6.0), (0.5, 0.2), (0.0, -1.0), (-1.0, 1.0)])
def test_gradients_of_phi_are_finite_differences(channels: int | None, candidates: tuple[int, ...], phi: Any) -> None:
    quantizer = HardConcreteQuantizer(channels=channels, candidates=candidates).double().train()
    quantizer.search()
    with torch.no_grad():
        quantizer.phi.copy_(torch.tensor(phi))
    x, grad = torch.randn(3, 40, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    moving = 0
    for seed in range(20):

        def loss(seed: int = seed) -> Tensor:
            torch.manual_seed(seed)  # the noise stays as it is
            return (quantizer(x) * grad).sum() + quantizer.expected_bits() + quantizer.weighted_bits()

        quantizer.zero_grad()
        loss().backward()
        assert quantizer.phi.grad is not None
        for index in range(2):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    quantizer.phi[index] += sign * 1e-6
                    ends.append(loss())
                    quantizer.phi[index] -= sign * 1e-6
            difference = (ends[0] - ends[1]) / 2e-6
            torch.testing.assert_close(quantizer.phi.grad[index], difference, rtol=1e-5, atol=1e-6)
        torch.manual_seed(seed)
        drawn = drawn_gates(quantizer.phi.detach())
        moving += int(((drawn > 0) & (drawn < 1)).any())
    assert moving or phi[0] == 6.0, "or the chain has had no part in it"


@pytest.mark.parametrize("candidates", [(2, 4, 8), (2, 5, 32)])
def test_gradients_of_input_and_range_are_those_of_the_mixture(candidates: tuple[int, int, int]) -> None:
    quantizer = HardConcreteQuantizer(candidates=candidates).double().train()
    with torch.no_grad():
        quantizer.phi.copy_(torch.tensor([0.3, 0.6]))
    x, grad = torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    seed = 0
    while True:
        torch.manual_seed(seed)
        first, second = drawn_gates(quantizer.phi.detach()).tolist()
        if 0 < first < 1 and 0 < second < 1:
            break
        seed += 1
    expected_x, expected_range = torch.zeros_like(x), 0.0
    for share, bits in zip((1 - first, first * (1 - second), first * second), candidates, strict=True):
        quantizer.fix(bits)
        quantizer.range.grad = None
        leaf = x.clone().requires_grad_()
        quantizer(leaf).backward(grad)
        assert leaf.grad is not None
        expected_x += share * leaf.grad
        expected_range += share * float(0 if quantizer.range.grad is None else quantizer.range.grad)
    quantizer.search()
    quantizer.range.grad = None
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    quantizer(leaf).backward(grad)
    torch.testing.assert_close(leaf.grad, expected_x)
    assert float(quantizer.range.grad) == pytest.approx(expected_range)  # type: ignore[arg-type]


def test_expected_bits() -> None:
    quantizer = HardConcreteQuantizer().double()
    quantizer.search()
    with torch.no_grad():
        quantizer.phi.copy_(torch.tensor([0.2, -0.4]))
    q4, q8 = open_probability(quantizer.phi.detach()).tolist()
    assert quantizer.expected_bits().item() == pytest.approx(2 + q4 * (2 + 4 * q8))
    assert quantizer.weighted_bits().item() == pytest.approx(2 + 4 * q4 + 8 * q4 * q8)
    quantizer.fix(4)
    assert quantizer.expected_bits() == quantizer.weighted_bits() == 4


def test_nothing_is_kept_per_candidate() -> None:
    quantizer = HardConcreteQuantizer().train()
    quantizer.search()
    x = torch.randn(4000, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantizer(x)
    assert [t.data_ptr() for t in kept if t.numel() > 100] == [x.data_ptr()]


def test_channel_gate() -> None:
    gate = HardConcreteChannelGate(7, 3)
    assert gate().tolist() == [1.0] * 7
    gate.search()
    with torch.no_grad():
        gate.phi.copy_(torch.tensor([OPEN, CLOSED, 0.0]))
    sizes = open_probability(gate.phi.detach()) * torch.tensor([3, 3, 1])
    assert gate.expected_size().item() == pytest.approx(float(sizes.sum()))
    masks = torch.stack([gate() for _ in range(200)])
    assert masks[:, :3].eq(1).all()
    assert masks[:, 3:6].eq(0).all()
    assert len(masks[:, 6].unique()) > 10
    assert gate.eval()().tolist() == [1, 1, 1, 0, 0, 0, 1]
    with torch.no_grad():
        gate.phi.copy_(torch.tensor([CLOSED, CLOSED + 1, CLOSED]))
    assert gate().tolist() == gate.train()().tolist() == [0, 0, 0, 1, 1, 1, 0], "the likeliest block stays"
    gate.decide()
    assert gate.mask.tolist() == [0, 0, 0, 1, 1, 1, 0]
    gate.fix([0])
    assert gate().tolist() == [1] + [0] * 6


def test_regulariser_is_the_papers_sum() -> None:
    every = Keep(place="ends", weight_bits=(2, 4, 8), activation_bits=(2, 4, 8))
    problem = problem_of(CifarResNet(8), torch.randn(2, 3, 32, 32), Budget(bops=0.05), constraints=(every,))
    cost = problem.cost
    stage = BayesianSearch(insert_gates(problem.graph, problem.groups), problem, Search())
    total = 0.0
    macs = cost.reference.macs
    for layer in cost.reference.layers:
        total += layer.macs / macs * 2 * 14
    q = float(open_probability(torch.tensor(6.0)))
    with torch.no_grad():
        found = float(stage.regulariser())
    assert q**8 * total < found < total, "all open, almost: 2 + 4 + 8 bits on both sides of each layer"
    with torch.no_grad():
        for gate in (*weight_gates(stage.network).values(), *activation_gates(stage.network).values()):
            gate.phi.fill_(CLOSED)  # type: ignore[union-attr, operator]
        assert float(stage.regulariser()) == pytest.approx(total / 7, rel=0.01)
        sizes = {name: float(gate.expected_size()) for name, gate in stage.drawn.items()}
        gate_name = next(iter(stage.drawn))
        stage.drawn[gate_name].phi.fill_(CLOSED)
        fewer = cost.expected({**sizes, gate_name: 0.0}, {}, {})["macs"] / macs * 4
        assert float(stage.regulariser()) == pytest.approx(float(fewer), rel=1e-5)
    assert isinstance(next(iter(channel_gates(stage.network).values())), HardConcreteChannelGate)


# Paths


class Branches(nn.Module):
    """A tensor that two layers read, a weight that two layers share, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.norm, self.shared, self.head = nn.BatchNorm2d(8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = (torch.relu(self.norm(self.left(x))) + self.right(x)).flatten(2).mT
        x = self.shared(torch.relu(self.shared(x)))
        return self.head((x @ x.mT @ x).mean(1))


@pytest.mark.parametrize(
    ("make", "x"),
    [(lambda: CifarResNet(8), torch.randn(4, 3, 32, 32)), (Branches, torch.randn(4, 3, 6, 6))],
    ids=["resnet", "branches"],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_path_is_the_fixed_graph_node_for_node(make: Callable[[], nn.Module], x: Tensor, bits: int) -> None:
    cost = cost_of(make(), x)
    groups, graph = cost.groups, cost.groups.inference.graph_module
    single, split = (insert_gates(graph, groups, channels=False) for _ in range(2))
    fixed = ({next(iter(cost.weights)): 8}, {next(iter(cost.activations)): 8})
    choices = split_paths(split, cost, fixed)
    assert set(choices) == {name for name in cost.weights if name not in fixed[0]}
    for found in (single, split):
        for gates, kept in ((weight_gates(found), fixed[0]), (activation_gates(found), fixed[1])):
            for name, gate in gates.items():
                width = 0.5 + len(name.partition("@")[0]) / 20
                gate.fix(kept.get(name, bits)) if "@" not in name else None
                with torch.no_grad():
                    gate.range.fill_(width)
    for choice in choices.values():
        with torch.no_grad():
            choice.paths.logits.copy_(torch.tensor([0.0 if b == bits else -1e9 for b in (2, 4, 8)]))
            for at, parameter in choice.copies.items():
                if at != bits:
                    split.get_parameter(parameter).normal_()  # other paths have weights of their own
        assert choice.paths.decided_bits() == choice.paths.expected_bits().item() == bits
    expected = dict(activations(single, (x,)))
    compared = 0
    for name, value in activations(split, (x,)):
        if name in expected:
            assert torch.equal(value, expected[name]), name
            compared += 1
    layers = set(groups.inference.layers)
    assert layers <= expected.keys()
    assert compared >= len(expected) - len(weight_gates(single)) - len(activation_gates(single))


def test_what_is_split_and_what_is_left() -> None:
    problem = problem_of(Branches(), torch.randn(2, 3, 6, 6), Budget(bops=0.05))
    graph, cost = problem.graph, problem.cost
    gated = insert_gates(graph, problem.groups, channels=False)
    stage = MultiPathSearch(gated, problem, Search())
    assert stage.fixed == ({"stem": 8, "head": 8}, {next(iter(cost.activations)): 8, "mean": 8})
    parameters = dict(gated.named_parameters())
    assert set(stage.choices) == {"left", "right", "shared"}
    assert "left.weight" not in parameters
    assert "stem.weight" in parameters
    assert len(stage.choices["shared"].reads) == 2
    # the operands of the two products of activations search by thresholds, everything else by paths
    assert set(stage.searched["weight"]) == set()
    products = {n for n, places in cost.activations.items() if any(layer.kind == "matmul" for layer, _ in places)}
    assert len(products) >= 3
    assert set(stage.searched["activation"]) == products
    shared_input = stage.choices["left"].reads[0]
    assert stage.readers[shared_input] == [stage.choices["left"].paths, stage.choices["right"].paths]
    with torch.no_grad():
        stage.choices["left"].paths.logits.copy_(torch.tensor([1.0, 0.0, 0.0]))
        stage.choices["right"].paths.logits.copy_(torch.tensor([0.0, 3.0, 0.0]))
    gated.train()(torch.randn(2, 3, 6, 6))
    _, weight_bits, activation_bits = stage.expectations()
    mean = (weight_bits["left"].item() + weight_bits["right"].item()) / 2
    assert activation_bits[shared_input].item() == pytest.approx(mean)
    plan = stage.plan()
    assert (plan.weight_bits["left"], plan.weight_bits["right"], plan.weight_bits["stem"]) == (2, 4, 8)
    assert plan.activation_bits[shared_input] == 4
    assert plan.weight_bits.keys() == cost.weights.keys()
    assert plan.activation_bits.keys() == cost.activations.keys()
    tensors = stage.tensors(graph, plan)
    assert tensors.keys() == dict(graph.state_dict()).keys()
    assert torch.equal(tensors["left.weight"], parameters[stage.choices["left"].copies[2]])
    with pytest.raises(InputError, match="prunes nothing"):
        multi_path(problem.within(quantise=False), Run([(torch.randn(2, 3, 6, 6), torch.tensor([0, 1]))]))


# End to end


def run(method: Any, problem: Problem, **options: Any) -> tuple[SearchResult, list[Progress]]:
    steps: list[Progress] = []
    data, settings = digits(shuffle=True, count=1024), Search(epochs=2, lr=0.02, **options)
    return method(problem, Run(data, settings, Training(distillation=0.0), observer=steps.append)), steps


@pytest.mark.parametrize("method", [bayesian_bits, multi_path])
def test_it_meets_the_budget_and_leaves_no_room(method: Any, trained: CostModel) -> None:
    groups, graph = trained.groups, trained.groups.inference.graph_module
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    prunes = method is bayesian_bits
    for share in (0.02, 0.04):
        budget = Budget(bops=share)
        problem = problem_of(trained, DIGITS, budget)
        searched, steps = run(method, problem)
        plan = searched.plan
        policy = problem.policy(plan, method.__name__)
        policy.check(
            groups.fingerprint, {g.name: g.size for g in groups.values()}, trained.weights, trained.activations
        )
        assert budget.is_satisfied_by(trained.evaluate(plan))
        # a network this small has steps of more than 1 %: none of them fits any more
        harm = Harm(insert_gates(graph, groups), [], {})
        scores = {n: torch.ones(group.size) for n, group in groups.items()}
        repair = BudgetRepair(problem.within(prune=prunes), harm, scores)
        assert repair.choices
        for move in repair._moves(plan, down=False):
            assert not budget.is_satisfied_by(trained.evaluate(move.applied(plan))), move
        assert plan.weight_bits["0"] == plan.weight_bits["9"] == 8
        assert prunes or all(len(kept) == groups[name].size for name, kept in plan.kept.items())
        assert searched.tensors.keys() == before.keys()
        assert not torch.equal(searched.tensors["4.weight"], before["4.weight"])
        assert all(math.isfinite(step.loss) for step in steps)
        assert set(steps[-1].measures["weight_bits"]) <= {2, 4, 8}
        assert steps[-1].measures["bops"] < steps[0].measures["bops"]
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())


@pytest.mark.parametrize("method", [bayesian_bits, multi_path])
def test_a_seed_decides_everything(method: Any, trained: CostModel) -> None:
    results = [run(method, problem_of(trained, DIGITS, Budget(bops=0.03), seed))[0] for seed in (0, 0, 1)]
    assert results[0].plan == results[1].plan
    assert all(torch.equal(value, results[1].tensors[name]) for name, value in results[0].tensors.items())
    assert any(not torch.equal(value, results[2].tensors[name]) for name, value in results[0].tensors.items())


@pytest.mark.parametrize("method", [bayesian_bits, multi_path])
def test_an_interrupted_search_goes_on(method: Any, trained: CostModel, tmp_path: Path) -> None:
    def search(observer: Any = None, directory: str = "whole") -> SearchResult:
        data, settings = digits(shuffle=True, count=512), Search(epochs=2, lr=0.02)
        with Checkpoints(tmp_path / directory, {"run": "test"}) as checkpoints:
            options: dict[str, Any] = {"checkpoints": checkpoints, "observer": observer}
            return method(
                problem_of(trained, DIGITS, Budget(bops=0.03)),
                Run(data, settings, Training(checkpoint_every=3), **options),
            )

    def stop(step: Progress) -> None:
        if step.step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(stop, "parts")
    whole, parts = search(), search(directory="parts")
    assert whole.plan == parts.plan
    assert all(torch.equal(value, parts.tensors[name]) for name, value in whole.tensors.items())


def test_a_fixed_multiplier_is_left_alone(trained: CostModel) -> None:
    _, steps = run(bayesian_bits, problem_of(trained, DIGITS, Budget(bops=0.03)), lam=0.5)
    assert {step.measures["multiplier"]["bops"] for step in steps} == {0.5}


def test_channels_alone(trained: CostModel) -> None:
    plan = run(bayesian_bits, problem_of(trained, DIGITS, Budget(macs=0.6), quantise=False))[0].plan
    assert set(plan.weight_bits.values()) == {32}
    assert any(len(kept) < trained.groups[name].size for name, kept in plan.kept.items())
