"""Random changes of files, random command lines: each is refused by an error of ours, or changes nothing."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import sbs_fx
from sbs_fx.export import load_pt2, pt2
from sbs_fx.plan import Policy
from sbs_fx.plan.errors import SbsError
from sbs_fx.plan.files import checksum_of, read_as
from sbs_fx.report import Report
from sbs_fx.search.sensitivities import Sensitivities
from sbs_fx.training import Checkpoints
from tests.oracles.commands import run_command
from tests.oracles.counts import COUNTS
from tests.oracles.promises import outcome

LONG = settings.default.max_examples > 1000  # type: ignore[union-attr]
EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def examples(few: int, many: int) -> settings:
    return settings(
        max_examples=many if LONG else few,
        suppress_health_check=[*HealthCheck],
        phases=(Phase.explicit, Phase.generate),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result that was saved, with losses, and a checkpoint."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("fuzz")
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    data = [(EXAMPLE, torch.tensor([0, 1]))]
    sbs_fx.compress(net, EXAMPLE, budget=0.1, data=data, method="two_stage").save(directory)
    with Checkpoints(directory, {"model": "a"}) as checkpoints:
        checkpoints.save("search", {"x": torch.arange(40.0)}, {"step": 3, "best": [0.5, None]})
    return directory


def _checkpoint(path: Path) -> Any:
    with Checkpoints(path.parent, {"model": "a"}) as checkpoints:
        saved = checkpoints.load("search")
        assert saved is not None
        return saved.tensors["x"].tolist(), saved.state


def _model(path: Path) -> Any:
    model = load_pt2(path)
    return [x.tolist() for x in torch.utils._pytree.tree_leaves(model(EXAMPLE))]


READERS: dict[str, Callable[[Path], Any]] = {
    "policy.json": Policy.load,
    "sensitivity.json": Sensitivities.load,
    "report.json": lambda path: read_as(path, "a report", Report.from_json),
    "search.safetensors": _checkpoint,
    "model.pt2": _model,
}


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One to three changes of bytes: bits, cuts, insertions, ranges twice or away."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(("flip", "cut", "insert", "twice", "away", "zero")),
                st.floats(0, 1),
                st.integers(1, 255),
                st.integers(1, 40),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def change(data: bytes) -> bytes:
        for kind, share, value, length in steps:
            i = min(len(data) - 1, int(share * len(data)))
            if i < 0:
                break
            part = data[i : i + length]
            data = {
                "flip": lambda i=i, v=value, d=data: d[:i] + bytes([d[i] ^ v]) + d[i + 1 :],
                "cut": lambda i=i, d=data: d[:i],
                "insert": lambda i=i, v=value, n=length, d=data: d[:i] + bytes([v]) * n + d[i:],
                "twice": lambda i=i, p=part, d=data: d[:i] + p + d[i:],
                "away": lambda i=i, n=length, d=data: d[:i] + d[i + n :],
                "zero": lambda i=i, p=part, d=data: d[:i] + bytes(len(p)) + d[i + len(p) :],
            }[kind]()
        return data

    return change


@examples(60, 8000)
@given(st.sampled_from([*READERS][:-1]), changes())
def test_changed_bytes(place: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    _try_bytes(place, name, change)


@examples(12, 1500)
@given(changes())
def test_changed_models(place: Path, change: Callable[[bytes], bytes]) -> None:
    _try_bytes(place, "model.pt2", change)


def _try_bytes(place: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = place / name
    data = path.read_bytes()
    expected = READERS[name](path)
    try:
        path.write_bytes(change(data))
        answer = outcome(lambda: READERS[name](path))
    finally:
        path.write_bytes(data)
    COUNTS[f"changed {name}: {'refused' if isinstance(answer, SbsError) else 'the same'}"] += 1
    if not isinstance(answer, SbsError):
        assert answer == expected


# -- files whose digest is right ---------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**70, 1.5, float("nan"), float("inf"), "", "x", "\0", "../x", [], [None], {}, {"x": 1},
    [[[]]], "9" * 50, 1e308,
)  # fmt: skip


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:4]) if isinstance(tree, list) else ()
    for key, value in items:
        found += _places(value, (*path, key))
    return found


def _changed(tree: Any, path: tuple[Any, ...], kind: str, value: Any) -> Any:
    """Another value in one place, or none, or a field more."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(path) > 1 or kind == "value":
        copy[path[0]] = _changed(copy[path[0]], path[1:], kind, value)
    elif kind == "gone":
        del copy[path[0]]
    elif isinstance(copy, dict):
        copy["another"] = value
    return copy


@examples(80, 10000)
@given(
    st.sampled_from(("policy.json", "sensitivity.json", "report.json", "model.pt2")),
    st.floats(0, 1),
    st.sampled_from(("value", "gone", "more")),
    st.sampled_from(ODD),
)
def test_changed_fields(place: Path, name: str, share: float, kind: str, value: Any) -> None:
    """Anybody can compute a digest anew: what is read then is a value, or an error of ours."""
    path = place / name
    data = path.read_bytes()
    text = _information(data) if name == "model.pt2" else data.decode()
    tree = json.loads(text)
    tree.pop("checksum", None)
    places = _places(tree)
    tree = _changed(tree, places[min(len(places) - 1, int(share * len(places)))], kind, value)
    try:
        if name == "model.pt2":
            path.write_bytes(_sealed(data, json.dumps(tree)))
        else:
            path.write_text(json.dumps({**tree, "checksum": checksum_of(tree)}))
        answer = outcome(lambda: READERS[name](path))
        if name == "policy.json" and not isinstance(answer, SbsError):
            answer = outcome(lambda: sbs_fx.load(place))
    finally:
        path.write_bytes(data)
    COUNTS[f"fields of {name}: {'refused' if isinstance(answer, SbsError) else 'read'}"] += 1


def _information(data: bytes) -> str:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        name = next(n for n in archive.namelist() if n.endswith(pt2.INFORMATION))
        return str(json.loads(archive.read(name))["content"])


def _sealed(data: bytes, text: str) -> bytes:
    result = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        members = {entry.filename: (entry, old.read(entry)) for entry in old.infolist()}
        digests = {
            name.partition("/")[2]: hashlib.sha256(content).digest()
            for name, (_, content) in members.items()
            if not name.endswith(pt2.INFORMATION)
        }
        for name, (entry, content) in members.items():
            if name.endswith(pt2.INFORMATION):
                content = json.dumps({"sha256": pt2._digest(digests, text), "content": text}).encode()
            new.writestr(entry, content, entry.compress_type)
    return result.getvalue()


# -- command lines -----------------------------------------------------------------------------------------------------

COMMANDS = (
    ["inspect", "resnet18"], ["compress", "resnet18", "--dry-run"], ["evaluate", "FILE"], ["report", "DIR"],
    ["bench", "FILE"], ["export", "FILE"], ["replan", "DIR"], ["apply", "resnet18", "FILE"], ["rerun", "DIR"],
    ["compare", "resnet18"], ["methods"], ["sweep", "resnet18"],
)  # fmt: skip
OPTIONS = (
    "--budget", "--data", "--batch-size", "--device", "--input-size", "--num-classes", "--in-chans", "--checkpoint",
    "--out", "--method", "--set", "--keep", "--seed", "--round-to", "--format", "--json", "--config", "--only", "--lr",
    "--max-drop", "--candidates", "--part", "--data-dir", "--html", "--threads", "--budgets", "--methods", "--epochs",
)  # fmt: skip
VALUES = (
    "", "0", "-3", "1e30", "nan", "5%", "abc", "\0", "../..", "DIR", "FILE", "TEXT", "EMPTY", "MISSING", "meta",
    "3,8,8",    "a=b", "training.ema=2", "é", "--", "9" * 40, "[", "digits", "/dev/null",
)  # fmt: skip


@examples(40, 3000)
@given(
    st.sampled_from(COMMANDS),
    st.lists(st.tuples(st.sampled_from(OPTIONS), st.sampled_from(VALUES)), min_size=1, max_size=3),
)
def test_command_lines(tmp_path_factory: Any, capfd: Any, command: list[str], options: list[tuple[str, str]]) -> None:
    """Each ends with an exit code of ours and in a line or a few; none with a traceback."""
    directory = tmp_path_factory.mktemp("line")
    (directory / "EMPTY").write_bytes(b"")
    (directory / "TEXT").write_text("no: such\n")
    (directory / "FILE.pt2").write_bytes(b"PK\3\4 no archive")
    (directory / "DIR").mkdir()
    names = {n: str(directory / n) for n in ("DIR", "TEXT", "EMPTY", "MISSING")} | {"FILE": str(directory / "FILE.pt2")}
    words = [names.get(word, word) for word in [*command, *(w for pair in options for w in pair)]]
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        code = run_command(words)
    said = capfd.readouterr()
    COUNTS[f"command lines: exit code {code}"] += 1
    assert code in (0, 2), words
    assert "Traceback" not in said.err
    assert code == 0 or said.err.strip()
