"""`channel_groups` on small networks whose groups are known, and what a `ChannelGroups` offers."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbs_fx.passes import ChannelGroups, channel_groups, trace
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.inference import RULES, Inference
from sbs_fx.plan.errors import GraphError
from tests.networks.models import SMALLEST, Recipe, example, step


def groups_of(module: nn.Module, *shape: int, keep_outputs: bool = True) -> ChannelGroups:
    return channel_groups(trace(module, torch.randn(2, *shape)), keep_outputs=keep_outputs)


def types_of(groups: ChannelGroups, tensor: str) -> list[str]:
    """The types of a tensor's dimensions, axes by their group's name."""
    return [str(d.resolve(dim)) for dim in groups.inference.tensors[tensor]]


def places(groups: ChannelGroups, name: str) -> list[tuple[str, int]]:
    return [(member.tensor, member.dim) for member in groups[name].members]


# Types that operators give


def test_a_chain_couples_each_output_with_the_next_input() -> None:
    groups = groups_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)), 3, 9, 9)
    assert list(groups) == ["0.weight:0"]
    assert set(places(groups, "0.weight:0")) == {
        ("0.weight", 0),
        ("0.bias", 0),
        ("1.weight", 0),
        ("1.bias", 0),
        ("1.running_mean", 0),
        ("1.running_var", 0),
        ("3.weight", 1),
    }


def test_a_residual_sum_is_one_group() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.b(self.a(x))
            return self.head(x.mean((2, 3)))

    groups = groups_of(Residual(), 3, 4, 4)
    assert {name: group.size for name, group in groups.items()} == {"stem.weight:0": 8, "a.weight:0": 4}
    assert ("b.weight", 0) in places(groups, "stem.weight:0")
    assert ("head.weight", 1) in places(groups, "stem.weight:0")


def test_concatenation_and_flattening() -> None:
    class Concatenated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Linear(10 * 49, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x), self.b(x)], dim=1).flatten(1))

    groups = groups_of(Concatenated(), 3, 7, 7)
    assert types_of(groups, "head.weight") == ["5", "(a.weight:0 + b.weight:0) x 49"]


@pytest.mark.parametrize("how", ["sdpa", "softmax"])
def test_attention_is_three_times_heads_times_width(how: str) -> None:
    recipe = Recipe((step("attention", how=how),))
    groups = channel_groups(trace(recipe.build(), recipe.example()))
    name = next(name for name in groups.inference.tensors if name.endswith("project_in.weight"))
    assert types_of(groups, name)[0] == f"3 x {name}:0.0 x {name}:0.1"
    output = next(name for name in groups.inference.tensors if name.endswith("project_out.weight"))
    assert types_of(groups, output)[1] == f"{name}:0.0 x {name}:0.1"


def test_grouped_and_depthwise_convolutions() -> None:
    groups = groups_of(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 24, 3, groups=12)),
        3,
        9,
        9,
        keep_outputs=False,
    )
    group, inner = d.resolve(groups.inference.tensors["0.weight"][0]).factors  # type: ignore[union-attr]
    assert (group.size, inner.size) == (4, 2)
    outer = d.resolve(groups.inference.tensors["1.weight"][0])
    assert isinstance(outer, d.Prod)
    assert outer.factors[0] is group
    assert types_of(groups, "1.weight")[1] == str(inner)
    assert types_of(groups, "2.weight")[0] == f"{outer} x {d.axes(groups.inference.tensors['2.weight'][0])[-1]}"
    assert types_of(groups, "2.weight")[1] == "1"


def test_groups_of_a_convolution_may_cross_the_parts_of_a_concatenation() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)
            self.grouped, self.head = nn.Conv2d(16, 8, 1, groups=4), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.grouped(torch.cat([self.a(x), self.b(x), self.c(x)], dim=1)))

    groups = groups_of(Crossed(), 3, 4, 4)
    assert not groups.inference.conflicts
    inner = d.resolve(groups.inference.tensors["grouped.weight"][1])
    (three,) = d.axes(groups.inference.tensors["b.weight"][0])
    assert str(inner) == f"({three} + 1)", "three coordinates of b and the first of c make the third group"
    assert d.axes(groups.inference.tensors["a.weight"][0])[1:] == [three]


def test_a_shuffle_swaps_the_factors() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x.reshape(x.shape[0], 3, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape))

    groups = groups_of(Shuffled(), 3, 4, 4)
    assert types_of(groups, "a.weight")[0] == "a.weight:0.0 x a.weight:0.1"
    assert types_of(groups, "b.weight")[1] == "a.weight:0.1 x a.weight:0.0"
    assert not groups["a.weight:0.0"].primary, "the smaller factor stays by default, or both would compound"
    assert groups["a.weight:0.1"].primary


def test_a_gated_unit_splits_its_input() -> None:
    groups = groups_of(nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 5)), 6)
    (axis,) = set(d.axes(groups.inference.tensors["0.weight"][0]))
    assert types_of(groups, "0.weight")[0] == f"({axis} + {axis})"
    assert types_of(groups, "2.weight")[1] == str(axis)


def test_tied_weights_tie_their_groups() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(self.encode(x)), self.encode.weight.t())

    groups = groups_of(Tied(), 6)
    assert places(groups, "encode.weight:0") == [("encode.weight", 0), ("encode.bias", 0)]
    assert types_of(groups, "encode.weight")[1] == "6"


# Pins


def test_pins_say_who_and_why() -> None:
    class Selected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + y[:, 3, None]

    pins = {(pin.tensor, pin.dim): pin for pin in groups_of(Selected(), 6).pins}
    assert pins["a.weight", 1].causes == ("model input",)
    assert pins["b.weight", 0].causes == ("model output",)
    assert "select" in pins["a.weight", 0].causes[0]
    assert "selects a fixed index" in pins["a.weight", 0].causes[0]
    assert pins["a.weight", 0].size == 8


def test_an_operator_without_a_rule_pins_all_it_touches_and_is_named() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.renorm(self.a(x), 2, 0, 1.0))))

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.renorm(self.a(x).t(), 2, 0, 1.0).t())

    groups = groups_of(Unknown(), 6)
    assert list(groups) == ["b.weight:0"], "what lies behind the operator is free again"
    assert list(groups.inference.unknown.values()) == ["aten.renorm.default"]
    causes = {(pin.tensor, pin.dim): pin.causes for pin in groups.pins}
    assert causes["a.weight", 0] == ("renorm (renorm): operator without a rule",)
    turned = groups_of(Turned(), 6)
    assert list(turned) == [], "the first dimension that the operator touches is pinned too"


def test_types_that_cannot_agree_are_both_pinned_and_named() -> None:
    graph = trace(nn.Linear(6, 8), torch.randn(2, 6))
    inference, node = Inference(graph), next(iter(graph.graph.nodes))
    three, four = d.fresh(3), d.fresh(4)
    inference.unify(node, three, four)
    assert not d.axes(three)
    assert not d.axes(four)
    assert "types disagree" in d.reasons(three)[0]
    assert d.reasons(four) == d.reasons(three)
    assert list(inference.conflicts) == [node.name]


def test_a_rule_that_gives_other_sizes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), torch.randn(2, 6))
    monkeypatch.setitem(RULES, torch.ops.aten.relu.default, lambda t, node: t.constant(node)[::-1])
    with pytest.raises(
        GraphError, match=r"have sizes \(8, \d+\), its shape is \(\d+, 8\): the operator's rule is wrong"
    ):
        channel_groups(graph)


def test_both_operands_that_depend_on_the_input_are_inputs() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) @ self.b(x).mT

    layers = groups_of(Gram(), 4, 6).inference.layers
    assert {name: (x.inputs, x.weights) for name, x in layers.items()} == {
        "linear": (((0,),), ((1,),)),
        "linear_1": (((0,),), ((1,),)),
        "matmul": (((0,), (1,)), ()),
    }


def test_a_model_without_a_head_keeps_its_features_unless_told_otherwise() -> None:
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    assert [g.size for g in groups_of(layers, 6).values()] == [8]
    assert [g.size for g in groups_of(layers, 6, keep_outputs=False).values()] == [8, 4]


# What a ChannelGroups offers


def test_it_is_a_mapping_that_prints_itself() -> None:
    groups = groups_of(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), 6)
    assert len(groups) == 1
    assert "0.weight:0" in groups
    assert "0.weight:1" not in groups
    assert (
        str(groups) == "0.weight:0: 8 channels\n  0.weight dim 0: 0.weight:0\n  0.bias dim 0: 0.weight:0\n  "
        "2.weight dim 1: 0.weight:0"
    )
    assert groups.of_axis[groups["0.weight:0"].axis] is groups["0.weight:0"]


def test_the_coupling_graph_joins_layers_and_groups() -> None:
    groups = groups_of(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4)), 6)
    coupling = groups.graph()
    assert nx.is_bipartite(coupling)
    assert nx.shortest_path(coupling, "linear", "linear_2") == [
        "linear",
        "0.weight:0",
        "linear_1",
        "2.weight:0",
        "linear_2",
    ]
    assert coupling.nodes["2.weight:0"] == {"kind": "group", "size": 7}


def test_the_fingerprint_is_of_the_architecture() -> None:
    def fingerprint(width: int, seed: int, activation: type[nn.Module] = nn.ReLU) -> str:
        torch.manual_seed(seed)
        return groups_of(nn.Sequential(nn.Linear(6, width), activation(), nn.Linear(width, 4)), 6).fingerprint

    assert fingerprint(8, 0) == fingerprint(8, 1)
    assert len({fingerprint(8, 0), fingerprint(9, 0), fingerprint(8, 0, nn.GELU)}) == 3


@pytest.mark.parametrize("name", ["attention", "shuffle", "lstm", "relative_attention", "dense"])
def test_names_do_not_depend_on_anything_but_the_graph(name: str) -> None:
    first, second = (channel_groups(trace(SMALLEST[name](), example(name))) for _ in range(2))
    assert str(first) == str(second)
    assert first.fingerprint == second.fingerprint


def test_outputs_of_a_transposed_weight_are_its_second_dimension() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 2, 1))
    groups = channel_groups(trace(layers, (torch.randn(2, 3, 4, 4),)))
    assert {name: dim.size for name, dim in groups.outputs.items()} == {"0": 4, "1": 6, "2": 2}


def test_a_bias_names_no_group_and_of_equal_factors_the_later_is_pruned() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4, 1, 1))  # comes before the layer that makes the channels
            self.bias = nn.Parameter(torch.zeros(4))
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.bias[:, None, None])

    groups = channel_groups(trace(Scaled(), (torch.randn(2, 3, 4, 4),)))
    assert list(groups) == ["first.weight:0"]
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    factors = channel_groups(trace(grouped, (torch.randn(2, 3, 4, 4),)))
    product = next(d.resolve(m.type) for group in factors.values() for m in group.members if m.tensor == "0.weight")
    assert isinstance(product, d.Prod)
    assert [part.size for part in product.factors] == [2, 2]
    assert [factors.of_axis[axis].primary for axis in d.axes(product)] == [False, True]


def test_a_pin_counts_the_coordinates_that_stay() -> None:
    """Of a concatenation of the input with free channels, three are pinned and eight are free."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(11, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([x, self.first(x)], 1))

    groups = channel_groups(trace(Joined(), (torch.randn(2, 3, 4, 4),)))
    pins = {(pin.tensor, pin.dim): pin.size for pin in groups.pins}
    assert pins["last.weight", 1] == 3
    assert pins["first.weight", 1] == 3
    assert ("first.weight", 0) not in pins
