"""`insert_gates`: which nodes it makes, and its two modes. Equality with the traced graph is in test_equalities.py."""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from torch import Tensor, nn

from sbs_fx.passes import (
    activation_gates,
    apply_bits,
    channel_gates,
    channel_groups,
    insert_gates,
    slim,
    trace,
    weight_gates,
)
from sbs_fx.passes.dialects import gates_of
from sbs_fx.passes.gates.masked import exclude, moments, silence
from sbs_fx.plan.errors import GraphError
from tests.networks.models import SMALLEST, Recipe, example, step
from tests.oracles.agreement import random_plan


class Regularised(nn.Module):
    """Batch norm with its own eps and momentum, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.01, momentum=0.3)
        self.dropout, self.head = nn.Dropout(0.4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def test_training_mode_is_that_of_the_module() -> None:
    module, x = Regularised().train(), torch.randn(4, 3, 6, 6)
    graph = trace(module, x)
    gated = insert_gates(graph, channel_groups(graph))
    assert not gated.training
    for _ in range(2):
        gated.train(), module.train()
        for seed in (1, 2):
            torch.manual_seed(seed)
            expected = module(x)
            torch.manual_seed(seed)
            assert torch.equal(gated(x), expected)
        state = gated.state_dict()
        for name in ("norm.running_mean", "norm.running_var"):
            assert torch.equal(state[name], module.state_dict()[name])
        gated.eval(), module.eval()
        with torch.no_grad():
            assert torch.equal(gated(x), module(x))
    (norm,) = (m for m in gated.modules() if hasattr(m, "momentum"))
    (dropout,) = (m for m in gated.modules() if isinstance(m, nn.Dropout))
    assert (norm.eps, norm.momentum, dropout.p) == (0.01, 0.3, 0.4)


def test_the_input_graph_stays_as_it_was() -> None:
    graph = trace(SMALLEST["attention"](), example("attention"))
    code, state = graph.code, copy.deepcopy(graph.state_dict())
    gated = insert_gates(graph, channel_groups(graph))
    with torch.no_grad():
        for parameter in gated.parameters():
            parameter.zero_()
    assert graph.code == code
    assert all(torch.equal(value, graph.state_dict()[name]) for name, value in state.items())


def test_one_gate_per_weight_tensor_and_group() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.shared, self.other = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.shared(torch.relu(self.shared(x))) + self.other(x)

    graph = trace(Twice(), torch.randn(2, 6))
    groups = channel_groups(graph, keep_outputs=False)
    gated = insert_gates(graph, groups)
    assert list(weight_gates(gated)) == ["stem", "shared", "other"]
    assert list(activation_gates(gated)) == ["x", "relu", "relu_1"]
    assert not activation_gates(gated)["relu"].signed
    assert activation_gates(gated)["x"].signed
    assert list(channel_gates(gated)) == list(groups)
    assert len(gated.graph.find_nodes(op="call_module", target=gates_of(gated).weights["shared"])) == 1
    assert list(channel_gates(insert_gates(graph, groups, channels=False))) == []


def test_bits_are_applied_by_name() -> None:
    graph = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 6))
    gated = insert_gates(graph, channel_groups(graph))
    x = torch.randn(2, 6)
    with torch.no_grad():
        before = gated(x)
        apply_bits(gated, {"2": 2}, {"relu": 4})
        assert not torch.equal(gated(x), before)
        apply_bits(gated, {"2": 32}, {"relu": 32})
        assert torch.equal(gated(x), before)
    with pytest.raises(GraphError, match="no weight gate is called '1'; there are 2, the first: .*0.*2"):
        apply_bits(gated, {"1": 8}, {})
    with pytest.raises(GraphError, match="no activation gate is called 'relu_7'"):
        apply_bits(gated, {}, {"relu_7": 8})


def test_a_slim_graph_takes_gates_for_bits() -> None:
    graph = trace(Recipe((step("attention"), step("residual"))).build(), torch.randn(2, 3, 8, 8))
    groups = channel_groups(graph)
    slimmed = slim(graph, groups, random_plan(groups, Random(0)))
    x = torch.randn(3, 3, 8, 8)
    for found in (groups, channel_groups(slimmed)):
        gated = insert_gates(slimmed, found, channels=False)
        with torch.no_grad():
            assert torch.equal(gated(x), slimmed(x))


def test_an_open_mask_hands_on_the_same_object_unless_a_gradient_is_due() -> None:
    x, ones = torch.randn(4, 3), torch.ones(4)
    assert silence(x, ones, 0) is x
    assert exclude(x, ones, 0, 1.0) is x
    ones.requires_grad_()
    silence(x, ones, 0).sum().backward()
    assert torch.allclose(ones.grad, x.sum(1))


def test_a_masked_norm_keeps_its_input_alone_for_the_backward_pass() -> None:
    """As the operator in its place does; a gradient that reaches the mask agrees with finite differences."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=torch.float64, requires_grad=True)
    norm = torch.ops.aten.layer_norm.default

    def masked_norm(x: Tensor, mask: Tensor) -> Tensor:
        return moments(norm, [2], [mask], x, [6], None, None, 1e-5)

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_norm(x, mask)
    assert {t.data_ptr() for t in kept if t.numel() > 6} == {x.data_ptr()}
    assert torch.autograd.gradcheck(masked_norm, (x, mask))


def test_candidates_by_name_and_the_default_where_only_float_is_among_them() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)), (torch.randn(2, 3, 4, 4),))
    asked = {"0": (2, 32), "1": (32,), "2": (3, 5)}
    gated = insert_gates(graph, channel_groups(graph), candidates=lambda kind, name: asked.get(name, (4, 8)))
    assert {name: gate.candidates for name, gate in weight_gates(gated).items()} == {**asked, "1": (2, 4, 8)}
    assert {gate.candidates for gate in activation_gates(gated).values()} == {(4, 8)}


def test_one_range_for_each_output_channel_or_for_all() -> None:
    """Of a transposed convolution the outputs are dimension 1."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2))
    graph = trace(layers, (torch.randn(2, 3, 4, 4),))
    for per_channel, shapes in ((True, {"0": (4,), "1": (6,)}), (False, {"0": (), "1": ()})):
        gated = insert_gates(graph, channel_groups(graph), per_channel=per_channel)
        assert {name: tuple(gate.range.shape) for name, gate in weight_gates(gated).items()} == shapes
        assert [gate.channel_dim for gate in weight_gates(gated).values()] == [0, 1]
