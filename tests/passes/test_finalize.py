"""`finalize`: the static graph gives the codes of the gated one, its bits are real, and nothing of ours is left in it.

The random networks are finalised in bundles; every kind of block and each choice of its options is among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from sbs_fx.passes.capture.trace import trace
from sbs_fx.passes.channels.groups import channel_groups
from sbs_fx.passes.dialects import StoredWeight, Traced, set_dialect, static_of
from sbs_fx.passes.gates.insertion import activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.passes.pass_manager import as_pass
from sbs_fx.passes.static.finalize import finalize
from sbs_fx.plan.bits import BITS
from sbs_fx.plan.errors import GraphError
from tests.networks.models import Recipe, networks, step
from tests.oracles.gated import Together, bundles, check_static, draw_bits, fixed, gate

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed


# Kinds of blocks with layers, shared or computed weights, or batch norms in other places, all choices of their options.
KINDS = (
    "conv",
    "depthwise",
    "residual",
    "standardised",
    "summed_weights",
    "computed_weights",
    "shared",
    "transposed_conv",
    "linear",
    "lstm",
    "cells",
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
        check_static(gated, recipes[0].example(3, seed=1))
        after = gated(recipes[0].example(2, seed=1))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "finalize changed the gated graph"


@settings(max_examples=8)
@given(networks(max_blocks=4), st.integers(0, 1000), st.sampled_from([1, 5]))
def test_static_is_gated_on_random_networks(recipe: Recipe, seed: int, batch: int) -> None:
    gated = gate(recipe.build(), recipe.example(2), per_channel=seed % 4 > 0)
    draw_bits(gated, seed)
    check_static(gated, recipe.example(batch, seed=1))


def test_open_gates_give_the_float_network() -> None:
    recipe = Recipe((step("conv"), step("attention"), step("depthwise")))
    gated = gate(recipe.build(), recipe.example(2))
    static = finalize(gated)
    assert not any("quantize" in str(node.target) for node in static.graph.nodes)
    torch.testing.assert_close(static(recipe.example(3)), gated(recipe.example(3)), rtol=1e-4, atol=1e-5)


# Arithmetic


@pytest.mark.parametrize(("bits", "signed"), list(itertools.product(BITS, (True, False))))
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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["unsigned", "affine", "symmetric"])
def test_canonical_form(bits: int, kind: str) -> None:
    """Codes from zero up; from wherever zero is; on both sides of 128, for products of two activations alone."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.mT

    first = [nn.ReLU()] if kind == "unsigned" else []
    model = Square() if kind == "symmetric" else nn.Sequential(*first, nn.Conv2d(3, 4, 1)).eval()
    gated = fixed(gate(model, torch.randn(2, 3, 4, 4)), bits)
    apply_bits(gated, {}, dict.fromkeys(activation_gates(gated), bits))
    quantiser = next(iter(activation_gates(gated).values()))
    if kind == "affine":
        quantiser.set_ends(-0.25, 0.75)
    static = finalize(gated)
    quantize = static.graph.find_nodes(op="call_function", target=decomposed.quantize_per_tensor.default)[0]
    zero = {"unsigned": 0, "affine": round((2**bits - 1) / 4), "symmetric": 128}[kind]
    assert quantize.args[2:] == (zero, 0, 255, torch.uint8)
    top = 2**bits - 1 if kind != "symmetric" else 127 + 2 ** (bits - 1)
    clamps = [(aten.clamp_max.default, top)] if top < 255 else []
    if kind == "symmetric":
        clamps.append((aten.clamp_min.default, 129 - 2 ** (bits - 1)))
    node = quantize
    for target, bound in clamps:
        (node,) = node.users
        assert (node.target, node.args[1]) == (target, bound)
    last = next(iter(node.users))
    assert last.target is decomposed.dequantize_per_tensor.default
    assert last.args[1:] == quantize.args[1:]
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(static(x), gated(x))
    if kind != "symmetric":
        (stored,) = static_of(static).weights.items()
        assert stored == (f"{len(first)}.weight", StoredWeight(bits, 0))
        assert static.get_buffer(stored[0]).dtype == torch.int8


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
        (lambda g: set_dialect(g, Traced()), "expected a gated graph.* this is a traced one"),
        (lambda g: next(iter(weight_gates(g).values())).search(), "still searching"),
        (lambda g: next(iter(weight_gates(g).values())).range.data.fill_(float("nan")), "not finite"),
        (lambda g: next(iter(weight_gates(g).values())).range.data[1:2].fill_(float("inf")), "not finite"),
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


def test_scales_of_a_weight_of_several_matrices_lie_along_its_outputs() -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, self.weight)

    x = torch.randn(2, 3, 4, 5)
    static = check_static(fixed(gate(Batched(), x), 4), x)
    assert [weight.axis for weight in static_of(static).weights.values()] == [2]


def test_a_range_of_zero_is_no_error() -> None:
    x = torch.randn(2, 3, 8, 8)
    conv = nn.Conv2d(3, 4, 3).eval()
    conv.weight.data[1] = 0
    static = check_static(fixed(gate(conv, x), 4), x)
    torch.testing.assert_close(static(x)[:, 1], conv.bias[1].expand(2, 6, 6))
    assert torch.isfinite(static(x)).all()


def test_a_bias_of_its_own_beside_a_weight_that_is_not_called_weight() -> None:
    class Steps(nn.Module):
        """The same parameters at each step, as in a recurrent network."""

        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.shift = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = torch.tanh(nn.functional.linear(x, self.matrix, self.shift))
            return x

    static = check_static(fixed(gate(Steps(), torch.randn(4, 6)), 4), torch.randn(5, 6))
    assert "matrix_bias" in dict(static.named_buffers())
