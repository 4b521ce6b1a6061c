"""The notebooks in the documentation run from top to bottom, and hold no output of an earlier run.

Cells run in one namespace, as in a kernel; what a kernel adds, such as `display`, they do not use.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), f"{path.name}, {cell['id']}", "exec"), namespace)


def test_they_are_notebooks_of_this_form() -> None:
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text())
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        cells = notebook["cells"]
        assert len({cell["id"] for cell in cells}) == len(cells)
        assert {cell["cell_type"] for cell in cells} == {"code", "markdown"}
        assert cells[0]["source"][0].startswith("# ")
        assert all(len(line) <= 120 for cell in cells for line in "".join(cell["source"]).splitlines()), path
