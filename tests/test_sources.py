"""Models by name from elsewhere than timm, and what is said of names that are none."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sbs_fx
from sbs_fx.cli.models import make_model
from sbs_fx.export.pt2 import load_program
from sbs_fx.models import create_model, input_config
from sbs_fx.plan.errors import FileError, InputError, WeightsError


def test_torchvision() -> None:
    model = create_model("torchvision/mobilenet_v3_small", pretrained=False, num_classes=7)
    card = input_config(model)
    assert card["input_size"] == (3, 224, 224)
    assert card["mean"] == (0.485, 0.456, 0.406)
    assert card["crop_pct"] == 224 / 256
    assert card["interpolation"] == "bilinear"
    assert not model.training
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(InputError, match=r"torchvision has no model 'resnet19'; the nearest names are \['resnet1"):
        create_model("torchvision/resnet19", pretrained=False)


def test_names_of_timm_that_are_none() -> None:
    with pytest.raises(InputError, match=r"timm has no model 'resnet19'; the nearest names are \['resnet18'"):
        create_model("resnet19")


def test_a_directory_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    saved = transformers.ViTForImageClassification(config)
    saved.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(image_mean=[0.1] * 3, image_std=[0.2] * 3).save_pretrained(tmp_path)
    model = create_model(f"hf/{tmp_path}")
    assert all(torch.equal(x, saved.state_dict()[name]) for name, x in model.state_dict().items())
    card = input_config(model)
    assert (card["input_size"], card["mean"], card["std"]) == ((3, 32, 32), (0.1,) * 3, (0.2,) * 3)
    result = sbs_fx.compress(model, torch.randn(2, 3, 32, 32), budget=0.1)
    assert result.cost.bops <= 0.1 * result.baseline_cost.bops
    with pytest.raises(WeightsError, match="the published weights of 'hf/.*nowhere' cannot be had"):
        create_model(f"hf/{tmp_path / 'nowhere'}")


def test_functions_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def small(num_classes=3):\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))\n"
        "def broken():\n    raise KeyError('width')\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert create_model("my_networks:small", num_classes=4)(torch.randn(2, 3, 2, 2)).shape == (2, 4)
    for name, message in [
        ("my_networks:big", "'my_networks' has no 'big'; expected a function that gives a model"),
        ("my_network:small", "cannot import 'my_network' of 'my_network:small'"),
        ("my_networks:broken", "my_networks:broken raised KeyError: 'width'"),
        ("my_networks:number", "my_networks:number gave a int; expected an nn.Module"),
    ]:
        with pytest.raises(InputError, match=message):
            create_model(name)


# -- files of torch.export ---------------------------------------------------------------------------------------------


class Runs:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self.mark), "ran")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4)).eval()
    x = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, tmp_path / "float.pt2")
    return tmp_path / "float.pt2"


def rewritten(path: Path, changes: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    root = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as new:
        for name, content in (members | {f"{root}/{name}": content for name, content in changes.items()}).items():
            new.writestr(name, content)


def test_a_float_program(program: Path) -> None:
    x = torch.randn(3, 3, 8, 8)
    loaded = load_program(program)
    assert torch.equal(loaded.module()(x), torch.export.load(program).module()(x))
    made = make_model(str(program), None, False, None, None, None)
    assert made.example_inputs.shape == (2, 3, 8, 8)
    result = sbs_fx.compress(made.module, made.example_inputs, budget=0.1)
    assert result.model(x).shape == (3, 4)


def test_what_a_strangers_program_would_run_is_not_read(program: Path) -> None:
    mark = program.parent / "mark"
    rewritten(program, {"data/sample_inputs/model.pt": pickle.dumps(Runs(str(mark)))})
    load_program(program)
    for name in ("data/aotinductor/model/run.so", "data/weights/weights.pt"):
        rewritten(program, {name: pickle.dumps(Runs(str(mark)))})
        with pytest.raises(FileError, match="holds .*; a model to compress holds tensors and operators alone"):
            load_program(program)
    assert not mark.exists()
    program.write_bytes(program.read_bytes()[:-300])
    with pytest.raises(FileError, match="cannot read .*float.pt2.* as a model of torch .*; write it with"):
        load_program(program)
