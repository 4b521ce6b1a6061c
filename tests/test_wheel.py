"""The wheel is whole: built, installed into an empty environment and imported there, far from the checkout.

Twice: built from the checkout, where `sbs_fx/passes` is a link, and from the unpacked source archive, where it is not.
The environment's only content is the wheel. Its dependencies are gigabytes, so the environment that runs the tests
lends them: a `.pth` file appends its directory to the path. A `.pth` file inside an appended directory is not read, so
an editable installation there stays invisible; and the test checks the file of every module imported.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sbs_fx"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Runs in the empty environment: imports the package and every module of its passes, prints name -> file.
REPORT_FILES = """
import importlib, importlib.metadata, json, pkgutil, sys
import sbs_fx, sbs_fx.passes
for found in pkgutil.walk_packages(sbs_fx.passes.__path__, "sbs_fx.passes."):
    importlib.import_module(found.name)
files = {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "sbs_fx"}
print(json.dumps({"version": importlib.metadata.version("sbs-fx"), "files": files}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command away from the checkout and give back its standard output; a failure shows all it wrote."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def package_files() -> set[str]:
    """Paths of the package's files, through the link `sbs_fx/passes`, as the wheel must name them."""
    found = set()
    for folder, folders, names in os.walk(PACKAGE, followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__"]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in names if not name.endswith(".pyc")}
    return found


@dataclass(frozen=True)
class Environment:
    """An environment that holds nothing but the wheel, and an empty folder to work in."""

    wheel: Path
    folder: Path
    work: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def script(self) -> Path:
        return self.python.with_name("sbs-fx.exe" if os.name == "nt" else "sbs-fx")

    @property
    def site_packages(self) -> Path:
        program = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(run(self.python, "-I", "-c", program, cwd=self.work).strip())


@pytest.fixture(scope="module", params=["checkout", "source archive"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new environment with the wheel in it, built without a network by the backend of the `dev` extra."""
    folder = tmp_path_factory.mktemp("wheel")
    dist, work = folder / "dist", folder / "work"
    work.mkdir()
    # Without --wheel, the source archive is built first and the wheel from the unpacked archive.
    only = ["--wheel"] if request.param == "checkout" else []
    run(sys.executable, "-m", "build", "--no-isolation", *only, "--outdir", dist, ROOT, cwd=work)
    (wheel,) = dist.glob("*.whl")
    assert bool(list(dist.glob("*.tar.gz"))) == (request.param == "source archive")

    venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
    made = Environment(wheel, folder / "venv", work)
    assert not any(made.site_packages.iterdir()), "the new environment is not empty"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", made.python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=work)
    lent = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (made.site_packages / "lent.pth").write_text("\n".join(lent) + "\n")
    return made


def test_wheel_holds_the_package_and_nothing_else(environment: Environment) -> None:
    with zipfile.ZipFile(environment.wheel) as archive:
        entries = archive.infolist()
    assert not [entry.filename for entry in entries if stat.S_ISLNK(entry.external_attr >> 16)]
    names = {entry.filename for entry in entries}
    top = f"sbs_fx-{PROJECT['version']}.dist-info"
    assert {name for name in names if not name.startswith(f"{top}/")} == package_files()
    assert {"sbs_fx/py.typed", "sbs_fx/passes/__init__.py", f"{top}/licenses/LICENSE"} <= names


def test_wheel_imports_from_the_new_environment(environment: Environment) -> None:
    report = json.loads(run(environment.python, "-I", "-c", REPORT_FILES, cwd=environment.work).splitlines()[-1])
    assert report["version"] == PROJECT["version"]
    assert {"sbs_fx", "sbs_fx.passes"} <= report["files"].keys()
    installed = environment.site_packages.resolve()
    elsewhere = {
        name: file for name, file in report["files"].items() if not Path(file).resolve().is_relative_to(installed)
    }
    assert not elsewhere, f"imported from outside the new environment {installed}"


def test_wheel_installs_the_command(environment: Environment) -> None:
    assert "inspect" in run(environment.script, "--help", cwd=environment.work)


def test_checkout_resolves_passes() -> None:
    """In the checkout, one folder has both names; unpacked from an archive, the files are in the package."""
    import sbs_fx.passes

    folder = Path(sbs_fx.passes.__file__ or "").parent
    assert folder.resolve() == (PACKAGE / "passes").resolve()
    if (ROOT / "passes").is_dir():
        assert (PACKAGE / "passes").samefile(ROOT / "passes")


def test_source_archive_builds_alone(tmp_path: Path) -> None:
    """The archive holds regular files only, so that it unpacks where links cannot be made."""
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
    assert all(member.isfile() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    assert package_files() <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "tests/test_wheel.py"} <= names
