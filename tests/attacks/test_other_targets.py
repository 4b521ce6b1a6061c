"""Files of other tools in the place of ours: refused in a line, nothing of them runs; native code only where the caller
says that it is trusted."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

import sbs_fx
from sbs_fx.plan.errors import FileError
from tests.oracles.commands import run_command

_XML = """<?xml version="1.0"?><!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/hostname">]>
<net name="&x;" version="11"><layers/><edges/></net>"""


def _archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"\x7fELF" + bytes(200))


def made(kind: str, directory: Path) -> Path:
    """A file of a kind; each would read or run something if its own tool were given it."""
    path = directory / kind
    if kind.endswith(".pt2"):
        inner = "data/AOTInductor" if "case" in kind else "data/aotinductor"
        _archive(path, "archive/archive_format", f"archive/{inner}/model/model.wrapper.so")
    elif kind.endswith(".xml"):
        path.write_text(_XML)
        path.with_suffix(".bin").write_bytes(bytes(64))
    elif kind.endswith(".pte"):
        path.write_bytes(bytes(4) + b"ET12" + bytes(200))
    elif kind == "external.onnx":
        onnx = pytest.importorskip("onnx")
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
        tensor.external_data.add(key="location", value="../../../../etc/hostname")
        graph = onnx.helper.make_graph([], "g", [], [], [tensor])
        path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    else:
        path.write_bytes(b"\x08\x0a" + bytes(100))
    return path


KINDS = ("native.pt2", "case.pt2", "model.xml", "model.pte", "external.onnx", "junk.onnx", "junk.bin")
COMMANDS = (
    ["evaluate", "FILE", "--data", "digits"], ["bench", "FILE"], ["report", "FILE"],
    ["export", "FILE", "--format", "onnx", "--out", "new.onnx"], ["inspect", "FILE"],
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_tools_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_: pytest.fail("native code was loaded"))
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch read the file"))
    path = made(kind, tmp_path)
    with pytest.raises(FileError, match=kind):
        sbs_fx.load(path)
    for command in COMMANDS:
        assert run_command([str(path) if word == "FILE" else word for word in command]) == 2
        said = capfd.readouterr()
        assert said.err.strip()
        assert "Traceback" not in said.err
    assert not (tmp_path / "new.onnx").exists()


def test_native_code_is_loaded_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made("native.pt2", tmp_path)
    with pytest.raises(FileError, match=r"native code of AOTInductor.*trust=True"):
        sbs_fx.load(path)
    loaded: list[str] = []
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: loaded.append(path) or (lambda x: x + 1))
    assert sbs_fx.load(path, trust=True)(torch.ones(2)).tolist() == [2, 2]
    assert loaded == [str(path)]
