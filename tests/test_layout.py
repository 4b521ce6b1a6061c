"""The tree: which folder may import which, no circles, no file too long, no function of too many arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

import sbs_fx

ROOT = Path(sbs_fx.__file__).parent
# Each floor imports from those above it in this list alone; folders of one floor know nothing of one another.
FLOORS = (
    ("plan",),
    ("quantizer", "data", "weights", "sources"),
    ("models",),
    ("passes",),
    ("training",),
    ("calibration", "report"),
    ("search", "export"),
    ("config", "result", "saved"),
    ("timm_model",),
    ("bisection", "job"),
    ("compression", "demo"),
    ("comparing",),
    ("cli",),
)
PASSES = (("graph",), ("channels",), ("capture", "cost", "gates"), ("static",), ("oracles",))
MOST_LINES = 420
MOST_ARGUMENTS = 6
# Where argument lists are short: what users do not call. `benchmark` they do.
INSIDE = ("plan", "search", "export", "passes/cost", "calibration", "report")
PUBLIC = {"benchmark", "calibrate", "reconstruct", "reconstruct_without_data"}


def sources() -> list[Path]:
    """All files of the package; `passes` is reached through its link."""
    return [*ROOT.glob("*.py"), *(f for d in ROOT.iterdir() if d.is_dir() for f in d.rglob("*.py"))]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file names anywhere, lazily or for types alone too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sbs_fx"):
            for name in node.names:
                inner = ROOT.parent.joinpath(*node.module.split("."), name.name)
                yield f"{node.module}.{name.name}" if inner.with_suffix(".py").exists() else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("sbs_fx"))


def floor_of(name: str, floors: tuple[tuple[str, ...], ...], depth: int) -> tuple[int, str] | None:
    parts = name.split(".")
    part = parts[depth] if len(parts) > depth else ""
    return next(((i, part) for i, floor in enumerate(floors) if part in floor), None)


def test_imports_go_one_way() -> None:
    wrong = []
    for path in sources():
        for floors, depth in ((FLOORS, 1), (PASSES, 2)):
            if depth == 2 and ".passes." not in f"{module(path)}.":
                continue
            here = floor_of(module(path), floors, depth)
            for name in imports(path):
                if depth == 2 and not name.startswith("sbs_fx.passes."):
                    continue
                there = floor_of(name, floors, depth)
                if here and there and there[1] != here[1] and there[0] >= here[0]:
                    wrong.append(f"{module(path)} imports {name}")
    assert not wrong


def test_every_folder_has_a_floor() -> None:
    named = {name for floor in FLOORS for name in floor}
    there = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"__init__"} == named


def test_there_is_no_circle() -> None:
    """Of files; a rule's file and the table that it fills know each other, the table by a lazy import."""
    graph = nx.DiGraph((module(path), name) for path in sources() for name in imports(path))
    registered = {"sbs_fx.passes.channels.inference": "sbs_fx.passes.channels.rules"}
    graph.remove_edges_from(registered.items())
    faces = {module(p) for p in sources() if p.name == "__init__.py"}
    graph.remove_edges_from([(a, b) for a, b in graph.edges if a in faces or b in faces])
    assert not list(nx.simple_cycles(graph))


def test_files_and_argument_lists_are_short() -> None:
    long = {module(path): len(path.read_text().splitlines()) for path in sources()}
    assert not {name: lines for name, lines in long.items() if lines > MOST_LINES}
    many = []
    for path in sources():
        if not str(path.relative_to(ROOT)).startswith(INSIDE):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in PUBLIC:
                a = node.args
                names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls", "ctx")]
                if len(names) > MOST_ARGUMENTS:
                    many.append(f"{module(path)}.{node.name}: {len(names)}")
    assert not many


def test_no_test_imports_from_a_test() -> None:
    tests = Path(__file__).parent
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                assert not node.module.rpartition(".")[2].startswith("test_"), f"{path} imports {node.module}"
