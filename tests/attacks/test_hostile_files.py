"""Files that were made to run something: each is refused before torch reads any of it, and nothing runs."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sbs_fx
from sbs_fx.export import load_pt2, pt2
from sbs_fx.plan.errors import FileError

Members = dict[str, bytes]
Change = Callable[[Members, str], None]
WEIGHTS, GRAPH = "data/weights/model_weights_config.json", "models/model.json"


class Payload:
    """Unpickling it writes a mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (Path(self.mark), "ran")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Members:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    directory = tmp_path_factory.mktemp("whole")
    sbs_fx.compress(net, torch.randn(2, 3, 8, 8), budget=0.1).save(directory)
    with zipfile.ZipFile(directory / "model.pt2") as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def sealed(members: Members) -> bytes:
    """An archive whose digest is right, as anybody can make one."""
    rest = {name: content for name, content in members.items() if name != pt2.INFORMATION}
    text = json.loads(members[pt2.INFORMATION])["content"]
    digest = pt2._digest({name: hashlib.sha256(content).digest() for name, content in rest.items()}, text)
    rest[pt2.INFORMATION] = json.dumps({"sha256": digest, "content": text}).encode()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in rest.items():
            archive.writestr(name if name.startswith("other/") else f"archive/{name}", content)
    return data.getvalue()


def more(name: str) -> Change:
    """A member more, a pickle that would leave a mark."""

    def change(members: Members, mark: str) -> None:
        members[name] = pickle.dumps(Payload(mark))

    return change


def config(**fields: Any) -> Change:
    """The first tensor's entry with other fields."""

    def change(members: Members, mark: str) -> None:
        table = json.loads(members[WEIGHTS])
        entry = next(iter(table["config"].values()))
        sizes = fields.get("sizes")
        if sizes is None:
            entry.update(fields)
        else:
            entry["tensor_meta"]["sizes"] = [{"as_int": size} for size in sizes]
        members[WEIGHTS] = json.dumps(table).encode()
        members["data/weights/weight_900"] = pickle.dumps(Payload(mark))

    return change


def graph(key: str, value: Any) -> Change:
    """The first operator, or size, is another; MARK stands for the file that it would write."""

    def change(members: Members, mark: str) -> None:
        table = json.loads(members[GRAPH])
        stack = [table]
        while stack:
            item = stack.pop(0)
            if isinstance(item, dict):
                if key in item and (key != "target" or "inputs" in item):
                    item[key] = json.loads(json.dumps(value).replace("MARK", mark))
                    break
                stack += item.values()
            elif isinstance(item, list):
                stack += item
        else:
            raise AssertionError(key)
        members[GRAPH] = json.dumps(table).encode()

    return change


def named(key: str, value: str) -> Change:
    """The first thing that is called so has a name that is Python; a generated function would hold it."""

    def change(members: Members, mark: str) -> None:
        graph(key, [value] if key == "forward_arg_names" else value)(members, mark)

    return change


def inputs(members: Members, mark: str) -> None:
    data = io.BytesIO()
    torch.save(Payload(mark), data)
    members["data/sample_inputs/model.pt"] = data.getvalue()


NAMES = (
    "serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt", "version", "data.pkl",
    "serialized_example_inputs.pt", "data/constants/opaque_obj_0", "data/constants/custom_obj_0", "constants.pkl",
    "data/aotinductor/model/model.so", "data/aotinductor/model/model.cpp", "data/weights/MODEL_WEIGHTS_CONFIG.JSON",
    "data/weights/Model_weights_config.json", "models/MODEL.json", "models/other.json", "../outside", "/absolute",
    "data/weights/../../outside", "data/weights/weight_0/..", "extra/other.json", "code/module.py", "executorch/x.pte",
    "data/weights/weight_1 ", "data\\\\weights\\\\weight_0", "other/member", ".data/serialization_id",
)  # fmt: skip
OPERATORS = (
    "torch.os.system", "torch.hub.load", "torch.serialization.load", "torch.utils.cpp_extension.load_inline",
    "torch.ops.aten.from_file.default", "torch.ops.image.read_file.default", "torch.ops.mine.run.default",
    "_operator.attrgetter", "_operator.methodcaller", "_operator.call", "math.factorial", "#mine:run", "builtins.eval",
    "torch.ops.load_library", "torch._C._pickle_load_obj",
)  # fmt: skip
SIZES = (
    "__import__('pathlib').Path('MARK').write_text('ran')", "open('MARK', 'w')", "exec('1')", "(lambda: 1)()",
    "Symbol('s0').__class__", "[s0 for s0 in ()]", "f'{1}'", "Symbol('__import__')", "s0 if s0 else s0", 12,
)  # fmt: skip
NAMED = ("name", "forward_arg_names", "parameter_name", "buffer_name")
PYTHON = ('x") or open("MARK", "w', 'x=open("MARK", "w")', "x\n", '0.\\"x')
ATTACKS: dict[str, Change] = {
    **{f"member {name}": more(name) for name in NAMES},
    **{f"operator {name}": graph("target", name) for name in OPERATORS},
    **{f"size {text}": graph("expr_str", text) for text in SIZES},
    **{f"pickled {value!r}": config(use_pickle=value, path_name="weight_900") for value in (True, 1, "true", None)},
    **{f"path {p}": config(path_name=p) for p in ("opaque_obj_0", "../weight_0", "weight_901", "/etc/passwd", 3)},
    **{f"{key} {value}": named(key, value) for key in NAMED for value in PYTHON},
    "no meta": config(tensor_meta=None),
    "a giant": config(sizes=[1 << 40]),
    "negative": config(sizes=[-4, -2]),
    "example inputs": inputs,
}


@pytest.mark.parametrize("kind", list(ATTACKS))
def test_nothing_runs(kind: str, whole: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, mark, path = dict(whole), tmp_path / "mark", tmp_path / "model.pt2"
    ATTACKS[kind](members, str(mark))
    path.write_bytes(sealed(members))
    for module, name in ((torch.export, "load"), (pt2, "read_graph")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the graph was read"))
    with pytest.raises(FileError, match=r"model\.pt2"):
        load_pt2(path)
    assert not mark.exists()


def test_the_whole_file_is_read(whole: Members, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(sealed(whole))
    assert load_pt2(tmp_path / "model.pt2")(torch.randn(3, 3, 8, 8)).shape == (3, 4)


def _archive(path: Path, members: Members, change: Callable[[zipfile.ZipInfo], None]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(f"archive/{name}")
            change(entry)
            archive.writestr(entry, content)


def test_crooked_archives(whole: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, comments, other archives in front or behind change nothing, whoever reads the graph."""
    path = tmp_path / "model.pt2"
    good = sealed(whole)
    read: list[Members] = []
    monkeypatch.setattr(pt2, "read_graph", lambda members: read.append(members))
    other = sealed({**whole, GRAPH: b"{}"})
    for data in (good, other + good, good + other[: len(other) // 2]):
        path.write_bytes(data)
        load_pt2(path)
    assert read[0] == read[1] == read[2]
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}

    def compressed(entry: zipfile.ZipInfo) -> None:
        entry.compress_type = zipfile.ZIP_DEFLATED

    def link(entry: zipfile.ZipInfo) -> None:
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16

    _archive(path, members, link)
    load_pt2(path)
    _archive(path, members, compressed)
    with pytest.raises(FileError, match="compressed or locked"):
        load_pt2(path)


def test_a_small_file_of_much_text_is_refused_before_it_is_read(whole: Members, tmp_path: Path) -> None:
    members = {**whole, GRAPH: b" " * (1 << 28) + b"{}"}
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_STORED if "weight_" in name else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content, kind)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(FileError, match="bytes of text, at most"):
        load_pt2(path)


def test_other_libraries_are_read_where_they_are_named(whole: Members, tmp_path: Path) -> None:
    members = dict(whole)
    graph("target", "torch.ops.mine.run.default")(members, "")
    (tmp_path / "model.pt2").write_bytes(sealed(members))
    with pytest.raises(FileError, match=r"If you trust it: load\(\.\.\., libraries=\('mine',\)\)"):
        load_pt2(tmp_path / "model.pt2")
    with pytest.raises(FileError, match="cannot read"):  # torch's word on an operator that nobody registered
        load_pt2(tmp_path / "model.pt2", libraries=("mine",))
