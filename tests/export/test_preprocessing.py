"""Files that take pictures as bytes compute what the graph does of normalised floats; bad input is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from sbs_fx.export import export, save_pt2
from sbs_fx.export.preprocessing import with_preprocessing
from sbs_fx.export.runtime import flat
from sbs_fx.passes.dialects import Static, verify
from sbs_fx.plan.errors import BackendError, InputError
from tests.networks.small import Residual
from tests.oracles.commands import run_command
from tests.oracles.gated import integer_graph

IMAGES = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
FACTS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PICTURES = torch.randint(256, (3, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(pictures: Tensor) -> Tensor:
    """As torchvision does: bytes to 0..1, then mean and standard deviation."""
    mean, std = (torch.tensor(FACTS[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return pictures.float().div(255).sub(mean).div(std)


def made(*, exact: bool) -> fx.GraphModule:
    return integer_graph(Residual, IMAGES, exact=exact)


@pytest.fixture(scope="module")
def static() -> fx.GraphModule:
    return made(exact=True)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_graph_of_pictures_is_the_graph_of_normalised_floats(static: fx.GraphModule, layout: str) -> None:
    graph, (example,), facts = with_preprocessing(static, (IMAGES,), layout, {**FACTS, "classes": ["a"]})
    verify(graph, Static)
    pictures = PICTURES if layout == "NCHW" else PICTURES.permute(0, 2, 3, 1)
    assert example.shape[1:] == pictures.shape[1:]
    assert torch.equal(graph(pictures), static(normalised(PICTURES)))
    assert facts["preprocess"]["layout"] == layout
    assert facts["classes"] == ["a"]
    assert "pictures_mean" not in dict(static.named_buffers())  # the graph itself stays


@pytest.mark.parametrize(("format", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml"), ("tensorrt", ".onnx")])
def test_a_file_takes_pictures(format: str, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip({"tensorrt": "onnx"}.get(format, format), reason=f"{format} is not installed")
    path = tmp_path / f"model{suffix}"
    static = made(exact=False)
    found = export(static, (IMAGES,), format, path, metadata=FACTS, preprocess="NHWC")
    have, want = flat(found(PICTURES.permute(0, 2, 3, 1)))[0], static(normalised(PICTURES))
    # the last layer sums floats; OpenVINO multiplies where torch divides; TensorRT's codes behind relu have seven bits
    most = {"onnx": 1e-6, "openvino": 0.01, "tensorrt": 0.1}[format]
    assert float((have - want).norm()) <= most * float(want.norm())
    with pytest.raises(InputError, match="has dtype torch.float32; the graph takes .*uint8"):
        found(IMAGES)


def test_a_file_says_what_is_inside(static: fx.GraphModule, tmp_path: Path) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    export(static, (IMAGES,), "onnx", tmp_path / "model.onnx", metadata=FACTS, preprocess="NHWC")
    file = onnx.load(tmp_path / "model.onnx")
    facts = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert facts["size"] == [16, 12]
    assert facts["preprocess"] == {
        "layout": "NHWC", "dtype": "uint8", "inside": "(x / 255 - mean) / std", "outside": "resize, crop",
    }  # fmt: skip
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("input", "tensor(uint8)", [16, 12, 3])
    (logits,) = session.run(["logits"], {"input": PICTURES.permute(0, 2, 3, 1).numpy()})
    assert np.array_equal(logits, static(normalised(PICTURES)).numpy())


def test_bad_pictures_are_refused(static: fx.GraphModule, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for layout, facts, message in (
        ("HWC", FACTS, "layout 'HWC'; expected one of"),
        ("NHWC", {}, "need the mean of images, 3 numbers; got None"),
        ("NHWC", {**FACTS, "std": [1.0, 0.0, 1.0]}, "need the std of images"),
        ("NHWC", {**FACTS, "mean": [0.5, 0.5]}, r"got \[0.5, 0.5\]"),
    ):
        with pytest.raises(InputError, match=message):
            export(static, (IMAGES,), "onnx", path, metadata=facts, preprocess=layout)
    with pytest.raises(InputError, match="one float32"):
        with_preprocessing(static, (IMAGES, IMAGES), "NCHW", FACTS)
    with pytest.raises(BackendError, match="has no option 'preprocess'"):
        export(static, (IMAGES,), "pt2", tmp_path / "model.pt2", metadata=FACTS, preprocess="NHWC")
    assert not list(tmp_path.iterdir())


def test_the_command_line_leaves_a_script_of_pictures(static: fx.GraphModule, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    save_pt2(static, (IMAGES,), tmp_path / "model.pt2", FACTS)
    out = str(tmp_path / "model.onnx")
    command = ["export", str(tmp_path / "model.pt2"), "--preprocess", "NHWC", "--script", "--out", out]
    assert run_command(command) == 0
    assert np.load(tmp_path / "cases.npz")["inputs"].dtype == np.uint8
    done = subprocess.run([sys.executable, "run.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "top-1 as in torch: 10 of 10" in done.stdout
