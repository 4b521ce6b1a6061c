"""An OpenVINO file says what its pictures and classes are, as OpenVINO's own Model API reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from sbs_fx.export import export
from sbs_fx.export.openvino import model_info
from tests.networks.small import Residual
from tests.oracles.gated import integer_graph

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'sbs-fx[openvino]'")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FACTS: dict[str, Any] = {
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 0.9,
    "classes": ["a", "hot dog", "c", "d", "e"],
}  # fmt: skip


@pytest.fixture(scope="module")
def static() -> fx.GraphModule:
    return integer_graph(Residual, IMAGES)


def test_what_is_known_is_said_and_nothing_else() -> None:
    assert model_info({}, classifies=False) == {}
    assert model_info({"mean": [0.5, 0.25], "std": [1, 0.5]}, classifies=False) == {
        "mean_values": "127.5 63.75", "scale_values": "255 127.5",
    }  # fmt: skip
    inside = {**FACTS, "preprocess": {"layout": "NHWC"}}
    assert set(model_info(inside, classifies=True)) == {"model_type", "labels", "layout", "resize_type"}


@pytest.mark.parametrize("preprocess", [None, "NHWC", "NCHW"])
def test_a_file_is_read_with_it(static: fx.GraphModule, preprocess: str | None, tmp_path: Path) -> None:
    export(static, (IMAGES,), "openvino", tmp_path / "model.xml", metadata=FACTS, preprocess=preprocess)
    read = openvino.Core().read_model(tmp_path / "model.xml")
    assert read.get_rt_info(["model_info", "model_type"]).astype(str) == "Classification"
    assert read.get_rt_info(["model_info", "labels"]).astype(str) == "a hot_dog c d e"
    assert read.has_rt_info(["model_info", "mean_values"]) == (preprocess is None)
    api = pytest.importorskip("model_api.models", reason="openvino-model-api is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mean, std = (torch.tensor(FACTS[name]).view(-1, 1, 1) for name in ("mean", "std"))
    want = static(((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]).softmax(1)[0]
    (label,) = api.Model.create_model(str(tmp_path / "model.xml"))(pixels).top_labels
    assert label.name == model_info(FACTS, classifies=True)["labels"].split()[int(want.argmax())]
    assert label.confidence == pytest.approx(float(want.max()), abs=0.02)  # a code here and there
