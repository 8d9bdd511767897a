"""The report of a study: terminal, Markdown, LaTeX, CSV and an HTML page, all from the same tables."""

from __future__ import annotations

from pathlib import Path

from hass_lightning.report.headline import Tile
from hass_lightning.report.html import Page, write_page
from hass_lightning.report.pages import print_table
from hass_lightning.report.study.analysis import DECODED, Study
from hass_lightning.report.study.claims import claims_of
from hass_lightning.report.study.figures import (
    cells_figure,
    effects_figure,
    gap_figure,
    pareto_figure,
    response_figure,
)
from hass_lightning.report.study.tables import (
    cells_table,
    claims_table,
    differences_table,
    effects_table,
    missing_table,
)
from hass_lightning.runs.names import counted

GAP_NOTE = (
    "Left: how often the head is correct at depth k on target features (validation answers, of the chains whose first "
    "k-1 tokens were correct; for runs that did not log it, at step 1 of all positions), minus how often depth k was "
    "accepted in decoding, of those that reached it. A tree offers several tokens per depth, so this gap may be "
    "negative. Right, independent of the tree: accuracy that the head loses over all positions by reading its own "
    "predicted features."
)
EFFECTS_NOTE = (
    "Blue: main effects. Orange: interactions. Filled: shown at the 5 % level, Holm's method over all tests. "
)
FRONT_NOTE = "Filled: no other cell has both higher τ and lower compute. Differences within the whiskers are not shown."


def study_report(study: Study, output_dir: Path, title: str) -> dict[str, Path]:
    """Print the cells to stderr; write report.html, report.md, table.tex and table.csv.

    Returns:
        the files by suffix.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    cells = cells_table(study)
    tables = [
        ("Cells", cells),
        ("Main effects and interactions", effects_table(study)),
        ("Claims", claims_table(study)),
    ]
    appendix = [("What differs", differences_table(study)), ("Left out", missing_table(study))]
    page = Page(f"Study {title}", subtitle(study), _tiles(study))
    page.tables = [(name, table) for name, table in tables if table is not None and table.lines]
    page.appendix = [(name, table) for name, table in appendix if table is not None]
    for _, table in page.tables:
        print_table(table)
    page.add("Acceptance length τ by cell", cells_figure(study), "Whiskers: 95 % intervals. Dashed: the baseline.")
    page.add("Effects", effects_figure(study), EFFECTS_NOTE)
    page.add("Response curves", response_figure(study), "Whiskers: 95 % intervals.")
    page.add("τ against training compute", pareto_figure(study), FRONT_NOTE)
    page.add("Exposure gap", gap_figure(study), GAP_NOTE)
    files = {"html": write_page(page, output_dir / "report.html")}
    parts = [f"# {page.title}", subtitle(study)]
    for name, table in (*page.tables, *page.appendix):
        parts += [f"## {name}", table.markdown().strip()]
    texts = {"report.md": "\n\n".join(parts) + "\n", "table.tex": cells.latex(), "table.csv": cells.csv()}
    for name, text in texts.items():
        path = output_dir / name
        path.write_text(text, encoding="utf-8")
        files[path.suffix[1:]] = path
    return files


def subtitle(study: Study) -> str:
    """Return what was measured, and how often."""
    num_runs = sum(len(cell.runs) for cell in study.cells)
    seeds = {run.seed for cell in study.cells for run in cell.runs}
    measured = f"decoded with {study.decoder}" if study.metric == DECODED else "τ simulated, not decoded"
    counts = ((len(study.cells), "cell"), (num_runs, "run"), (len(seeds), "seed"))
    return " · ".join([*(counted(number, noun) for number, noun in counts), measured])


def _tiles(study: Study) -> list[Tile]:
    home = study.rows[study.baseline]
    claimed = [claim for claim in claims_of(study) if not claim.text.startswith("no ")]
    best = max(study.rows, key=lambda row: row.tau.value)
    tests = len(study.comparisons) + len(study.effects)
    return [
        Tile("baseline τ", f"{home.tau.value:.2f}", home.label),
        Tile("largest τ", f"{best.tau.value:.2f}", best.label, "of the cells as measured; not a claim"),
        Tile("claims shown", f"{len(claimed)} of {tests}", "Holm at 5 %"),
    ]
