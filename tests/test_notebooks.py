"""The notebooks run from top to bottom, and are stored with the outputs of such a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
AGAIN = "python notebooks/run.py"


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def kinds(cell):
    """What a cell puts out, without the values and without what libraries print; streams are one, however cut."""
    said = [
        (output.output_type, *sorted(output.get("data", {}).keys() - {"image/png"}))
        for output in cell.outputs
        if output.get("name") != "stderr" and "[real_accelerator.py" not in output.get("text", "")
    ]
    return sorted(set(said))


def test_the_readme_names_every_notebook():
    named = set(re.findall(r"\((\w+\.ipynb)\)", (FOLDER / "README.md").read_text()))
    assert named == {path.name for path in NOTEBOOKS} and len(named) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_the_outputs_of_one_run(path):
    pytest.importorskip("nbformat")
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), AGAIN
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"], AGAIN
    assert path.stat().st_size < 200_000
    for output in outputs:
        text = output.get("text", "") + str(
            {key: data for key, data in output.get("data", {}).items() if key != "image/png"}
        )
        assert not re.findall(r"/(?:root|home|tmp|Users|work)/\S*", text), "a path of this machine"
        assert output.get("name") != "stderr", output


@pytest.mark.slow
def test_every_notebook_runs_and_puts_out_what_is_stored(tmp_path, monkeypatch):
    """In sequence in one kernel, with names cleared in between: importing torch four times takes a minute."""
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    stored = [read(path) for path in NOTEBOOKS]
    together = nbformat.v4.new_notebook(cells=[])
    for path in NOTEBOOKS:
        together.cells += [nbformat.v4.new_code_cell("%reset -f", id=path.stem[:2]), *read(path).cells]
    nbclient.NotebookClient(
        together, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    now = [cell for cell in code_cells(together) if cell.source != "%reset -f"]
    before = [cell for notebook in stored for cell in code_cells(notebook)]
    assert [kinds(cell) for cell in now] == [kinds(cell) for cell in before], AGAIN
    text = "\n".join(output.get("text", "") for cell in now for output in cell.outputs)
    assert "band 0 of the code is band 0 of the picture" in text
    assert "have the same config" not in text and "model.alignment.depth (1 → 3)" in text
