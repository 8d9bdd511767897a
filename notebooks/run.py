"""Run the notebooks from top to bottom and store their outputs: python notebooks/run.py [01_pipeline.ipynb …]

Figures are stored as plotly's JSON, which Jupyter and VS Code draw, and as a PNG, which GitHub shows (`pip install
kaleido`; without it, only the JSON is stored).
"""

import base64
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
LIBRARY = "[real_accelerator.py"  # DeepSpeed prints on stdout


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, in a folder of its own."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # not the library's five megabytes in every notebook
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}) and (picture := png(output.data[PLOTLY])):
                output.data["image/png"] = picture
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without times, and without what libraries print."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                lines = output.text.splitlines(keepends=True)
                output.text = "".join(line for line in lines if LIBRARY not in line and output.name == "stdout")
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.text.strip()]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def png(figure: dict) -> str | None:
    """A figure as a PNG in base64; None without kaleido."""
    import plotly.graph_objects as go

    content = {key: figure[key] for key in ("data", "layout")}
    try:
        picture = go.Figure(content).to_image("png", width=900, height=content["layout"].get("height", 380))
    except (ImportError, ValueError, RuntimeError) as error:
        print(f"no PNG: {error}", file=sys.stderr)
        return None
    return base64.b64encode(picture).decode()


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(run(path), path)
        print(path.name)
