"""The same file under other numbers of threads and other instruction sets of oneDNN, MKL and torch: in exact mode the
same codes bit for bit; else codes beside a tie may fall on the other side, and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

import sbs_fx
from tests.networks.small import net

LONG = settings.default.max_examples > 1000  # type: ignore[union-attr]
SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads, AVX2": {
        "OMP_NUM_THREADS": "2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
    "two threads": {"OMP_NUM_THREADS": "2"},
    "AVX2 and VNNI": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
    "AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX-512 and VNNI": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}  # fmt: skip
# What a process does: the codes of every activation of each file, in torch alone.
PROGRAM = """
import sys
import numpy, torch
import torch.ao.quantization.fx._decomposed
x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
class Codes(torch.fx.Interpreter):
    def run_node(self, node):
        value = super().run_node(node)
        if "quantize_per_tensor" in str(node.target) and "dequantize" not in str(node.target):
            codes.append(value.flatten().numpy())
        return value
found = {}
for path in sys.argv[2:]:
    codes = []
    with torch.no_grad():
        Codes(torch.export.load(path).module(check_guards=False)).run(x)
    found[path.rpartition("/")[2]] = numpy.concatenate(codes)
numpy.savez(sys.argv[1], **found)
"""


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Setting -> file -> codes."""
    place = tmp_path_factory.mktemp("machine")
    for exact in (False, True):
        config = sbs_fx.Config(exact=exact)
        result = sbs_fx.compress(net(), torch.randn(2, 3, 8, 8), budget="5%", method="uniform", config=config)
        result.save(place / str(exact))
        os.replace(place / str(exact) / "model.pt2", place / f"{exact}.pt2")
    chosen = list(SETTINGS) if LONG else list(SETTINGS)[:2]
    files = [str(place / f"{exact}.pt2") for exact in (False, True)]
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(place / f"{i}.npz"), *files], env={**os.environ, **SETTINGS[name]}
        )
        for i, name in enumerate(chosen)
    }
    assert [process.wait() for process in running.values()] == [0] * len(running)
    return {name: dict(np.load(place / f"{i}.npz")) for i, name in enumerate(chosen)}


def test_exact_codes_are_the_same_everywhere(codes: dict[str, dict[str, np.ndarray]]) -> None:
    first, *others = (found["True.pt2"] for found in codes.values())
    assert len(first) > 1000
    assert all(np.array_equal(first, other) for other in others)


def test_other_codes_differ_at_ties_alone(codes: dict[str, dict[str, np.ndarray]]) -> None:
    first, *others = (found["False.pt2"] for found in codes.values())
    for other in others:
        difference = np.abs(first.astype(int) - other.astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-3


def test_the_file_is_read_by_us_as_by_torch(tmp_path: Path) -> None:
    """The codes above are those that `load` gives, too."""
    model = sbs_fx.compress(net(), torch.randn(2, 3, 8, 8), budget="5%", method="uniform")
    model.save(tmp_path)
    x = torch.randn(3, 3, 8, 8)
    ours = sbs_fx.load(tmp_path / "model.pt2")(x)
    assert torch.equal(ours, torch.export.load(tmp_path / "model.pt2").module(check_guards=False)(x))
