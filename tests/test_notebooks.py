"""The notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def test_outputs_are_stripped_and_the_readme_names_every_notebook():
    pytest.importorskip("nbformat")
    named = set(re.findall(r"\((\w+\.ipynb)\)", (FOLDER / "README.md").read_text()))
    assert named == {path.name for path in NOTEBOOKS} and len(named) >= 4
    for path in NOTEBOOKS:
        for cell in read(path).cells:
            assert not cell.get("outputs") and not cell.get("execution_count"), (path.name, cell.id)


@pytest.mark.slow
def test_every_notebook_runs(tmp_path):
    """One after the other in one kernel, its names forgotten in between: importing torch four times takes a minute."""
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    together = nbformat.v4.new_notebook(cells=[])
    for path in NOTEBOOKS:
        together.cells += [nbformat.v4.new_code_cell("%reset -f", id=path.stem[:2]), *read(path).cells]
    nbclient.NotebookClient(
        together, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    text = "\n".join(output.get("text", "") for cell in together.cells for output in cell.get("outputs", []))
    assert "band 0 of the code is band 0 of the picture" in text
    assert "have the same config" not in text and "model.alignment.depth (1 → 3)" in text
