"""A directory read again as one result, sets that are mixed, and results made again after training of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import sbs_fx
from sbs_fx import Config, Saved
from sbs_fx.cli import main
from sbs_fx.plan.errors import FileError

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CONFIG = Config(weight_bits=8, activation_bits=8)


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 196, 4)
    ).eval()
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}  # type: ignore
    return model


@pytest.fixture(scope="module")
def results() -> tuple[sbs_fx.Result, sbs_fx.Result]:
    return tuple(sbs_fx.compress(net(), IMAGES, budget=b, method="uniform") for b in ("6%", "3%"))  # type: ignore


def test_a_directory_is_read_as_one(results: tuple[sbs_fx.Result, ...], tmp_path: Path) -> None:
    result = results[0]
    result.save(tmp_path)
    saved = sbs_fx.load(tmp_path)
    assert isinstance(saved, Saved)
    assert torch.equal(saved(IMAGES), result.model(IMAGES))
    assert torch.equal(sbs_fx.load(tmp_path / "model.pt2")(IMAGES), result.model(IMAGES))
    assert saved.policy == result.policy
    assert saved.report.cost == result.cost
    assert saved.classes == ()
    assert saved.preprocess is not None
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8)
    given = saved.preprocess(Image.fromarray(pixels))
    plain = v2.functional.normalize(torch.from_numpy(pixels).permute(2, 0, 1) / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert given.shape == (3, 16, 16)
    # a crop of 0.875 is cut out of what was scaled up; of pictures all of one colour nothing is left but the colour
    grey = torch.full((16, 16, 3), 100, dtype=torch.uint8).numpy()
    flat = saved.preprocess(Image.fromarray(grey))
    torch.testing.assert_close(
        flat[:, 0, 0], (torch.full((3,), 100 / 255) - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    )
    assert (given.mean() - plain.mean()).abs() < 0.2


@pytest.mark.parametrize("name", ["model.pt2", "policy.json", "report.json"])
def test_a_mixed_set_is_refused(name: str, results: tuple[sbs_fx.Result, ...], tmp_path: Path) -> None:
    for place, result in zip(("first", "second"), results, strict=True):
        result.save(tmp_path / place)
    shutil.copy(tmp_path / "second" / name, tmp_path / "first" / name)
    with pytest.raises(FileError, match="and policy.json in .* belong to different results: .* compress again"):
        sbs_fx.load(tmp_path / "first")
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "first")])
    assert end.value.code == (2 if name != "model.pt2" else 0)


def test_a_directory_without_one_of_the_files(results: tuple[sbs_fx.Result, ...], tmp_path: Path) -> None:
    results[0].save(tmp_path)
    (tmp_path / "policy.json").unlink()
    with pytest.raises(FileError, match="policy.json"):
        sbs_fx.load(tmp_path)


def test_classes_are_kept(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for i, name in enumerate(("circle", "square")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(2):
                pixels = np.full((32, 32, 3), 60 * (2 * i + k), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{split}{k}.png")
    arguments = [
        "compress",
        "test_vit",
        "--input-size",
        "3,32,32",
        "--num-classes",
        "2",
        "--random-weights",
        "--method",
    ]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "uniform", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert end.value.code == 0
    saved = sbs_fx.load(tmp_path / "out")
    assert saved.classes == ("circle", "square")
    assert saved.report.weights.startswith("random")
    assert "4 pictures" in saved.report.data
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"]["classes"] == ["circle", "square"]


def test_a_result_after_training_of_ones_own() -> None:
    result = sbs_fx.compress(net(), IMAGES, budget="6%", method="uniform", data=[IMAGES], config=CONFIG)
    before = result.model(IMAGES)
    same = sbs_fx.refresh(result, data=[IMAGES], config=CONFIG)
    assert torch.equal(same.model(IMAGES), before)
    with torch.no_grad():
        result.gated.get_parameter("4.bias").add_(1.0)
    after = sbs_fx.refresh(result, data=[IMAGES], config=CONFIG)
    torch.testing.assert_close(after.model(IMAGES), before + 1, atol=0.05, rtol=0)
    assert after.report.stages[-1].name == "refreshed"
    assert after.policy == result.policy


def test_in_a_notebook(results: tuple[sbs_fx.Result, ...]) -> None:
    page = results[0]._repr_html_()
    assert "<th>BOPs</th>" in page
    assert repr(results[0]).startswith("Result(uniform: BOPs ")
