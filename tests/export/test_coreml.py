"""Core ML packages hold the static graph's codes; they are not run, which needs a Mac."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sbs_fx.export import export
from sbs_fx.export.runtime import layer_names
from sbs_fx.passes import finalize, integer_grid, integer_joins
from sbs_fx.passes.gates.insertion import activation_gates, apply_bits, weight_gates
from sbs_fx.plan.errors import BackendError
from tests.networks.small import Residual
from tests.oracles.gated import gate

coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed: pip install 'sbs-fx[coreml]'")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Positions(nn.Module):
    """A table that is resized by an operator that the converter has not, and added to patches."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.patch, self.head = (
            nn.Parameter(torch.randn(1, 8, 3, 3)),
            nn.Conv2d(3, 8, 4, 4),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        table = nn.functional.interpolate(self.table, (4, 4), mode="bicubic", antialias=True)
        return self.head((self.patch(x) + table).mean((2, 3)))


def test_what_parameters_alone_make_is_a_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gated = gate(Positions().eval(), IMAGES)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), 8), dict.fromkeys(activation_gates(gated), 8))
    static = finalize(gated)
    before = static(IMAGES)
    found = export(static, (IMAGES,), "coreml", tmp_path / "model.mlpackage")
    assert found.kernels is not None
    assert list(found.kernels.integer) == layer_names(static)
    assert torch.equal(static(IMAGES), before)


def test_a_package_holds_the_codes_and_is_not_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gated = gate(Residual().eval(), IMAGES)
    weights = dict(zip(weight_gates(gated), (8, 6, 4, 3, 2), strict=True))
    apply_bits(gated, weights, dict(zip(activation_gates(gated), (8, 8, 4, 8), strict=True)))
    static = integer_grid(integer_joins(finalize(gated), [(IMAGES,)]))
    for _ in range(2):  # the second time in the place of the first
        found = export(static, (IMAGES,), "coreml", tmp_path / "model.mlpackage")
    assert [file.name for file in tmp_path.iterdir()] == ["model.mlpackage"]
    assert found.kernels is not None
    assert list(found.kernels.integer) == layer_names(static)
    spec = coremltools.models.MLModel(str(tmp_path / "model.mlpackage"), skip_model_load=True).get_spec()
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    kinds = [operator.type for operator in block.operations]
    assert kinds.count("constexpr_affine_dequantize") == len(layer_names(static))
    assert list(spec.description.input[0].type.multiArrayType.shape) == [1, 3, 16, 16]
    with pytest.raises(BackendError, match="needs a Mac"):
        found(IMAGES)
