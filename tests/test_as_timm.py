"""A compressed model where timm's and the hub's own tools take it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy

import sbs_fx
from sbs_fx.data.datasets import open_data
from sbs_fx.plan.errors import FileError, InputError
from sbs_fx.report.card import card
from sbs_fx.timm_model import TimmModel
from sbs_fx.training import evaluate


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = timm.create_model("test_vit3", num_classes=5, img_size=32)
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    out = tmp_path_factory.mktemp("saved")
    sbs_fx.compress(net, torch.randn(2, 3, 32, 32), budget="10%", method="uniform").save(out)
    return out


def test_it_is_what_timm_validates(saved: Path, tmp_path: Path) -> None:
    """Its script's loop, on pictures of another size: as many right as by our own evaluation."""
    draw = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "test" / str(i % 5)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{i}.png")
    model = sbs_fx.as_timm(saved)
    assert model.num_classes == 5
    config = resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.4, 0.5, 0.6)
    loader = create_loader(
        create_dataset("", root=str(tmp_path / "test")),
        batch_size=7,
        use_prefetcher=False,
        num_workers=0,
        device=torch.device("cpu"),
        **{k: config[k] for k in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    top1 = AverageMeter()
    model.eval()
    with torch.no_grad():
        for images, labels in loader:
            top1.update(accuracy(model(images), labels)[0].item(), len(images))
    prepared = {k: config[k] for k in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    ours = evaluate(model, open_data(str(tmp_path), split="test", image_size=32, **prepared))
    assert top1.count == 20
    assert top1.avg == pytest.approx(ours, abs=1e-4)


def test_it_claims_no_features() -> None:
    assert not hasattr(TimmModel, "forward_features")


def test_what_gives_no_classes_is_refused() -> None:
    net = torch.nn.Conv2d(3, 4, 3).eval()
    result = sbs_fx.compress(net, torch.randn(2, 3, 8, 8), budget="10%", method="uniform", task="matching")
    with pytest.raises(InputError, match="gives no logits"):
        sbs_fx.as_timm(result)


def test_the_hub_can_hold_a_directory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own reader takes the card; what it would download is loaded."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(saved))
    loaded = sbs_fx.load("hf-hub:somebody/small")
    assert loaded.policy == sbs_fx.Policy.load(saved / "policy.json")
    text = card(loaded.report, {})
    data = huggingface_hub.ModelCard(text).data
    assert data.library_name == "sbs-fx"
    assert "quantization" in data.tags

    def fails(name: str, **_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(FileError, match=r"hf-hub:somebody/small cannot be had: no network; download it"):
        sbs_fx.load("hf-hub:somebody/small")
