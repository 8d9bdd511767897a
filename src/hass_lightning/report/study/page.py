"""The report of a study: terminal, Markdown, LaTeX, CSV and one HTML page, all of the same tables."""

from __future__ import annotations

from pathlib import Path

from hass_lightning.report.headline import Tile
from hass_lightning.report.html import Page, Section, write_page
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

GAP_NOTE = (
    "Left: how often the head is right at depth k when it sees the target's true features (validation answers, of the "
    "chains whose first k-1 tokens were right; runs that did not log it: at step 1, of all positions), minus how often "
    "depth k was accepted when decoding, of those that got there. A tree offers several tokens a depth, so that this "
    "gap may be negative. Right, free of the tree: what the head loses over all positions by seeing its own features."
)
EFFECTS_NOTE = "Blue: main effects. Orange: interactions. Filled: shown at the 5 % level, Holm over all tests. "
FRONT_NOTE = "Filled: no other cell has both more τ and less cost. Differences within the whiskers are not shown."


def study_report(study: Study, output_dir: Path, title: str) -> dict[str, Path]:
    """Print the cells to stderr; write report.html, report.md, table.tex and table.csv.

    Returns:
        the files by their ending.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    cells, effects, claims = cells_table(study), effects_table(study), claims_table(study)
    tables = [("Cells", cells), ("Main effects and interactions", effects), ("Claims", claims)]
    appendix = [("What differs", differences_table(study)), ("Left out", missing_table(study))]
    for _, table in tables:
        if table is not None and table.lines:
            print_table(table)
    page = Page(f"Study {title}", subtitle(study), _tiles(study))
    page.tables = [(name, table) for name, table in tables if table is not None and table.lines]
    page.appendix = [(name, table) for name, table in appendix if table is not None]
    for name, figure, note, half in (
        ("Acceptance length τ by cell", cells_figure(study), "Whiskers: 95 % intervals. Dashed: the baseline.", False),
        ("Effects", effects_figure(study), EFFECTS_NOTE, False),
        ("Response curves", response_figure(study), "Whiskers: 95 % intervals.", False),
        ("τ against training compute", pareto_figure(study), FRONT_NOTE, False),
        ("Exposure gap", gap_figure(study), GAP_NOTE, False),
    ):
        if figure is not None:
            page.sections.append(Section(name, figure, note, half))
    files = {"html": write_page(page, output_dir / "report.html")}
    parts = [f"# {page.title}", subtitle(study)]
    for name, table in (*page.tables, *page.appendix):
        parts += [f"## {name}", table.markdown().strip()]
    for name, text in (
        ("report.md", "\n\n".join(parts) + "\n"),
        ("table.tex", cells.latex()),
        ("table.csv", cells.csv()),
    ):
        path = output_dir / name
        path.write_text(text, encoding="utf-8")
        files[path.suffix[1:]] = path
    return files


def subtitle(study: Study) -> str:
    """What was measured how often."""
    num_runs = sum(len(cell.runs) for cell in study.cells)
    seeds = {run.seed for cell in study.cells for run in cell.runs}
    measured = f"decoded with {study.decoder}" if study.metric == DECODED else "τ simulated, not decoded"
    return f"{len(study.cells)} cells · {num_runs} runs · {len(seeds)} seeds · {measured}"


def _tiles(study: Study) -> list[Tile]:
    home = study.rows[study.baseline]
    claimed = [claim for claim in claims_of(study) if not claim.text.startswith("no ")]
    best = max(study.rows, key=lambda row: row.tau.value)
    tests = len(study.comparisons) + len(study.effects)
    return [
        Tile("baseline τ", f"{home.tau.value:.2f}", home.label),
        Tile("largest τ", f"{best.tau.value:.2f}", best.label, "of the cells as they are: not yet a claim"),
        Tile("claims shown", f"{len(claimed)} of {tests}", "Holm at 5 %"),
    ]
