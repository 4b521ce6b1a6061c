"""The documentation is true: its Python runs, its commands and options exist, its errors read as it says, its links
lead somewhere, and the reference has every public name.

A page's Python blocks share one namespace, as a reader who runs them in turn would have it. A block that is followed by
a text block with the name of an error raises that error, in these words ("..." stands for anything). A block that
cannot run here is marked `<!-- not run: reason -->`.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import sbs_fx
from sbs_fx.cli import main
from sbs_fx.cli.app import app
from sbs_fx.cli.exporting import format_of
from sbs_fx.export import BACKENDS, TARGETS
from sbs_fx.passes.channels.facts import FACTS
from sbs_fx.passes.channels.inference import RULES, load_rules
from sbs_fx.plan import Budget, errors
from sbs_fx.search import Keep
from sbs_fx.search.registry import METHODS, names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BESIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md")]
PAGES = [*BESIDE, *sorted(DOCS.rglob("*.md"))]
MODULES = ("sbs_fx", "sbs_fx.passes", "sbs_fx.search", "sbs_fx.export", "sbs_fx.plan", "sbs_fx.training")
# What a page's blocks import beside us; where it is not installed, the page is skipped.
TOOLS = {
    "index": ("onnx", "onnxscript", "onnxruntime"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "aoti": ("torchao",),
    "executorch": ("executorch",),
    "coming-from": ("torchao", "onnx", "onnxscript", "onnxruntime", "openvino"),
}
MOST_LINES, WIDTH, MOST_NOT_RUN = 150, 120, 5
_BLOCK = re.compile(r"(?:<!-- (not run: [^\n]+?) -->\n)?^```(\w*)\n(.*?)^```\n?(```text\n(.*?)^```$)?", re.M | re.S)
_RAISES = re.compile(r"(\w+): .")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `error`: the text that it raises. `not_run`: why it is not run."""

    language: str
    text: str
    line: int
    error: str = ""
    not_run: str = ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        not_run, language, code, _, told = match.groups()
        error = told if told and language == "python" and _RAISES.match(told) else ""
        found.append(Block(language, code, text[: match.start(3)].count("\n"), error, not_run or ""))
    return found


def identity(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_of(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def commands(page: Path) -> list[list[str]]:
    """The words of each `sbs-fx` command in the page's bash blocks."""
    lines = [
        line.strip()
        for block in blocks(page)
        if block.language == "bash"
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sbs-fx ")]


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Lines outside of fenced blocks."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


# -- what is shown runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers goes again, or other tests would find it."""
    METHODS.entries(), TARGETS.entries(), load_rules()  # reason: what loads later would go with the page
    tables: list[dict[object, object]] = [METHODS._entries, TARGETS._entries, BACKENDS._entries, RULES, FACTS]  # type: ignore[list-item]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=identity)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None) -> None:
    for tool in TOOLS.get(page.stem if page.parent != ROOT else "", ()):
        pytest.importorskip(tool)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": f"page_{page.stem.replace('-', '_')}"}
    for block in python_of(page):
        if block.not_run:
            continue
        code = compile("\n" * block.line + block.text, str(page), "exec")
        if not block.error:
            exec(code, namespace)
            continue
        with pytest.raises(sbs_fx.SbsError) as raised:
            exec(code, namespace)
        told = " ".join(f"{raised.type.__name__}: {raised.value}".split())
        pattern = ".*".join(re.escape(part) for part in " ".join(block.error.split()).split("..."))
        assert re.fullmatch(pattern, told), f"{identity(page)}:{block.line}: {told}"


def test_few_blocks_are_not_run() -> None:
    skipped = [f"{identity(page)}: {block.not_run}" for page in PAGES for block in blocks(page) if block.not_run]
    assert len(skipped) <= MOST_NOT_RUN, skipped


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=identity)
def test_commands_and_options_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of options are those that the page shows."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language == "yaml":
            (tmp_path / "run.yaml").write_text(block.text)
    group = typer.main.get_command(app)
    for words in commands(page):
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        try:
            given = command.make_context(words[0], list(words[1:])).params  # a usage error names what is wrong
        except typer.Exit:  # of an option that prints something and ends
            continue
        texts = [given["budget"]] if given.get("budget") else (given.get("budgets") or "").split(",")
        for text in filter(None, texts):
            Budget.parse(text)
        for text in given.get("keep") or ():
            Keep.parse(text)
        assert given.get("method", "auto") in names()
        assert set((given.get("methods") or "auto").split(",")) <= set(names())
        if words[0] == "export":
            assert (given["format"] or format_of(given["out"])) in TARGETS.entries()


def test_the_way_of_a_newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """The commands under "To try it now", as they stand."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    section = (DOCS / "index.md").read_text().partition("### To try it now")[2].partition("\n## ")[0]
    (tmp_path / "section.md").write_text(section)
    done = commands(tmp_path / "section.md")
    assert [words[0] for words in done] == ["inspect", "compress", "report", "evaluate", "export"]
    for words in done:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0, capfd.readouterr().err
    assert (tmp_path / "tried" / "policy.json").exists()
    assert (tmp_path / "tried.onnx").exists()


# -- nothing is missing ------------------------------------------------------------------------------------------------


def public_names() -> list[str]:
    return [f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__]


def test_the_reference_has_every_public_name() -> None:
    listed = [
        line[4:]
        for page in (DOCS / "reference").glob("*.md")
        for line in page.read_text().splitlines()
        if line[:4] == "::: "
    ]
    assert sorted(listed) == sorted(public_names())


def test_every_error_has_an_entry() -> None:
    page = DOCS / "troubleshooting.md"
    classes = {n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, sbs_fx.SbsError)}
    assert {line[3:] for _, line in prose(page) if line.startswith("## ")} == classes
    shown = {block.error.partition(":")[0] for block in blocks(page) if block.error}
    assert shown == classes - {"SbsError"}


def test_every_method_and_target_has_an_entry() -> None:
    methods = {line[4:-1] for _, line in prose(DOCS / "methods.md") if line.startswith("## `")}
    assert methods == set(METHODS.entries())
    assert {page.stem for page in (DOCS / "targets").glob("*.md")} == set(TARGETS.entries())


def test_pages_of_targets_have_the_same_headings() -> None:
    headings = {
        page.stem: [line for _, line in prose(page) if line.startswith("## ")]
        for page in (DOCS / "targets").glob("*.md")
    }
    assert all(each == headings["onnx"] and len(each) == 6 for each in headings.values()), headings


# -- form --------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_lines_are_short(page: Path) -> None:
    if page.name == "SECURITY.md":
        return
    assert not [f"{n}: {len(line)}" for n, line in prose(page) if len(line) > WIDTH and not line.startswith("|")]


def slugs(page: Path) -> set[str]:
    headings = (line.lstrip("#").strip() for _, line in prose(page) if line.startswith("#"))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for number, line in prose(page):
        for link in _LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if link.startswith(("http://", "https://")):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in slugs(target)):
                wrong.append(f"{number}: {link}")
            elif DOCS in page.parents and DOCS not in target.parents:
                wrong.append(f"{number}: {link} is outside of the site")
    assert not wrong


def test_the_site_builds(tmp_path: Path) -> None:
    for tool in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(tool)
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {page: page.read_text() for page in (tmp_path / "site").rglob("*.html")}
    reference = "".join(text for page, text in built.items() if page.parent.name == "reference")
    assert not [name for name in public_names() if f'id="{name}"' not in reference]
    foreign = {
        found for text in built.values() for found in re.findall(r'<(?:script|img|link)[^>]+"(https?://[^"]+)"', text)
    }
    assert not foreign, "a page asks other servers for parts of itself"
