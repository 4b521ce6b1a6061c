"""`finalize`: the static graph gives the codes of the gated one, its bits are real, and nothing of ours is left in it.

The random networks are finalised in bundles; every kind of block and each choice of its options is among them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from sbs_fx.errors import GraphError
from sbs_fx.passes.channel_groups import channel_groups
from sbs_fx.passes.finalize import StoredWeight, finalize
from sbs_fx.passes.fold import TRANSPOSED
from sbs_fx.passes.insert_gates import activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.passes.pass_manager import as_pass
from sbs_fx.passes.trace import trace
from sbs_fx.verify import compare_static, count_levels
from tests.gated import Together, bundles, draw_bits, gate
from tests.models import Recipe, networks, step

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

# Rounding ties after folding: one code in 10,000, by one step; a small tensor may have one all the same.
TIES = 1e-4


def check(gated: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    static = finalize(gated)
    rows = compare_static(gated, static, (x,))
    assert {r.tensor for r in rows} == {name for name, g in activation_gates(gated).items() if g.bits != 32}
    assert all(r.largest_step <= 1 for r in rows)
    assert all(r.differing <= max(1, TIES * r.positions) for r in rows)
    assert sum(r.differing for r in rows) <= max(2, TIES * sum(r.positions for r in rows))
    levels = count_levels(static, (x,))
    assert {c.tensor: c.bits for c in levels if c.kind == "activation"} == {
        name: g.bits for name, g in activation_gates(gated).items() if g.bits != 32
    }
    assert all(c.is_real for c in levels), [c for c in levels if not c.is_real]
    return static


def is_plain(static: fx.GraphModule) -> bool:
    """ATen and `quantized_decomposed` only, and every tensor is read."""
    for node in static.graph.nodes:
        known = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in (
            "aten",
            "quantized_decomposed",
        )
        sizes = node.target in (operator.getitem, operator.mul, operator.floordiv, operator.add, operator.sub)
        if node.op == "call_module" or (node.op == "call_function" and not known and not sizes):
            return False
    read = {node.target for node in static.graph.find_nodes(op="get_attr")}
    held = {name for name, _ in [*static.named_parameters(), *static.named_buffers()]}
    return read == held and not static.training


# Kinds of blocks with layers, shared or computed weights, or batch norms in other places, all choices of their options.
KINDS = (
    "conv",
    "depthwise",
    "residual",
    "standardised",
    "summed_weights",
    "shared",
    "transposed_conv",
    "linear",
    "lstm",
)
BUNDLES = bundles(KINDS)


@pytest.mark.parametrize("name", BUNDLES)
def test_static_is_gated_on_every_kind_of_block(name: str) -> None:
    recipes = BUNDLES[name]
    x = recipes[0].example(2)
    gated = gate(Together(recipes), x)
    for seed, per_channel in ((0, True), (1, False)):
        draw_bits(gated, seed, per_channel=per_channel)
        before = gated(recipes[0].example(2, seed=1))
        static = check(gated, recipes[0].example(3, seed=1))
        assert is_plain(static)
        after = gated(recipes[0].example(2, seed=1))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "finalize changed the gated graph"


@settings(max_examples=8)
@given(networks(max_blocks=4), st.integers(0, 1000), st.sampled_from([1, 5]))
def test_static_is_gated_on_random_networks(recipe: Recipe, seed: int, batch: int) -> None:
    gated = gate(recipe.build(), recipe.example(2), per_channel=seed % 4 > 0)
    draw_bits(gated, seed)
    assert is_plain(check(gated, recipe.example(batch, seed=1)))


def test_open_gates_give_the_float_network() -> None:
    recipe = Recipe((step("conv"), step("attention"), step("depthwise")))
    gated = gate(recipe.build(), recipe.example(2))
    static = finalize(gated)
    assert not any("quantize" in str(node.target) for node in static.graph.nodes)
    torch.testing.assert_close(static(recipe.example(3)), gated(recipe.example(3)), rtol=1e-4, atol=1e-5)


# Arithmetic


@pytest.mark.parametrize(("bits", "signed"), list(itertools.product((2, 4, 8), (True, False))))
def test_the_canonical_nodes_are_the_quantiser_bit_for_bit(bits: int, signed: bool) -> None:
    class Identity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x if signed else x.abs()) @ torch.eye(4)

    for width in (1.0, 0.3, 7.77, 1e-5, 3e4):
        gated = gate(Identity(), torch.randn(2, 4))
        (quantizer,) = activation_gates(gated).values()
        quantizer.range.data.fill_(width)
        apply_bits(gated, {}, dict.fromkeys(activation_gates(gated), bits))
        static = finalize(gated)
        step = quantizer.scale()
        ties = (torch.arange(-300, 300) + 0.5) * step
        x = torch.cat([ties, ties.nextafter(torch.tensor(9e9)), torch.randn(20_000) * width, torch.tensor([0.0, 1e9])])
        x = torch.cat([x, x.new_zeros(-len(x) % 4)]).view(-1, 4)
        assert torch.equal(static(x), gated(x))


@pytest.mark.parametrize(
    ("bits", "signed", "clamps"),
    [
        (8, False, []),
        (8, True, [(aten.clamp_min.default, 1)]),
        (4, False, [(aten.clamp_max.default, 15)]),
        (4, True, [(aten.clamp_max.default, 135), (aten.clamp_min.default, 121)]),
        (2, False, [(aten.clamp_max.default, 3)]),
        (2, True, [(aten.clamp_max.default, 129), (aten.clamp_min.default, 127)]),
    ],
)
def test_canonical_form(bits: int, signed: bool, clamps: list[tuple[Any, int]]) -> None:
    model = nn.Sequential(*([] if signed else [nn.ReLU()]), nn.Conv2d(3, 4, 1)).eval()
    gated = fixed(gate(model, torch.randn(2, 3, 4, 4)), bits)
    apply_bits(gated, {}, dict.fromkeys(activation_gates(gated), bits))
    static = finalize(gated)
    (quantize,) = static.graph.find_nodes(op="call_function", target=decomposed.quantize_per_tensor.default)
    zero = 128 if signed else 0
    assert quantize.args[2:] == (zero, 0, 255, torch.uint8)
    node = quantize
    for target, bound in clamps:
        (node,) = node.users
        assert (node.target, node.args[1]) == (target, bound)
    (last,) = node.users
    assert last.target is decomposed.dequantize_per_tensor.default
    assert last.args[1:] == quantize.args[1:]
    (stored,) = static.meta["weights"].items()
    assert stored == ("0.weight" if signed else "1.weight", StoredWeight(bits, 0))
    assert static.get_buffer(stored[0]).dtype == torch.int8


def fixed(gated: fx.GraphModule, bits: Any) -> fx.GraphModule:
    """Weights at these bits (a number, or one a channel), activations at 8."""
    apply_bits(gated, dict.fromkeys(weight_gates(gated), bits), dict.fromkeys(activation_gates(gated), 8))
    return gated


def nodes(static: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    return [node for node in static.graph.nodes if node.target in targets]


# Folding


class Normed(nn.Module):
    """A layer, its batch norm with scales of both signs and one of zero, and a layer that quantises what comes out."""

    def __init__(self, layer: nn.Module, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.head = layer, norm, head
        norm.weight.data.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(norm.weight.shape) < 0.5, -1.0, 1.0))
        norm.weight.data[0] = 0.0
        norm.bias.data.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(x)).relu())


LAYERS: dict[str, Callable[[], Normed]] = {
    "conv": lambda: Normed(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "no bias": lambda: Normed(nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "same": lambda: Normed(nn.Conv2d(8, 12, 3, padding="same"), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "grouped": lambda: Normed(nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "depthwise": lambda: Normed(nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1)),
    "transposed": lambda: Normed(nn.ConvTranspose2d(8, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)),
    "grouped transposed": lambda: Normed(
        nn.ConvTranspose2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)
    ),
    "linear": lambda: Normed(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 2)),
    "conv1d": lambda: Normed(nn.Conv1d(8, 12, 3), nn.BatchNorm1d(12), nn.Conv1d(12, 2, 1)),
    "conv3d": lambda: Normed(nn.Conv3d(8, 12, 3), nn.BatchNorm3d(12), nn.Conv3d(12, 2, 1)),
}
SHAPES = {"linear": (64, 8), "conv1d": (8, 8, 30), "conv3d": (2, 8, 6, 6, 6)}


@pytest.mark.parametrize("bits", [8, 2, "per channel", 32])
@pytest.mark.parametrize("name", LAYERS)
def test_batch_norm_is_folded_and_codes_stay(name: str, bits: Any) -> None:
    model = LAYERS[name]()
    x = torch.randn(SHAPES.get(name, (2, 8, 12, 12)))
    gated = gate(model, x)
    quantizer = weight_gates(gated)["layer"]
    mixed = [(0, 2, 4, 8)[i % 4] for i in range(quantizer.channels or 0)]
    apply_bits(gated, {"layer": mixed if bits == "per channel" else bits}, {"x": 8, "relu": 8})
    static = check(gated, x)
    assert not nodes(static, aten.batch_norm.default)
    assert not [key for key in static.state_dict() if "norm" in key]
    if bits == 32:
        assert static.meta["weights"] == {}
        return
    codes = static.get_buffer("layer.weight")
    wanted = quantizer.codes(model.layer.weight)
    assert torch.equal(codes.abs().int(), wanted.abs())
    mirrored = model.norm.weight < 0
    groups = model.layer.groups if hasattr(model.layer, "groups") else 1
    if nodes(static, *TRANSPOSED):
        rows = mirrored.view(groups, -1).repeat_interleave(wanted.shape[0] // groups, 0)
        mirrored = rows.view(*rows.shape, *[1] * (wanted.ndim - 2))
    else:
        mirrored = mirrored.view(-1, *[1] * (wanted.ndim - 1))
    assert torch.equal(codes.int(), torch.where(mirrored, -wanted, wanted))
    assert (static.get_buffer("layer.weight_scale") >= 0).all()


def test_flattened_tokens_are_folded_through() -> None:
    class Tokens(Normed):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.head(self.norm(y.flatten(0, 1)).reshape_as(y))

    x = torch.randn(4, 7, 8)
    model = Tokens(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 2))
    static = check(fixed(gate(model, x), 4), x)
    assert not nodes(static, aten.batch_norm.default)


def test_batch_norm_before_its_layer_stays_as_it_is() -> None:
    x = torch.randn(2, 3, 8, 8)
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=0.25)
    static = check(fixed(gate(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 4, 3)).eval(), x), 4), x)
    (node,) = nodes(static, aten.batch_norm.default)
    assert node.args[5:] == (False, 0.25, 1e-3, True)


def test_a_shared_weight_is_stored_once_and_not_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.conv(self.a(self.conv(x))))

    x = torch.randn(2, 4, 8, 8)
    static = check(fixed(gate(Twice().eval(), x), 4), x)
    assert len(nodes(static, aten.batch_norm.default)) == 2
    assert list(static.meta["weights"]) == ["conv.weight"]


def test_a_computed_weight_is_evaluated_once() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.extra = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            w = self.v - self.v.mean((1, 2, 3), keepdim=True) + self.extra
            return torch.nn.functional.conv2d(x, w)

    x = torch.randn(2, 3, 8, 8)
    for bits in (4, 32):
        static = check(fixed(gate(Standardised(), x), bits), x)
        assert not list(static.parameters())
        assert not nodes(static, aten.mean.dim, aten.sub.Tensor, aten.add.Tensor)
        assert len(static.meta["weights"]) == (bits == 4)


def test_a_float_parameter_that_something_else_reads_is_kept() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.linear.weight.sum()

    x = torch.randn(5, 4)
    static = check(fixed(gate(Tied(), x), 4), x)
    assert static.get_parameter("linear.weight").is_floating_point()
    (codes,) = static.meta["weights"]
    assert static.get_buffer(codes).dtype == torch.int8


# The oracle itself


def test_the_oracle_sees_a_wrong_weight() -> None:
    model, x = LAYERS["conv"](), torch.randn(2, 8, 12, 12)
    gated = fixed(gate(model, x), 4)
    for channel in range(1, 12):
        static = finalize(gated)
        static.get_buffer("layer.weight")[channel].neg_()
        (row,) = [r for r in compare_static(gated, static, (x,)) if r.tensor == "relu"]
        assert row.differing > TIES * row.positions
    static = finalize(gated)
    static.get_buffer("layer.weight").random_(-100, 100)
    assert [c.tensor for c in count_levels(static, (x,)) if not c.is_real] == ["layer.weight"]


def test_the_oracle_tells_of_one_layer_alone() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    gated = fixed(gate(model, x), 8)
    static = finalize(gated)
    static.get_buffer("0.weight_scale").mul_(1.5)
    assert [r.differing > 0 for r in compare_static(gated, static, (x,))] == [False, True, False]


# Contracts


def test_pass_manager() -> None:
    x = torch.randn(2, 3, 8, 8)
    gated = fixed(gate(nn.Conv2d(3, 4, 3).eval(), x), 4)
    result = PassManager(passes=[as_pass(finalize)])(gated)
    assert torch.equal(result.graph_module(x), finalize(gated)(x))


def test_tuple_outputs_keep_their_structure() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"a": self.conv(x), "b": [self.conv(y), x + y]}

    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    graph_module = trace(Two(), (x, y))
    gated = insert_gates(graph_module, channel_groups(graph_module), channels=False)
    result = finalize(fixed(gated, 8))(x, y)
    assert result.keys() == {"a", "b"}
    assert len(result["b"]) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g: g.meta.pop("weight_gates"), "no gates"),
        (lambda g: next(iter(weight_gates(g).values())).search(), "still searching"),
        (lambda g: next(iter(weight_gates(g).values())).range.data.fill_(float("nan")), "not finite"),
        (lambda g: setattr(next(iter(weight_gates(g).values())), "grid", "paper"), "paper grid"),
        (lambda g: g.add_module("stranger", nn.Identity()) or call(g, "stranger"), "no static form"),
    ],
)
def test_bad_graphs(spoil: Callable[[fx.GraphModule], Any], message: str) -> None:
    gated = fixed(gate(nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)), 4)
    spoil(gated)
    with pytest.raises(GraphError, match=message):
        finalize(gated)


def call(gated: fx.GraphModule, name: str) -> None:
    (output,) = gated.graph.find_nodes(op="output")
    with gated.graph.inserting_before(output):
        output.replace_input_with(
            output.all_input_nodes[0], gated.graph.call_module(name, (output.all_input_nodes[0],))
        )


def test_channel_gates_and_float64_are_refused() -> None:
    x = torch.randn(2, 3, 8, 8)
    graph_module = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)).eval(), x)
    with pytest.raises(GraphError, match="channel gates"):
        finalize(insert_gates(graph_module, channel_groups(graph_module)))
    gated = fixed(gate(nn.Conv2d(3, 4, 3).double().eval(), x.double()), 4)
    with pytest.raises(GraphError, match="float64"):
        finalize(gated)


def test_a_range_of_zero_is_no_error() -> None:
    x = torch.randn(2, 3, 8, 8)
    conv = nn.Conv2d(3, 4, 3).eval()
    conv.weight.data[1] = 0
    static = check(fixed(gate(conv, x), 4), x)
    torch.testing.assert_close(static(x)[:, 1], conv.bias[1].expand(2, 6, 6))
    assert torch.isfinite(static(x)).all()
