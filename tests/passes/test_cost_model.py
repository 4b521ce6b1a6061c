"""Symbolic cost against an independent counter, and against the published BOP figures."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import sympy
import timm
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import DeformConv2d

from benchmarks._cifar_models import CifarResNet
from sbs_fx.passes import channel_groups, cost_model, slim, trace
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import GraphError
from tests.networks.models import Recipe, networks
from tests.oracles.problems import cost_of, even_plan


def analysed(module: nn.Module, *shape: int):
    graph = trace(module.eval(), torch.randn(2, *shape))
    groups = channel_groups(graph)
    return graph, groups, cost_model(graph, groups)


def counted_macs(module: nn.Module, *shape: int) -> int:
    # reason: torch 2.14's counter does not know the fused attention of CPUs, but its products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(torch.randn(1, *shape))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def random_plan(groups, seed: int = 0) -> dict[str, list[int]]:
    rng = random.Random(seed)
    return {g.name: sorted(rng.sample(range(g.size), rng.randint(1, g.size))) for g in groups.values()}


# PAPERS: MACs x bits x bits, first and last layer 8/8, as printed in the tables of arXiv 2101.04935 and of SAQ.
PUBLISHED = [
    (20, 2, "190.2"),
    (20, 3, "392.1"),
    (20, 4, "674.6"),
    (20, 8, "2612.4"),
    (20, 32, "41798.6"),
    (56, 4, "2033.6"),
]


@pytest.mark.parametrize(("depth", "bits", "millions"), PUBLISHED)
def test_cifar_resnet_bops_are_the_published_ones(depth: int, bits: int, millions: str) -> None:
    _, _, cost = analysed(CifarResNet(depth), 3, 32, 32)
    total = cost.evaluate(even_plan(cost, bits, bits, ends=32 if bits == 32 else 8))
    assert f"{total.bops / 1e6:.1f}" == millions
    assert total.macs == {20: 40_818_944, 56: 125_753_600}[depth]


@pytest.mark.parametrize(("name", "bits", "billions"), [("resnet18", 4, "34.7"), ("mobilenetv2_100", 6, "11.2")])
def test_imagenet_bops_are_the_published_ones(name: str, bits: int, billions: str) -> None:
    _, _, cost = analysed(timm.create_model(name), 3, 224, 224)
    assert f"{cost.evaluate(even_plan(cost, bits, bits)).bops / 1e9:.1f}" == billions


@settings(max_examples=25)
@given(networks(max_blocks=3))
def test_macs_equal_an_independent_count_of_the_slim_graph(recipe: Recipe) -> None:
    shape = recipe.example(2).shape[1:]
    graph, groups, cost = analysed(recipe.build(), *shape)
    plan = random_plan(groups)
    slimmed = slim(graph, groups, plan)
    # reason: CPUs run an LSTM as one kernel, but one that projects its hidden state, a GRU and plain cells in steps
    nodes = slimmed.graph.find_nodes(op="call_function", target=torch.ops.aten.lstm.input)
    fused = tuple(f"({node.name})" for node in nodes if len(node.args[2]) % 4 == 0)
    unknown_to_the_counter = sum(x.macs for x in cost.evaluate(Plan(plan)).layers if x.name.endswith(fused))
    assert cost.evaluate(Plan(plan)).macs - unknown_to_the_counter == counted_macs(slimmed, *shape)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_macs_by_hand(kind: type[nn.RNNBase], gates: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(8, 6, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cell(x)[0].mean(1))

    _, _, cost = analysed(Tokens(), 7, 8)
    cell, head = cost.evaluate(Plan()).layers
    assert cell.macs == 2 * 7 * gates * 6 * (8 + 6) + 2 * 7 * gates * 6 * (12 + 6)
    assert head.macs == 12 * 5
    with torch.device("meta"):  # on which every step is made of the products that it stands for
        assert counted_macs(Tokens().eval(), 7, 8) == cell.macs + head.macs


def test_deformable_macs_by_hand() -> None:
    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.conv = nn.Conv2d(4, 18, 1), DeformConv2d(4, 6, 3, groups=2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x, self.places(x)[:, :, 1:-1, 1:-1])

    _, _, cost = analysed(Deformable(), 4, 8, 8)
    places, conv = cost.evaluate(Plan()).layers
    assert (places.macs, conv.macs) == (8 * 8 * 4 * 18, 6 * 6 * 6 * (4 // 2) * 9)
    assert (conv.kind, conv.weight_bits, conv.activation_bits) == ("conv", 32, 32)


def test_expressions_agree_with_the_exact_and_the_differentiable_cost() -> None:
    _, groups, cost = analysed(CifarResNet(20), 3, 32, 32)
    plan = replace(even_plan(cost, 4, 2), kept=random_plan(groups))
    exact = cost.evaluate(plan).bops
    values = {sympy.Symbol(f"n[{n}]", positive=True, integer=True): len(k) for n, k in plan.kept.items()}
    for table in (plan.weight_bits, plan.activation_bits):
        values |= {sympy.Symbol(f"bits[{n}]", positive=True): b for n, b in table.items()}
    assert sum(e.subs(values) for e in cost.expressions.values()) == exact
    sizes = {n: torch.tensor(float(len(k)), dtype=torch.float64, requires_grad=True) for n, k in plan.kept.items()}
    soft = cost.expected(sizes, plan.weight_bits, plan.activation_bits)["bops"]
    assert soft.item() == pytest.approx(exact, rel=1e-12)
    soft.backward()
    name = next(iter(plan.kept))
    more = plan.with_value("channels", name, range(len(plan.kept[name]) + 1))
    assert cost.evaluate(more).bops - exact == pytest.approx(sizes[name].grad.item())


def test_dynamic_height_and_width_stay_symbols() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    graph = trace(net, torch.randn(2, 3, 32, 32), dynamic=("batch", "height", "width"))
    cost = cost_model(graph, channel_groups(graph))
    expression = cost.expressions["0 (conv2d)"]
    height, width = [s for s in expression.free_symbols if not str(s).startswith(("n[", "bits["))]
    values = {s: (8 if str(s).startswith("n[") else 1) for s in expression.free_symbols}
    assert expression.subs({**values, height: 20, width: 10}) == 20 * 10 * 8 * 3 * 9


def test_parameters_are_counted_once_and_buffers_are_none() -> None:
    """One linear layer at two places, and a batch norm with two parameters and two buffers of 4."""
    linear = nn.Linear(4, 4)
    _, _, cost = analysed(nn.Sequential(linear, nn.BatchNorm1d(4), linear), 4)
    total = cost.evaluate(Plan())
    assert [layer.params for layer in total.layers] == [16, 0]
    assert (total.params, total.macs) == (16 + 4 + 2 * 4, 2 * 16)


def test_a_layer_is_an_end_on_one_clear_way() -> None:
    """The input reaches the last layer past the others, and the middle one reaches the output past the last."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.middle(self.first(x))
            return self.last(inner + x) + inner

    _, _, cost = analysed(Around(), 4)
    assert cost.ends() == ({"linear", "linear_2"}, {"linear_1", "linear_2"})


def test_sizes_of_layers_by_hand() -> None:
    """Outputs, inputs of one group and places of a convolution, a grouped and a transposed one."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1, groups=2), nn.ConvTranspose2d(6, 2, 2))
    _, _, cost = analysed(layers, 3, 8, 8)
    sizes = [layer.sizes(lambda axis: axis.size) for layer in cost.layers]
    assert sizes == [[(4, 3, 36)], [(6, 2, 36)], [(2, 6, 36)]]


def test_groups_of_another_graph_are_refused() -> None:
    graph, groups, _ = analysed(CifarResNet(20), 3, 32, 32)
    other = trace(CifarResNet(20).eval(), torch.randn(2, 3, 32, 32))
    with pytest.raises(GraphError, match="another graph"):
        cost_model(other, groups)


def test_a_transposed_weight_has_a_scale_for_each_output() -> None:
    """Its outputs are dimension 1: 6 scales of 32 bits come to 8 bits in place of 32 for each weight."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ConvTranspose2d(4, 6, 2))
    cost = cost_of(layers, torch.randn(2, 3, 8, 8))
    sizes = [cost.price(Plan({}, {"0": 32, "1": bits}))["size"] for bits in (8, 32)]
    assert sizes[0] - sizes[1] == 4 * 6 * 4 * (8 - 32) + 6 * 32
    walked = [cost.evaluate(Plan({}, {"0": 32, "1": bits})).stored_bits for bits in (8, 32)]
    assert walked == sizes
