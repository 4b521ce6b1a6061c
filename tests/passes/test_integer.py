"""`integer_joins` and `integer_grid`: what they promise, on every kind of block and on a network one can read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import sbs_fx
from sbs_fx.export import save_pt2
from sbs_fx.passes import finalize, integer_grid, integer_joins
from sbs_fx.passes.dialects import DEQUANTIZE, QUANTIZE, quantizers, static_of
from sbs_fx.passes.gates.insertion import activation_gates, apply_bits, weight_gates
from sbs_fx.passes.graph import attribute
from sbs_fx.passes.oracles.static import count_levels
from sbs_fx.plan.bits import BITS
from tests.networks.blocks import Floor
from tests.networks.models import Recipe
from tests.networks.small import LAYERS, Residual
from tests.oracles.gated import Together, bundles, draw_bits, fixed, gate, nodes

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
BUNDLES = bundles()
IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def residual(bits: int) -> fx.GraphModule:
    torch.manual_seed(0)
    gated = gate(Residual().eval(), IMAGES)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), bits), dict.fromkeys(activation_gates(gated), bits))
    return finalize(gated)


def joined(bits: int, *, exact: bool = False) -> fx.GraphModule:
    return integer_grid(integer_joins(residual(bits), [(IMAGES,)]), exact=exact)


@pytest.mark.parametrize("name", BUNDLES)
def test_every_kind_of_block_keeps_its_function_and_its_form(name: str, tmp_path: Path) -> None:
    recipes: list[Recipe] = BUNDLES[name]
    x = recipes[0].example()
    gated = gate(Together(recipes), x)
    draw_bits(gated, 0, bits=(8,), per_channel=False)
    static = finalize(gated)
    for result in (integer_joins(static, [(x,)], method="minmax"), integer_grid(static)):
        for plain, integer in zip(static(x), result(x), strict=True):
            assert float((plain - integer).norm()) <= 0.1 * float(plain.norm())
    result = integer_grid(integer_joins(static, [(x,)]))
    assert list(static_of(result).activations) == [
        name for _, last in quantizers(result.graph) for name, a in static_of(result).activations.items()
        if a.values == last.name
    ]  # fmt: skip
    assert all(count.is_real for count in count_levels(result, (x,)))
    save_pt2(result, x, tmp_path / "model.pt2")
    loaded = sbs_fx.load(tmp_path / "model.pt2")
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), result(x), strict=True))


def test_no_float_tensor_is_left_between_the_first_and_the_last_layer() -> None:
    static = joined(8)
    floats = (aten.add.Tensor, aten.max_pool2d.default, aten.mean.dim, aten.conv2d.default, aten.linear.default)
    for node in nodes(static, *floats):
        inputs = [source for source in node.all_input_nodes if source.op == "call_function"]
        assert inputs
        assert all(s.target in (DEQUANTIZE, decomposed.dequantize_per_channel.default) for s in inputs), node


@pytest.mark.parametrize("bits", BITS)
def test_a_tensor_is_quantised_once(bits: int) -> None:
    static = joined(bits)
    sources = [first.args[0] for first, _ in quantizers(static.graph)]
    assert len(sources) == len(set(sources))


def test_codes_of_eight_bits_need_no_clip() -> None:
    """Affine ones have all of them; symmetric ones -127 on in a static graph, where integer kernels give -128 too."""

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.mT

    assert not nodes(residual(8), aten.clamp_min.default, aten.clamp_max.default)
    static = finalize(fixed(gate(Square(), IMAGES), 8))
    assert [node.args[1] for node in nodes(static, aten.clamp_min.default)] == [1, 1]
    assert not nodes(integer_joins(static, [(IMAGES,)]), aten.clamp_min.default)


def test_a_pool_gives_the_codes_that_it_takes() -> None:
    plain, static = residual(8), joined(8)
    (pool,) = nodes(static, aten.max_pool2d.default)
    after = next(user for user in pool.users if user.target is QUANTIZE)
    assert pool.args[0].args[1:] == after.args[1:]  # type: ignore[union-attr]
    (old,) = nodes(plain, aten.max_pool2d.default)
    assert next(iter(old.users)).args[1] == after.args[1]  # of the gate, so that the pool changes no code


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_coarse_codes_are_the_same_behind_fine_ones(bits: int) -> None:
    static = integer_joins(residual(bits), [(IMAGES,)])
    pairs = [
        (first, first.args[0].args[0]) for first, _ in quantizers(static.graph) if first.args[0].target is DEQUANTIZE
    ]
    assert len(pairs) == 2  # what the pool gives has one scale; of the two that adds and layers read, both are chained
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
    for coarse, fine in pairs:
        assert abs(coarse.args[1] / fine.args[1] % 2 - 1) < 1e-9  # type: ignore[union-attr,operator]
        direct = QUANTIZE(x, *coarse.args[1:])  # type: ignore[arg-type]
        chained = QUANTIZE(DEQUANTIZE(QUANTIZE(x, *fine.args[1:]), *fine.args[1:]), *coarse.args[1:])  # type: ignore[union-attr]
        top = fine.args[1] * 255  # type: ignore[union-attr,operator]
        assert torch.equal(direct[x < top], chained[x < top])


def test_what_is_broadcast_into_an_add_stays_in_float() -> None:
    """Only the operand that a convolution writes gets codes; a parameter, and one number a channel, have none."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.line = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Linear(16, 1)
            self.shift = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x) + self.shift) + self.line(x[:, :1, :1]))

    static = integer_joins(finalize(fixed(gate(Shifted().eval(), IMAGES), 8)), [(IMAGES,)])
    joins = [name for name in static_of(static).activations if name.endswith("_joined")]
    assert joins == ["conv2d_joined", "relu_joined"]


@pytest.mark.parametrize("bits", BITS)
def test_a_ceiling_that_codes_have_anyway_becomes_a_relu(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.Hardtanh(0, 2), nn.Conv2d(8, 4, 1)
    ).eval()
    images = 9 * IMAGES
    gated = gate(model, images)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), 8), dict.fromkeys(activation_gates(gated), bits))
    static = finalize(gated)
    result = integer_joins(static, [(images,)])
    assert not nodes(result, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
    assert torch.equal(result(images), static(images))


@pytest.mark.parametrize("times", [1.25, 2])
def test_a_ceiling_below_the_codes_stays(times: float) -> None:
    gated = gate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(0, 0.25), nn.Conv2d(8, 4, 1)).eval(), 9 * IMAGES)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), 8), dict.fromkeys(activation_gates(gated), 8))
    for quantiser in activation_gates(gated).values():
        quantiser.range.data.mul_(times)
    static = finalize(gated)
    result = integer_joins(static, [(IMAGES,)])
    assert nodes(result, aten.hardtanh.default, aten.clamp.default)
    assert torch.equal(result(9 * IMAGES), static(9 * IMAGES))


@pytest.mark.parametrize("floor", [Floor(), nn.Hardtanh(0.2, 1)])
def test_a_clamp_from_another_number_than_zero_is_no_ceiling(floor: nn.Module) -> None:
    gated = gate(nn.Sequential(nn.Conv2d(3, 8, 3), floor, nn.Conv2d(8, 4, 1)).eval(), IMAGES)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), 8), dict.fromkeys(activation_gates(gated), 8))
    static = finalize(gated)
    assert torch.equal(integer_joins(static, [(IMAGES,)])(IMAGES), static(IMAGES))


def test_transformer_streams_stay_in_float() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True).eval()
    gated = gate(layer, torch.randn(2, 5, 16))
    draw_bits(gated, 0, bits=(8,), per_channel=False)
    static = finalize(gated)
    before = len(static_of(static).activations)
    assert len(static_of(integer_joins(static, [(torch.randn(2, 5, 16),)])).activations) == before


def test_a_stream_ends_where_a_function_mixes_its_elements() -> None:
    """What a softmax gives is no stream of a convolution, so its add stays in float."""

    class Attended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            share = torch.softmax(self.first(x), 1)
            return self.last(share + share.exp())

    static = finalize(fixed(gate(Attended().eval(), IMAGES), 8))
    assert static_of(integer_joins(static, [(IMAGES,)])).activations.keys() == static_of(static).activations.keys()


@pytest.mark.parametrize("bits", BITS)
def test_biases_are_whole_steps(bits: int) -> None:
    static = joined(bits)
    layers = [n for n in nodes(static, aten.conv2d.default, aten.linear.default) if len(n.args) > 2 and n.args[2]]
    assert layers
    for layer in layers:
        source, weight, bias = layer.args[:3]
        step = source.args[1] * attribute(static, weight.args[1].target).double()  # type: ignore[union-attr]
        steps = attribute(static, bias.target).double() / step  # type: ignore[union-attr]
        assert bool(((steps - steps.round()).abs() <= 1e-7 * steps.abs() + 1e-9).all())  # as float32 holds them


@pytest.mark.parametrize("bits", BITS)
def test_exact_graphs_do_not_depend_on_precision_or_order(bits: int) -> None:
    static = joined(bits, exact=True)
    expected = static(IMAGES)
    for node in nodes(static, aten.conv2d.default):  # the same sums, in float64 and in another order
        groups = node.args[6] if len(node.args) > 6 else 1
        assert groups == 1
        node.target = _conv_in_float64
    static.recompile()
    assert torch.equal(static(IMAGES), expected)


def _conv_in_float64(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> Tensor:
    x, weight = x.double().flip(1), weight.double().flip(1)
    return aten.conv2d.default(x, weight, None if bias is None else bias.double(), *rest).float()


@pytest.mark.parametrize("bits", BITS)
def test_exact_scales_are_powers_of_two(bits: int) -> None:
    static = joined(bits, exact=True)
    scales = [torch.tensor([first.args[1]]) for first, _ in quantizers(static.graph)]
    scales += [attribute(static, f"{name}_scale") for name in static_of(static).weights]
    assert all(bool((scale.log2() == scale.log2().round()).all()) for scale in scales)
    assert all(count.is_real for count in count_levels(static, (IMAGES,)))
    assert static_of(static).exact


def test_exact_scales_go_up_at_eight_bits_and_else_to_the_nearest() -> None:
    static = integer_joins(residual(4), [(IMAGES,)])
    exact = integer_grid(static, exact=True)
    up = []
    for name, activation in static_of(static).activations.items():
        before, after = (math.log2(scale_of(graph, name)) for graph in (static, exact))
        assert after == (math.ceil(before) if activation.bits == 8 else round(before))
        up.append(activation.bits == 8 and round(before) < before)
    assert any(up), "the nearest would have been below"


def scale_of(static: fx.GraphModule, name: str) -> float:
    """The scale of an activation."""
    return next(
        last.args[1] for _, last in quantizers(static.graph) if last.name == static_of(static).activations[name].values
    )


def test_a_channel_that_a_norm_silences_gets_a_usable_scale() -> None:
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 0.0, 1.5
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    gated = gate(model, IMAGES)
    draw_bits(gated, 0, bits=(8,), per_channel=False)
    static = finalize(gated)
    for exact in (False, True):
        result = integer_grid(static, exact=exact)
        assert all(bool((attribute(result, f"{n}_scale") > 0).all()) for n in static_of(result).weights)
        assert float((result(IMAGES) - static(IMAGES)).norm()) <= 0.1 * float(static(IMAGES).norm())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["transposed", "grouped transposed"])
def test_transposed_convolutions_with_a_folded_norm(name: str, exact: bool) -> None:
    x = torch.randn(4, 8, 9, 9)
    gated = gate(LAYERS[name](), x)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), 8), dict.fromkeys(activation_gates(gated), 8))
    static = finalize(gated)
    result = integer_grid(static, exact=exact)
    scale = attribute(result, "layer.weight_scale")
    assert bool((scale > 0).all())
    assert not exact or bool((scale.log2() == scale.log2().round()).all())
    assert float((result(x) - static(x)).norm()) <= 0.1 * float(static(x).norm())


def test_compress_makes_integer_joins_unless_told_not_to() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    results = {}
    for joins in (True, False):
        config = sbs_fx.Config(integer_joins=joins, weight_bits=8, activation_bits=8)
        results[joins] = sbs_fx.compress(model, IMAGES, budget=0.1, method="uniform", config=config, data=[IMAGES])
    assert any(name.endswith("_joined") for name in static_of(results[True].model).activations)
    assert not any(name.endswith("_joined") for name in static_of(results[False].model).activations)
    difference = results[True].model(IMAGES) - results[False].model(IMAGES)
    assert 0 < float(difference.norm()) < 0.1 * float(results[False].model(IMAGES).norm())
