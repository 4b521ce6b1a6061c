"""Weights as training tools leave them, and files that hold none; each error as a user reads it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sbs_fx.models import create_model
from sbs_fx.plan.errors import FileError, WeightsError
from sbs_fx.weights import load_weights

State = dict[str, Tensor]


def net(classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, classes))


def trained() -> State:
    torch.manual_seed(1)
    return {name: torch.rand_like(x) if x.is_floating_point() else x + 7 for name, x in net().state_dict().items()}


def prefixed(prefix: str) -> State:
    return {prefix + name: x for name, x in trained().items()}


def halved(state: State) -> State:
    return {name: x / 2 if x.is_floating_point() else x for name, x in state.items()}


FORMS: dict[str, Callable[[], Any]] = {
    "a state dict": trained,
    "data parallel": lambda: prefixed("module."),
    "compiled": lambda: prefixed("_orig_mod."),
    "compiled and parallel": lambda: prefixed("module._orig_mod."),
    "a training loop": lambda: {"epoch": 3, "model": trained(), "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "Lightning": lambda: {"state_dict": prefixed("model.") | {"loss.weight": torch.ones(4)}, "epoch": 2},
    "nested twice": lambda: {"checkpoint": {"state_dict": trained()}},
    "an average beside it": lambda: {"state_dict": halved(trained()), "state_dict_ema": trained()},
    "an average of timm": lambda: {"state_dict": halved(trained()), "model_ema": prefixed("module.")},
    "without counters": lambda: {n: x for n, x in trained().items() if "num_batches" not in n},
    "of a part": lambda: prefixed("backbone.") | {"head.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tmp_path: Path) -> None:
    module = net()
    torch.save(FORMS[form](), tmp_path / "weights.pth")
    load_weights(module, tmp_path / "weights.pth")
    for name, x in module.state_dict().items():
        assert torch.equal(x, trained()[name]) or "num_batches" in name, name


def test_safetensors_and_where_they_were(tmp_path: Path) -> None:
    module = net()
    save_file(prefixed("model."), tmp_path / "weights.safetensors")
    assert load_weights(module, tmp_path / "weights.safetensors") == ""
    assert torch.equal(module[0].weight, trained()["0.weight"])
    torch.save({"ema": {"shadow": trained()}}, tmp_path / "ema.pt")
    assert load_weights(module, tmp_path / "ema.pt") == "ema.shadow"


def test_names_of_timm_take_them(tmp_path: Path) -> None:
    wanted = create_model("test_resnet", pretrained=False, num_classes=3)
    torch.save({"state_dict": {f"model.{n}": x for n, x in wanted.state_dict().items()}}, tmp_path / "lightning.ckpt")
    made = create_model("test_resnet", checkpoint=str(tmp_path / "lightning.ckpt"), num_classes=3)
    assert all(torch.equal(x, wanted.state_dict()[name]) for name, x in made.state_dict().items())


# -- what does not fit -------------------------------------------------------------------------------------------------


def without(name: str) -> State:
    return {n: x for n, x in trained().items() if n != name}


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "other classes": (
        lambda: {**trained(), "3.weight": torch.ones(9, 8), "3.bias": torch.ones(9)},
        r"2 have another shape, the first '3.weight': \(9, 8\) in the file, \(4, 8\) in the model; it was trained for "
        "9 classes and the model has 4: give --num-classes 9",
    ),
    "a missing name": (
        lambda: without("1.running_var"),
        "1 of 9 names are missing, the first '1.running_var'; check the model's name and its options",
    ),
    "another model": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(3, 3)).state_dict(),
        "6 of 9 names are missing, the first '1.running_mean'|names are missing.*in the file are not the model's",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit(kind: str, tmp_path: Path) -> None:
    build, message = MISFITS[kind]
    module = net()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    torch.save(build(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=message):
        load_weights(module, tmp_path / "weights.pth")
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def mark(path: str) -> None:
    Path(path).write_text("ran")


class Runs:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return mark, (self.path,)


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Runs(str(path.parent / "mark"))}))


def write_cut(path: Path, save: Callable[[Path], None]) -> None:
    save(path)
    path.write_bytes(path.read_bytes()[:-200])


UNREAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no file": ("no.pth", lambda p: None, "cannot read .*no.pth.*: No such file or directory"),
    "an empty file": ("a.pth", lambda p: p.write_bytes(b""), "is empty: it was cut short; expected weights"),
    "a text": (
        "a.pth",
        lambda p: p.write_text("hello there"),
        "KeyError.*it was cut short or is none|it holds objects beside tensors",
    ),
    "a pickle that runs": ("a.pth", write_pickle, "it holds objects beside tensors, which loading would run"),
    "a whole module": ("a.pth", lambda p: torch.save(net(), p), r"save model.state_dict\(\) alone"),
    "a scripted model": (
        "a.pt",
        lambda p: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), p),
        r"it is a scripted model; load it with torch.jit.load and save its state_dict\(\)",
    ),
    "no tensors": ("a.pth", lambda p: torch.save({"epoch": 3}, p), "holds no tensors by name"),
    "cut": ("a.pth", lambda p: write_cut(p, lambda q: torch.save(trained(), q)), "it was cut short or is none"),
    "cut safetensors": (
        "a.safetensors",
        lambda p: write_cut(p, lambda q: save_file(trained(), q)),
        "it was cut short or is none",
    ),
    "a directory": ("", lambda p: None, "Is a directory"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", UNREAD)
def test_what_cannot_be_read(kind: str, tmp_path: Path) -> None:
    name, write, message = UNREAD[kind]
    write(tmp_path / name)
    with pytest.raises(FileError, match=message):
        load_weights(net(), tmp_path / name)
    assert not (tmp_path / "mark").exists()
