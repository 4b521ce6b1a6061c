"""LiteRT files compute the static graph in int8, under XNNPACK and under the reference kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from sbs_fx.export import TARGETS, export
from sbs_fx.export.litert import litert_model, run_litert
from sbs_fx.export.runtime import flat, layer_names
from sbs_fx.export.signed import clip_values, shift_codes
from sbs_fx.passes import finalize, integer_grid, integer_joins
from sbs_fx.passes.gates.insertion import activation_gates, apply_bits, weight_gates
from sbs_fx.passes.graph import copy_graph
from sbs_fx.plan.errors import BackendError
from tests.networks.small import Residual
from tests.oracles.gated import gate

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def static(weight_bits: tuple[Any, ...], activation_bits: tuple[int, ...], *, exact: bool) -> fx.GraphModule:
    torch.manual_seed(0)
    gated = gate(Residual().eval(), IMAGES)
    weights = dict(zip(weight_gates(gated), weight_bits, strict=True))
    apply_bits(gated, weights, dict(zip(activation_gates(gated), activation_bits, strict=True)))
    return integer_grid(integer_joins(finalize(gated), [(IMAGES,)]), exact=exact)


@pytest.fixture(scope="module")
def eight() -> fx.GraphModule:
    """Scales are powers of two."""
    return static((8,) * 5, (8,) * 4, exact=True)


@pytest.fixture(scope="module")
def mixed() -> fx.GraphModule:
    """Weights of 2 to 8 bits, one of several, and activations of 3 to 8."""
    return static((6, [3, 5, 6, 8, 0, 2, 4, 5] * 2, 4, 3, 2), (8, 5, 3, 6), exact=False)


@pytest.mark.parametrize("fused", [True, False])
def test_signed_codes_are_the_same_function(mixed: fx.GraphModule, fused: bool) -> None:
    signed = copy_graph(mixed)
    clip_values(signed.graph, fused=fused)
    shift_codes(signed.graph)
    signed.recompile()
    assert torch.equal(signed(IMAGES), mixed(IMAGES))
    for node in signed.graph.nodes:
        assert torch.uint8 not in node.args


@pytest.fixture(scope="module")
def model(eight: fx.GraphModule) -> bytes:
    pytest.importorskip("litert_torch", reason="litert-torch is not installed: pip install 'sbs-fx[litert]'")
    return litert_model(eight, (IMAGES,))


def test_a_file_is_bit_equal_and_in_integers_at_any_batch_size(eight: fx.GraphModule, model: bytes) -> None:
    found = run_litert(model, eight)
    assert found.kernels is not None
    *inner, last = layer_names(eight)
    assert found.kernels.floating == (last,)  # its result is not quantised
    assert list(found.kernels.integer) == inner
    for batch in (1, 3):
        want = eight(IMAGES[:batch])
        assert torch.allclose(flat(found(IMAGES[:batch]))[0], want, atol=1e-6)  # as the last layer sums floats


def test_reference_kernels_are_close(eight: fx.GraphModule, model: bytes) -> None:
    want, have = eight(IMAGES), flat(run_litert(model, eight, reference=True)(IMAGES))[0]
    assert float((want - have).norm()) <= 0.1 * float(want.norm())  # powers of two as scales make many ties


def test_a_file_of_few_bits_and_of_two_images_takes_any_number(mixed: fx.GraphModule, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch", reason="litert-torch is not installed: pip install 'sbs-fx[litert]'")
    found = export(mixed, (IMAGES,), "litert", tmp_path / "model.tflite", batch=2)
    assert found.kernels is not None
    assert found.kernels.floating == (layer_names(mixed)[-1],)
    for batch in (1, 2, 3):
        want = mixed(IMAGES[:batch])
        assert float((want - flat(found(IMAGES[:batch]))[0]).norm()) <= 0.2 * float(want.norm())  # a step of 3 bits


def test_a_tool_that_is_not_installed_is_named(
    mixed: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "litert_torch", None)  # importing it raises ImportError
    with pytest.raises(BackendError, match=r"sbs-fx\[litert\]"):
        TARGETS["litert"].write(mixed, (IMAGES,), str(tmp_path / "model.tflite"), {})
    assert not list(tmp_path.iterdir())
