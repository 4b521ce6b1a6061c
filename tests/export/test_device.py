"""What is left for the device runs there by itself, and notices a file that computes something else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

from sbs_fx.export import export, write_script
from sbs_fx.plan.errors import BackendError
from tests.networks.small import Residual
from tests.oracles.gated import integer_graph

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MODULES = {"onnx": "onnxruntime", "openvino": "openvino", "litert": "litert_torch"}


@pytest.fixture(scope="module")
def static() -> fx.GraphModule:
    return integer_graph(Residual, IMAGES)


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import runpy, sys; sys.modules['torch'] = sys.modules['sbs_fx'] = None; runpy.run_path('run.py')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(("format", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml"), ("litert", ".tflite")])
def test_a_script_compares_without_torch(static: fx.GraphModule, format: str, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip(MODULES[format], reason=f"{MODULES[format]} is not installed")
    path = tmp_path / f"model{suffix}"
    export(static, (IMAGES,), format, path)
    write_script(static, (IMAGES,), format, path)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "top-1 as in torch: 10 of 10" in done.stdout
    cases = dict(np.load(tmp_path / "cases.npz"))
    np.savez(tmp_path / "cases.npz", inputs=cases["inputs"], expected=-cases["expected"])
    assert run(tmp_path).returncode == 1


def test_a_format_without_a_script_is_refused(static: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="format 'tensorrt' has no script for the device"):
        write_script(static, (IMAGES,), "tensorrt", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
