"""`model.pt2`: loaded = saved, as large as its bits, torch alone runs it, no pickle, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickletools
import random
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sbs_fx.export import load, load_pt2, pt2, save_pt2
from sbs_fx.passes import apply_bits, channel_groups, cost_model, finalize, insert_gates, trace
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.graph import with_tensors
from sbs_fx.passes.oracles.static import count_levels
from sbs_fx.plan import Plan
from sbs_fx.plan.bits import BITS
from sbs_fx.plan.errors import FileError, GraphError
from sbs_fx.search.sparse import largest, parameters_of, weight_tensors
from tests.networks.models import Recipe, step
from tests.oracles.gated import Together, bundles, check_static, draw_bits, gate, set_ranges

SLACK = 200_000  # bytes, for the graph and the headers of the archive


class Scores(NamedTuple):
    best: Tensor
    rest: list[Tensor]


@dataclass
class Boxes:
    corners: Tensor
    mask: Tensor | None = None


class Output(OrderedDict[str, Any]):
    """What has names and is known to torch by its library alone."""


pytree.register_pytree_node(
    Output, lambda o: (list(o.values()), list(o)), lambda values, names: Output(zip(names, values, strict=True))
)
torch.export.register_dataclass(Boxes)


@pytest.fixture(scope="module")
def static() -> fx.GraphModule:
    blocks = (step("conv", groups=2), step("transposed_conv", groups=2), step("standardised"), step("attention"))
    recipe = Recipe((*blocks, step("lstm")))
    gated = gate(recipe.build(), recipe.example(2))
    draw_bits(gated, seed=3)
    return finalize(gated)


@pytest.fixture(scope="module")
def saved(static: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.pt2"
    save_pt2(static, Recipe().example(2), path, {"accuracy": 0.5, "names": ["a"]})
    return path


@pytest.fixture(scope="module")
def small() -> fx.GraphModule:
    gated = gate(Recipe().build(), Recipe().example(2))
    draw_bits(gated, seed=0)
    return finalize(gated)


@pytest.fixture(scope="module")
def file(small: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.pt2"
    save_pt2(small, Recipe().example(2), path)
    return path


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_loaded_is_saved(static: fx.GraphModule, saved: Path, batch: int) -> None:
    x = Recipe().example(batch, seed=1)
    assert torch.equal(load(saved)(x), static(x))
    assert torch.equal(torch.export.load(saved).module()(x), static(x))


def test_a_loaded_graph_is_as_finalize_left_it(static: fx.GraphModule, saved: Path, tmp_path: Path) -> None:
    loaded = load_pt2(saved)
    assert static_of(loaded).metadata == {"accuracy": 0.5, "names": ["a"]}
    assert static_of(loaded).weights == static_of(static).weights
    assert loaded.state_dict().keys() == static.state_dict().keys()
    assert all(torch.equal(value, static.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    x = Recipe().example(3)
    assert sorted(count_levels(loaded, (x,))) == sorted(count_levels(static, (x,)))
    save_pt2(loaded, x, tmp_path / "again.pt2")
    assert torch.equal(load_pt2(tmp_path / "again.pt2")(x), static(x))


def test_a_loaded_graph_can_be_compared_with_the_gated_one(tmp_path: Path) -> None:
    recipe = Recipe((step("conv"), step("mlp")))
    gated = gate(recipe.build(), recipe.example(2))
    draw_bits(gated, seed=1, bits=BITS)
    save_pt2(finalize(gated), recipe.example(2), tmp_path / "model.pt2")
    check_static(gated, recipe.example(4), load_pt2(tmp_path / "model.pt2"))


def test_loaded_is_saved_on_many_kinds_of_blocks(tmp_path: Path) -> None:
    recipes = next(iter(bundles(size=10).values()))
    gated = gate(Together(recipes), recipes[0].example(2))
    draw_bits(gated, seed=0)
    static = finalize(gated)
    save_pt2(static, recipes[0].example(1), tmp_path / "model.pt2")
    loaded = load_pt2(tmp_path / "model.pt2")
    x = recipes[0].example(3)
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), static(x), strict=True))
    check_size(static, tmp_path / "model.pt2")


def check_size(static: fx.GraphModule, path: Path) -> None:
    bits = 0
    for name, tensor in static.state_dict().items():
        stored = static_of(static).weights.get(name)
        if stored is None:
            bits += tensor.numel() * tensor.element_size() * 8
        elif isinstance(stored.bits, int):
            bits += tensor.numel() * stored.bits
        else:
            bits += tensor.numel() // tensor.shape[stored.axis] * sum(stored.bits)
    assert path.stat().st_size <= 1.1 * bits / 8 + SLACK


@pytest.mark.parametrize("bits", BITS)
def test_a_file_is_as_large_as_its_bits(bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(600, 2000), nn.ReLU(), nn.Linear(2000, 600)).eval()
    gated = gate(model, torch.randn(2, 600))
    draw_bits(gated, 0, per_channel=False, bits=(bits,))
    save_pt2(finalize(gated), torch.randn(2, 600), tmp_path / "model.pt2")
    weights = 2 * 600 * 2000 * bits / 8
    assert weights < (tmp_path / "model.pt2").stat().st_size < 1.02 * weights + 30_000


@pytest.mark.parametrize("kind", ["8", "4", "mixed", "by channel", "masked"])
def test_a_file_is_as_large_as_its_cost(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    graph = trace(timm.create_model("resnet18").eval(), x)
    groups = channel_groups(graph)
    cost, draw = cost_model(graph, groups), random.Random(0)
    tensors = weight_tensors(cost)
    bits: dict[str, Any] = {name: draw.choice(BITS) if kind == "mixed" else 4 for name in cost.weights}
    if kind == "8":
        bits = dict.fromkeys(cost.weights, 8)
    if kind == "by channel":
        bits = {name: [draw.choice((0, *BITS)) for _ in range(len(weight))] for name, weight in tensors.items()}
    masks = {n: int(w.numel() * draw.uniform(0.05, 0.5)) for n, w in tensors.items()} if kind == "masked" else {}
    plan = Plan({}, bits, dict.fromkeys(cost.activations, 8), masks)
    parameters = parameters_of(cost)
    masked = with_tensors(graph, {parameters[n]: largest(tensors[n], count) for n, count in masks.items()})
    gated = insert_gates(masked, groups, channels=False)
    set_ranges(gated, x)
    apply_bits(gated, plan.weight_bits, plan.activation_bits)
    static = finalize(gated, nonzeros=plan.nonzeros)
    save_pt2(static, x, tmp_path / "model.pt2")
    size = cost.evaluate(plan).stored_bits / 8
    assert size < (tmp_path / "model.pt2").stat().st_size < 1.02 * size + 60_000
    loaded = load_pt2(tmp_path / "model.pt2")
    assert all(torch.equal(value, static.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_torch_alone_runs_it(static: fx.GraphModule, saved: Path, tmp_path: Path) -> None:
    x = Recipe().example(3)
    torch.save({"x": x, "y": static(x)}, tmp_path / "case.pt")
    script = f"""
import sys
sys.modules["sbs_fx"] = None
import torch
import torch.ao.quantization.fx._decomposed
case = torch.load({str(tmp_path / "case.pt")!r}, weights_only=True)
assert torch.equal(torch.export.load({str(saved)!r}).module()(case["x"]), case["y"])
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_equal_models_are_equal_files(static: fx.GraphModule, saved: Path, tmp_path: Path) -> None:
    save_pt2(static, Recipe().example(2, seed=9), tmp_path / "model.pt2", {"accuracy": 0.5, "names": ["a"]})
    assert (tmp_path / "model.pt2").read_bytes() == saved.read_bytes()


def test_several_inputs_of_any_structure(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"a": self.conv(x), "b": [self.conv(y), x + y]}

    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    graph_module = trace(Two(), (x, y))
    static = finalize(insert_gates(graph_module, channel_groups(graph_module), channels=False))
    save_pt2(static, (x[:1], y[:1]), tmp_path / "model.pt2")
    loaded = load_pt2(tmp_path / "model.pt2")
    x, y = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded(x, y)["b"][0], static(x, y)["b"][0])
    with pytest.raises(GraphError, match="1 example inputs; the graph takes 2"):
        save_pt2(static, x, tmp_path / "other.pt2")
    with pytest.raises(GraphError, match=r"cannot capture.*\(2, 5, 8, 8\)"):
        save_pt2(static, (torch.randn(2, 5, 8, 8), torch.randn(2, 5, 8, 8)), tmp_path / "other.pt2")
    assert os.listdir(tmp_path) == ["model.pt2"]


# Files


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def is_pickle(data: bytes) -> bool:
    try:
        return sum(1 for _ in pickletools.genops(data)) > 1
    except Exception:
        return False


def test_no_pickle(saved: Path) -> None:
    for name, data in members(saved).items():
        assert not zipfile.is_zipfile(io.BytesIO(data)), name  # what torch.save writes
        if "/data/weights/weight_" not in name:
            assert not data.startswith(b"\x80")
            assert not is_pickle(data)
            if name.endswith("config.json"):
                assert not any(entry["use_pickle"] for entry in json.loads(data)["config"].values())


def test_a_cut_file(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    for length in (0, 1, 100, len(data) // 2, len(data) - 30, len(data) - 1):
        (tmp_path / "model.pt2").write_bytes(data[:length])
        with pytest.raises(FileError, match=r"model\.pt2"):
            load_pt2(tmp_path / "model.pt2")


def test_a_flipped_bit_anywhere_that_matters(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    x = Recipe().example(2)
    wanted = load_pt2(file)(x)
    for position in range(50, len(data), len(data) // 25):
        data[position] ^= 4
        (tmp_path / "model.pt2").write_bytes(data)
        with contextlib.suppress(FileError):  # some bytes of a zip file mean nothing, such as a date
            assert torch.equal(load_pt2(tmp_path / "model.pt2")(x), wanted)
        data[position] ^= 4


def test_an_altered_archive_with_right_checksums(file: Path, tmp_path: Path) -> None:
    whole = members(file)
    load_pt2(write(tmp_path / "model.pt2", whole))
    for name in whole:
        changed = {**whole, name: whole[name] + b"x"}
        with pytest.raises(FileError, match="cut, changed"):
            load_pt2(write(tmp_path / "model.pt2", changed))
        with pytest.raises(FileError, match="cut, changed"):
            load_pt2(write(tmp_path / "model.pt2", {n: d for n, d in whole.items() if n != name}))
        renamed = {f"{n}x" if n == name else n: d for n, d in whole.items()}  # in the same order, of the same contents
        with pytest.raises(FileError, match="cut, changed"):
            load_pt2(write(tmp_path / "model.pt2", renamed))
    with pytest.raises(FileError, match="cut, changed"):
        load_pt2(write(tmp_path / "model.pt2", {**whole, "archive/more": b""}))
    with zipfile.ZipFile(write(tmp_path / "model.pt2", whole), "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("archive/" + pt2.INFORMATION, whole["archive/" + pt2.INFORMATION])
    with pytest.raises(FileError, match="a member twice"):
        load_pt2(tmp_path / "model.pt2")
    information = json.loads(whole["archive/" + pt2.INFORMATION])
    information["content"] = information["content"].replace('"exact": false', '"exact": true')
    with pytest.raises(FileError, match="holds other data than was written"):
        load_pt2(
            write(tmp_path / "model.pt2", {**whole, "archive/" + pt2.INFORMATION: json.dumps(information).encode()})
        )


def sealed(whole: dict[str, bytes], text: str) -> dict[str, bytes]:
    """With a digest that is right."""
    rest = {n.removeprefix("archive/"): d for n, d in whole.items() if not n.endswith(pt2.INFORMATION)}
    digests = {n: hashlib.sha256(d).digest() for n, d in rest.items()}
    outer = {"sha256": pt2._digest(digests, text), "content": text}
    return {**whole, "archive/" + pt2.INFORMATION: json.dumps(outer).encode()}


def test_a_file_of_another_format_is_refused(file: Path, tmp_path: Path) -> None:
    whole = members(file)
    text = json.loads(whole["archive/" + pt2.INFORMATION])["content"]
    load_pt2(write(tmp_path / "model.pt2", sealed(whole, text)))
    for format in (pt2.FORMAT - 1, pt2.FORMAT + 1):
        other = json.dumps({**json.loads(text), "format": format})
        with pytest.raises(FileError, match=f"has format {format}, this version reads {pt2.FORMAT}; save"):
            load_pt2(write(tmp_path / "model.pt2", sealed(whole, other)))


@pytest.mark.parametrize("where", ["sample_inputs", "weights"])
def test_a_pickle_is_refused_before_it_is_read(file: Path, tmp_path: Path, where: str) -> None:
    whole = members(file)
    if where == "weights":
        (name,) = (n for n in whole if n.endswith("weights_config.json"))
        config = json.loads(whole[name])
        next(iter(config["config"].values()))["use_pickle"] = True
        whole[name] = json.dumps(config).encode()
    else:
        (name,) = (n for n in whole if "sample_inputs" in n)
        whole[name] = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    text = json.loads(whole["archive/" + pt2.INFORMATION])["content"]
    with pytest.raises(FileError, match="holds pickles"):
        load_pt2(write(tmp_path / "model.pt2", sealed(whole, text)))


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    program = torch.export.export(nn.ReLU(), (torch.randn(2),))
    torch.export.save(program, tmp_path / "foreign.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    for name in ("foreign.pt2", "text.pt2", "missing.pt2", "."):
        with pytest.raises(FileError, match="expected a file|not written by save_pt2"):
            load_pt2(tmp_path / name)


def test_a_full_disk_leaves_what_was_there(
    small: fx.GraphModule, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        save_pt2(small, Recipe().example(2), path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["model.pt2"]


def test_places_that_cannot_be_written(small: fx.GraphModule, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "model.pt2", tmp_path / "nowhere" / "model.pt2"):
        with pytest.raises(FileError, match="cannot write"):
            save_pt2(small, Recipe().example(2), path)
    assert os.listdir(tmp_path) == ["file"]


def test_an_output_of_any_kind_is_read_by_torch_alone(tmp_path: Path) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Output:
            y = self.linear(x)
            return Output(scores=Scores(y, [y + 1]), boxes=Boxes(y * 2), plain={"y": (y, y - 1)})

    x = torch.randn(2, 3)
    save_pt2(static := finalize(gate(Heads(), x)), x, tmp_path / "model.pt2")
    run = f"""
import torch, torch.ao.quantization.fx._decomposed
print(torch.export.load({str(tmp_path / "model.pt2")!r}).module()(torch.zeros(3, 3)))
"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("{'scores': (tensor("), done.stderr
    expected, loaded = static(x), load_pt2(tmp_path / "model.pt2")(x)
    assert torch.equal(loaded["boxes"]["corners"], expected["boxes"].corners)
    assert all(map(torch.equal, pytree.tree_leaves(loaded), pytree.tree_leaves(expected)))


def test_an_output_that_torch_cannot_read_again_is_refused(tmp_path: Path) -> None:
    class Noted(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), {"note": "text"}

    x = torch.randn(2, 3)
    with pytest.raises(GraphError, match="the text 'text' is among the outputs"):
        save_pt2(finalize(gate(Noted(3, 4), x)), x, tmp_path / "model.pt2")
    assert not os.listdir(tmp_path)
