"""Errors of other libraries, made by them, become ours at each public call, with the cause and what to do."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import PIL.Image
import pydantic
import pytest
import safetensors.torch
import torch
import torch._dynamo.exc
import yaml
from torch import fx, nn

import sbs_fx
from sbs_fx import compression
from sbs_fx.cli import main
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import BackendError, DataError, FileError, SbsError, SettingsError, TraceError

NET = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _dynamo() -> None:
    raise torch._dynamo.exc.UserError(torch._dynamo.exc.UserErrorType.INVALID_INPUT, "no such size")


def _graph_module() -> Callable[[], Any]:
    return partial(fx.symbolic_trace(nn.Linear(3, 2)), torch.ones(2, 5))


def _onnxruntime() -> Callable[[], Any]:
    return partial(pytest.importorskip("onnxruntime").InferenceSession, b"no model")


# Calls of other libraries that raise -> the class, and what it must say.
FOREIGN: dict[str, tuple[Callable[[], Any], type[SbsError], str]] = {
    "json": (partial(json.loads, '{"a": '), FileError, "cut short"),
    "yaml": (partial(yaml.safe_load, "[1"), FileError, "cut short"),
    "zip": (partial(zipfile.ZipFile, io.BytesIO(b"nothing")), FileError, "cut short"),
    "safetensors": (partial(safetensors.torch.load, b"12"), FileError, "cut short"),
    "pickle": (partial(pickle.loads, b"\x80\x04X"), FileError, "cut short"),
    "unicode": (partial(str, b"\xff\xfe", "utf-8"), FileError, "cut short"),
    "picture": (partial(PIL.Image.open, io.BytesIO(b"no picture")), DataError, "a picture"),
    "missing": (partial(open, "missing/file"), FileError, "'missing/file': No such file"),
    "directory": (partial(open, "."), FileError, "Is a directory"),
    "pydantic": (partial(pydantic.TypeAdapter(int).validate_python, "x"), SettingsError, "int"),
    "memory": (partial(torch.empty, 1 << 60), SbsError, "not enough memory"),
    "dynamo": (_dynamo, TraceError, "part="),
    "import": (partial(importlib.import_module, "no_such_module"), BackendError, "install"),
    "shapes": (partial(torch.matmul, torch.ones(2, 3), torch.ones(2, 3)), SbsError, "report it"),
    "shapes in a graph": (_graph_module(), SbsError, "report it"),
    "key": (partial({}.__getitem__, "k"), SbsError, "KeyError"),
}  # fmt: skip


def raised(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value.with_traceback(None)  # reason: as if the library had been called from within


@pytest.mark.parametrize("kind", [*FOREIGN, "onnxruntime"])
def test_foreign_errors_become_ours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, expected, said = FOREIGN[kind] if kind in FOREIGN else (_onnxruntime(), BackendError, "version")
    foreign = raised(call)
    monkeypatch.setattr(compression, "traced_model", Mock(side_effect=foreign))
    with pytest.raises(SbsError) as caught:
        sbs_fx.compress(NET, torch.ones(2, 3, 8, 8))
    error = caught.value
    assert type(error) is expected, error
    assert str(error).startswith("compress stopped at ")
    assert said in str(error)
    assert "\n" not in str(error)
    assert "While executing" not in str(error)
    assert error.__cause__ is foreign


def test_one_line_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sbs_fx.cli.models.create_model", Mock(side_effect=raised(FOREIGN["json"][0])))
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "resnet18"])
    said = capfd.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.strip().splitlines()[-1].startswith("error: the command stopped at JSONDecodeError: ")
    with pytest.raises(SystemExit):
        main(["inspect", "resnet18", "-v"])
    assert "JSONDecodeError" in capfd.readouterr().err.split("error: ")[0]


def test_what_a_caller_raises_passes() -> None:
    def stop(stage: str, share: float) -> None:
        json.loads("{")

    with pytest.raises(json.JSONDecodeError):
        sbs_fx.compress(NET, torch.ones(2, 3, 8, 8), progress=stop)
    with pytest.raises(TypeError, match="no_such_option"):
        sbs_fx.compress(NET, no_such_option=1)  # type: ignore[call-arg]
    with pytest.raises(KeyboardInterrupt):
        boundary("stop")(Mock(side_effect=KeyboardInterrupt))()


def test_settings_are_refused_by_an_error_of_ours() -> None:
    """In Python, out of a dict and out of JSON, with each problem as data."""
    for make in (
        lambda: sbs_fx.Config(epochs=-1, colour=3),
        lambda: sbs_fx.Config.model_validate({"epochs": -1, "colour": 3}),
        lambda: sbs_fx.Config.model_validate_json('{"epochs": -1, "colour": 3}'),
    ):
        with pytest.raises(SettingsError, match="^invalid Config: epochs: .*; colour: ") as caught:
            make()
        assert [problem["loc"] for problem in caught.value.problems] == [("epochs",), ("colour",)]
        assert isinstance(caught.value, ValueError)
    with pytest.raises(SettingsError, match="ema"):
        sbs_fx.Config(training={"ema": 3})


def test_public_calls_have_the_boundary() -> None:
    for name in sbs_fx.__all__:
        value = getattr(sbs_fx, name)
        if inspect.isfunction(value):
            chain = [value]
            while hasattr(chain[-1], "__wrapped__"):
                chain.append(chain[-1].__wrapped__)
            assert any(call.__code__.co_filename.endswith("boundary.py") for call in chain), name
