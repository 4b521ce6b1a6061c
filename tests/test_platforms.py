"""What differs between systems: modules that only POSIX has, clones without links, the matrix of the public CI."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "tests.yml"
CHECKOUT = pytest.mark.skipif(not WORKFLOW.exists(), reason="unpacked from an archive")
POSIX = ("crypt", "fcntl", "grp", "nis", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
IMPORT_ALL = f"""
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys({POSIX!r})
import sbs_fx
names = [m.name for m in pkgutil.walk_packages(sbs_fx.__path__, "sbs_fx.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_imports_without_what_only_posix_has() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT_ALL], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150


def test_a_clone_without_links_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    if not (ROOT / "hatch_build.py").exists():
        pytest.skip("unpacked from an archive")
    namespace: dict[str, object] = {}
    exec((ROOT / "hatch_build.py").read_text(), namespace)
    hook = namespace["PassesAreThere"]

    def build(root: Path) -> None:
        hook(str(root), {}, None, None, str(root), "wheel").initialize("standard", {})  # type: ignore[operator]

    build(ROOT)
    (tmp_path / "sbs_fx").mkdir()
    (tmp_path / "sbs_fx" / "passes").write_text("../passes")  # what git leaves there
    with pytest.raises(RuntimeError, match="made without symbolic links"):
        build(tmp_path)


@CHECKOUT
def test_the_public_matrix_runs_what_exists() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    matrix = jobs["platforms"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == ["3.11", "3.12", "3.13", "3.14"]
    commands = " ".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert all((ROOT / path).exists() for path in re.findall(r"tests/\S+", commands))
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make (\w+)", commands)) <= set(targets)
