"""Mutation test: each line of the lists here is made wrong in a copy of the tree, and the tests named beside it must
notice.

In: `*.txt` beside this file. Blocks begin with "= file : tests", a file of the package and the test files or ids that
should notice; a mutation is "- text", which one line of the file holds and no other, over "+ text" in its place, and
maybe "@ tests" instead of those of its block; "#" begins a remark. Out: a table by file, the survivors and the share
that was noticed; exit code 1 below 95 %. Holds: the working tree is only read; a mutation whose text is not there
exactly once is an error; tests that fail without any mutation notice none, and are named.

One process imports the libraries and forks for each mutation, which then imports the package afresh.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import os
import py_compile
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIED = ("sbs_fx", "passes", "tests", "benchmarks", "docs", "pyproject.toml", "README.md")
SHARE = 0.95  # of mutations that must be noticed
LIMIT = 300.0  # seconds for one; what takes longer counts as noticed, as an endless loop is
SLOW = ("tests/passes/test_integer.py::test_every_kind_of_block_keeps_its_function_and_its_form",)  # a minute
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)
PASSED, CAUGHT = 0, (1, 2, 4, None)  # exit codes of pytest; 2 and 4 where a test cannot be imported

# Before torch is imported; `quick` draws few examples.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"HYPOTHESIS_PROFILE": "quick", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
sys.dont_write_bytecode = True


class ListError(Exception):
    """A mutation that is none."""


@dataclass(frozen=True)
class Mutation:
    """One text of one line of a file in place of another, and the tests that should notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}\n    - {self.old}\n    + {self.new}"

    def applied(self, root: Path) -> str:
        """The file with the mutation. Raises ListError."""
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ListError(f"the old text is there {count} times, expected once: {self}")
        mutated = text.replace(self.old, self.new)
        try:
            same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(text))
        except SyntaxError as error:
            raise ListError(f"{error.msg}: {self}") from None
        if same:
            raise ListError(f"changes nothing: {self}")
        return mutated


@dataclass(frozen=True)
class Outcome:
    """How the tests of a mutation ended: the exit code of pytest, None after the time limit; the test that failed."""

    mutation: Mutation
    code: int | None
    test: str
    seconds: float

    @property
    def is_caught(self) -> bool:
        return self.code in CAUGHT


def read(text: str, where: str) -> Iterator[Mutation]:
    """The mutations of one list. Raises ListError."""
    file, tests, rows = "", (), [line.strip() for line in text.splitlines()]
    rows = [row for row in rows if row and not row.startswith("#")]
    for i, row in enumerate(rows):
        kind, rest = row[0], row[2:].strip()
        if kind == "=":
            file, _, named = (part.strip() for part in rest.partition(" : "))
            tests = tuple(named.split())
        elif kind == "-":
            following = [*rows[i + 1 : i + 3], "", ""]
            if following[0][:1] != "+" or not tests:
                raise ListError(f"{where}: {row!r} has nothing in its place, or no tests")
            own = tuple(following[1][2:].split()) if following[1][:1] == "@" else tests
            yield Mutation(file, rest, following[0][2:].strip(), own)
        elif kind not in "+@":
            raise ListError(f"{where}: {row!r}; expected a line that begins with one of = - + @ #")


def every() -> list[Mutation]:
    """All mutations, each checked. Raises ListError, which names all that are wrong."""
    mutations = [mutation for path in sorted(HERE.glob("*.txt")) for mutation in read(path.read_text(), path.name)]
    wrong = []
    for mutation in mutations:
        try:
            mutation.applied(ROOT)
            missing = [test for test in mutation.tests if not (ROOT / test.partition("::")[0]).exists()]
            wrong += [f"no such test file {missing}: {mutation}"] if missing else []
        except (ListError, OSError) as error:
            wrong.append(str(error))
    if len(set(mutations)) != len(mutations):
        wrong.append(f"twice: {next(m for m in mutations if mutations.count(m) > 1)}")
    if wrong:
        raise ListError("\n".join(wrong))
    return mutations


def copy_of_tree(folder: Path) -> Path:
    """A copy whose compiled files are checked by their sources' contents: times of files are too coarse."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    for name in ("sbs_fx", "passes"):
        compileall.compile_dir(folder / name, quiet=1, invalidation_mode=mode)
    return folder


def import_libraries() -> None:
    """What every mutation needs and none changes; no module of ours, and no thread."""
    import accelerate  # noqa: F401
    import hypothesis  # noqa: F401
    import networkx  # noqa: F401
    import onnx  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import rich.table  # noqa: F401
    import scipy.optimize  # noqa: F401
    import timm.data  # noqa: F401
    import torch

    torch.set_num_threads(1)
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(2, 2),), strict=False)  # reason: it imports much
    assert not [name for name in sys.modules if name.partition(".")[0] in ("sbs_fx", "passes", "tests")]


def run_tests(tests: Sequence[str], tree: Path, options: Sequence[str]) -> int:
    """In a process of its own: pytest in a tree. Returns its exit code."""
    import pytest

    os.setsid()
    output = os.open(tree / "log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry).resolve() not in (HERE, ROOT))]
    os.environ["PYTHONPATH"] = str(tree)  # of processes that tests start
    always = ["-q", "--tb=short", "-rfE", "--rootdir", str(tree), "-p", "no:cacheprovider"]
    code = int(pytest.main([*always, "-p", "_hypothesis_pytestplugin", *tests, *options]))
    imported = sys.modules.get("sbs_fx")
    return code if imported is None or str(imported.__file__).startswith(str(tree)) else 3


def forked(tests: Sequence[str], tree: Path, options: Sequence[str]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        code = run_tests(tests, tree, options)
    finally:
        sys.stdout.flush()
        os._exit(code)


def outcomes(mutations: Sequence[Mutation], trees: Sequence[Path], left_out: Sequence[str]) -> Iterator[Outcome]:
    """One mutation a tree at a time, as they end."""
    options = ["-x", *(f"--deselect={test}" for test in left_out)]
    waiting, free = list(reversed(mutations)), list(trees)
    running: dict[int, tuple[Mutation, Path, float]] = {}
    while waiting or running:
        while waiting and free:
            mutation, tree = waiting.pop(), free.pop()
            (tree / mutation.file).write_text(mutation.applied(ROOT))
            running[forked(mutation.tests, tree, options)] = mutation, tree, time.monotonic()
        time.sleep(0.05)
        for pid, (mutation, tree, begun) in list(running.items()):
            seconds, (ended, status) = time.monotonic() - begun, os.waitpid(pid, os.WNOHANG)
            if not ended and seconds < LIMIT:
                continue
            if not ended:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del running[pid]
            shutil.copyfile(ROOT / mutation.file, tree / mutation.file)
            free.append(tree)
            log = (tree / "log").read_text(errors="replace")
            failed = _FAILED.search(log)
            code = os.waitstatus_to_exitcode(status) if ended else None
            if code not in (PASSED, *CAUGHT):
                raise ListError(f"the tests of this mutation did not run, exit code {code}: {mutation}\n{log[-3000:]}")
            yield Outcome(mutation, code, failed[1] if failed else "", seconds)


def failing(mutations: Sequence[Mutation], tree: Path) -> list[str]:
    """Of the named tests those that fail without any mutation, and so notice nothing. Raises ListError."""
    tests = dict.fromkeys(test for mutation in mutations for test in mutation.tests)
    whole = [test for test in tests if "::" not in test or test.partition("::")[0] not in tests]
    _, status = os.waitpid(forked(whole, tree, [f"--deselect={test}" for test in SLOW]), 0)
    log = (tree / "log").read_text(errors="replace")
    if (code := os.waitstatus_to_exitcode(status)) not in (PASSED, 1):
        raise ListError(f"the tests do not run without a mutation, exit code {code}:\n{log[-3000:]}")
    return [found[1] for found in _FAILED.finditer(log)]


def print_table(results: Sequence[Outcome]) -> None:
    files = dict.fromkeys(result.mutation.file for result in sorted(results, key=lambda r: r.mutation.file))
    width = max(map(len, files))
    print(f"\n{'file':{width}}  mutations  caught  seconds")
    for file in files:
        of_file = [result for result in results if result.mutation.file == file]
        caught, seconds = sum(result.is_caught for result in of_file), sum(result.seconds for result in of_file)
        print(f"{file:{width}}  {len(of_file):9}  {caught:6}  {seconds:7.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("parts", nargs="*", help="only mutations with one of these in their file's name or texts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="read the lists, run nothing")
    settings = parser.parse_args()
    mutations = every()
    chosen = [m for m in mutations if not settings.parts or any(part in str(m) for part in settings.parts)]
    print(f"{len(chosen)} of {len(mutations)} mutations")
    if settings.check or not chosen:
        return 0
    begun = time.monotonic()
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = []
        for number in range(max(1, settings.workers)):
            trees.append(Path(folder, str(number)).resolve())
            trees[-1].mkdir()
            copy_of_tree(trees[-1])
        red = failing(chosen, trees[0])
        print(f"{time.monotonic() - begun:.0f} s; tests that fail without a mutation: {red or 'none'}", flush=True)
        results = []
        for result in outcomes(chosen, trees, [*SLOW, *red]):
            results.append(result)
            verdict = "SURVIVED" if not result.is_caught else "caught" if result.code else "time limit"
            print(f"{verdict:10} {result.seconds:5.1f} s  {result.mutation.file}  {result.test}", flush=True)
            if not result.is_caught:
                print(f"           {result.mutation.new}", flush=True)
    print_table(results)
    survivors = [result.mutation for result in results if not result.is_caught]
    for survivor in survivors:
        print(f"\nsurvived: {survivor}")
    share = 1 - len(survivors) / len(results)
    print(f"\n{len(results) - len(survivors)} of {len(results)} caught, {share:.1%}; {time.monotonic() - begun:.0f} s")
    return 0 if share >= SHARE and not red else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ListError as error:
        sys.exit(f"error: {error}")
