"""LiteRT and ExecuTorch have integers in layers before hardswish, gelu, norms and outputs, LiteRT weights of int4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sbs_fx.export import export
from sbs_fx.export.litert import litert_model, run_litert
from sbs_fx.export.litert_weights import four_bit_weights
from sbs_fx.export.results import integer_results
from sbs_fx.export.runtime import flat, layer_names
from sbs_fx.passes.dialects import DEQUANTIZE, QUANTIZE, static_of
from tests.oracles.gated import integer_graph

IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    """Hardswish behind a convolution and a depthwise one, squeeze and excite, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.down, self.up, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.deep(F.hardswish(self.stem(x))))
        x = x * F.hardsigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """Patches, attention and a perceptron behind norms, a residual stream in float."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch, self.qkv, self.project = (
            nn.Conv2d(3, width, 4, 4),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.last, self.head = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))
        x = x + self.second(F.gelu(self.first(self.norm(x))))
        return self.head(self.last(x)[:, 0])


class Permuted(nn.Module):
    """A depthwise convolution, a norm of channels last, a perceptron with a scale, a residual, a 2 x 2 one."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, width, 7, 1, 3, groups=width)
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(64, width)
        self.scale, self.down, self.head = (
            nn.Parameter(torch.randn(width)),
            nn.Conv2d(width, 32, 2, 2),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.second(F.gelu(self.first(self.norm(self.deep(x).permute(0, 2, 3, 1))))) * self.scale
        return self.head(self.down(x + y.permute(0, 3, 1, 2)).mean((2, 3)))


def static(make: Callable[[], nn.Module], weight_bits: int = 8) -> fx.GraphModule:
    return integer_graph(make, IMAGES, weight_bits)


def off(have: Tensor, want: Tensor) -> float:
    return float((have.reshape(want.shape) - want).norm() / want.norm())


@pytest.mark.parametrize("make", [Gated, Tokens, Permuted])
def test_results_are_quantised_where_they_were_floats_and_nowhere_else(make: Callable[[], nn.Module]) -> None:
    graph = static(make)
    integer, names = integer_results(graph, (IMAGES,))
    assert set(names) <= set(layer_names(graph))
    assert layer_names(graph)[-1] in names
    assert off(integer(IMAGES), graph(IMAGES)) <= 0.03  # 8 bits a result
    added = [node for node in integer.graph.nodes if node.target is QUANTIZE and node.name not in
             {n.name for n in graph.graph.nodes}]  # fmt: skip
    assert len(added) == len(names)
    again, none = integer_results(integer, (IMAGES,))
    assert none == ()
    assert torch.equal(again(IMAGES), integer(IMAGES))


@pytest.mark.parametrize("make", [Gated, Tokens, Permuted])
def test_every_layer_is_in_integers_and_says_what_that_took(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("litert_torch", reason="litert-torch is not installed: pip install 'sbs-fx[litert]'")
    graph = static(make, 4)
    plain = export(graph, (IMAGES,), "litert", tmp_path / "plain.tflite")
    assert plain.kernels is not None
    assert [line.partition(":")[0] for line in plain.lost] == list(plain.kernels.floating)
    assert "its result is not quantised, which calibration=IMAGES or --data does" in plain.lost[-1]
    whole = export(graph, (IMAGES,), "litert", tmp_path / "model.tflite", calibration=IMAGES)
    four = export(graph, (IMAGES,), "litert", tmp_path / "four.tflite", calibration=IMAGES, low_bits=True)
    for found, most in ((plain, 0.01), (whole, 0.03), (four, 0.03)):
        assert off(flat(found(IMAGES))[0], graph(IMAGES)) <= most
    for found in (whole, four):
        assert found.kernels is not None
        assert found.kernels.floating == ()
        assert found.lost[-1] == f"{layer_names(graph)[-1]}: its result has 8 bits"
    weights = sum(graph.get_buffer(name).numel() for name in static_of(graph).weights)
    saved = (tmp_path / "model.tflite").stat().st_size - (tmp_path / "four.tflite").stat().st_size
    assert 0.5 * weights - 600 <= saved <= 0.5 * weights + 600  # tables are written anew


@pytest.mark.parametrize("make", [Gated, Tokens, Permuted])
def test_every_layer_is_in_integers_in_executorch_too(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="executorch is not installed: pip install 'sbs-fx[executorch]'")
    graph = static(make)
    plain = export(graph, (IMAGES,), "executorch", tmp_path / "plain.pte")
    assert plain.kernels is not None
    assert [line.partition(":")[0] for line in plain.lost] == list(plain.kernels.floating)
    found = export(graph, (IMAGES,), "executorch", tmp_path / "model.pte", calibration=IMAGES)
    assert found.kernels is not None
    assert found.kernels.floating == ()
    whole, names = integer_results(graph, (IMAGES,))
    assert found.lost == tuple(f"{name}: its result has 8 bits" for name in names)
    assert off(flat(found(IMAGES))[0], whole(IMAGES)) <= 0.002  # ties


def test_codes_of_results_are_off_by_ties_alone() -> None:
    pytest.importorskip("litert_torch", reason="litert-torch is not installed: pip install 'sbs-fx[litert]'")
    graph, _ = integer_results(static(Gated), (IMAGES,))
    step = float(graph.graph.find_nodes(op="call_function", target=DEQUANTIZE)[-1].args[1])
    model = litert_model(graph, (IMAGES,))
    for reference, most in ((False, 0.01), (True, 0.2)):  # of plain kernels, which round otherwise
        have = flat(run_litert(model, graph, reference=reference)(IMAGES))[0]
        steps = ((have - graph(IMAGES)) / step).abs()
        assert float(steps.max()) <= 1.5
        assert float((steps > 0.5).float().mean()) <= most


def test_weights_of_more_bits_stay_as_they_are() -> None:
    pytest.importorskip("litert_torch", reason="litert-torch is not installed: pip install 'sbs-fx[litert]'")
    model = litert_model(static(Gated, 8), (IMAGES,))
    assert abs(len(four_bit_weights(model)) - len(model)) < 500  # written anew, tables apart
