"""The reports of a training run and of a benchmark. Both print their table and write one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hass_lightning.measure.record import Record
from hass_lightning.report.answers import worst_answers
from hass_lightning.report.curves import read_curves
from hass_lightning.report.decoding_plots import bars_figure, cost_figure, depth_figure, phase_figure, prompts_figure
from hass_lightning.report.headline import headline_note, headline_tiles, subtitle
from hass_lightning.report.html import Page, write_page
from hass_lightning.report.plots import acceptance_figure, accuracy_figure, loss_figure, training_speed_figure
from hass_lightning.report.provenance_text import read_config, read_provenance
from hass_lightning.report.record_tables import comparison_table, conventions_table
from hass_lightning.report.series import series_of
from hass_lightning.report.spec_bench import spec_bench_table
from hass_lightning.report.summary_tables import paper_table, plain_table
from hass_lightning.report.tables import Row, Table
from hass_lightning.runs.files import read_json
from hass_lightning.runs.screen import current_screen

INTERVAL_NOTE = "Whiskers: 95 % bootstrap intervals over questions. Dashed: autoregressive decoding."
TAU_NOTE = "Tokens per verifying target forward, bonus token counted. Whiskers: 95 % intervals."
SIMULATED_NOTE = (
    "Teacher-forced on the validation answers: the head's argmax at each depth, always unrolled to the same depth. It "
    "ranks heads; decoding with a tree accepts more tokens."
)
DEPTH_NOTE = (
    "Left: fraction of the cycles that reached depth k. Right: the product, which is the fraction of drafts that "
    "survive to depth k."
)
FEW = 4  # maximum number of series in a figure of half the page's width


def run_report(
    run_dir: Path,
    rows: Sequence[Row],
    records: Sequence[Record],
    tokenizer: Any = None,
    prompts: Mapping[str, str] | None = None,
) -> Path:
    """Write `<run_dir>/report.html` of a training run and print its final table to stderr.

    Args:
        run_dir: the run folder.
        rows: rows of `measure.summarize`. If `rows` and `records` are empty, the report shows only the training curves.
        records: records of the final measurement.
        tokenizer: with `decode(ids)`, for the colored answers (token ids without it).
        prompts: question by prompt id.

    Returns:
        the path of the report.
    """
    run_dir = Path(run_dir)
    curves = read_curves(run_dir)
    seconds = read_json(run_dir / "train_seconds.json").get("train_seconds")
    page = Page(f"Run {run_dir.resolve().name}", subtitle(records), headline_tiles(rows, seconds), headline_note(rows))
    if rows:
        table = plain_table(rows)
        print_table(table)
        page.tables.append(("Measured by decoding", table))
    _decoding_sections(page, rows, records)
    last = curves if any(name.startswith("val/survival") for name in curves) else None
    note = DEPTH_NOTE + (" Dotted: simulated in the last validation." if last else "")
    page.add("Accept rate and survival by depth", depth_figure(records, last), note)
    page.add("Loss by alignment step", loss_figure(curves), "Lines: training (smoothed). Circles: validation.")
    page.add("Accuracy by alignment step", accuracy_figure(curves), "How often the draft's argmax is the target's.")
    page.add("Simulated acceptance length", acceptance_figure(curves), SIMULATED_NOTE)
    page.add("Training", training_speed_figure(curves))
    _close(page, run_dir, records, tokenizer, prompts)
    return write_page(page, run_dir / "report.html")


def benchmark_report(
    output_dir: Path,
    rows: Sequence[Row],
    records: Sequence[Record],
    tokenizer: Any = None,
    cost_rows: Sequence[Row] | None = None,
    *,
    prompts: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.html`, `table.md`, `table.tex` and `table.csv` of a benchmark and print the table to stderr.

    With records of Spec-Bench, `spec_bench.md` is the row of its leaderboard.

    Args:
        output_dir: the folder.
        rows, records, tokenizer, prompts: as in `run_report`.
        cost_rows: `predicted_speedup`, `measured_speedup` and `name` of each configuration of the cost model.

    Returns:
        the path of the report.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    title = f"Benchmark {output_dir.resolve().name}"
    page = Page(title, subtitle(records), headline_tiles(rows), headline_note(rows))
    if rows:
        table = paper_table(rows)
        print_table(table)
        for ending, text in (("md", table.markdown()), ("tex", table.latex()), ("csv", table.csv())):
            (output_dir / f"table.{ending}").write_text(text, encoding="utf-8")
        page.tables.append(("Speedup and acceptance length", table))
        page.appendix.append(("All rows", plain_table(rows)))
    leaderboard = spec_bench_table(records)
    if leaderboard:
        (output_dir / "spec_bench.md").write_text(leaderboard.markdown(), encoding="utf-8")
        page.tables.append(("Row of Spec-Bench's leaderboard", leaderboard))
    comparisons = comparison_table(records)
    if comparisons:
        page.tables.append(("Head against head", comparisons))
    _decoding_sections(page, rows, records)
    page.add("Accept rate and survival by depth", depth_figure(records), DEPTH_NOTE)
    page.add("Predicted against measured speedup", cost_figure(cost_rows or []), "The band is 15 % around equality.")
    _close(page, output_dir, records, tokenizer, prompts)
    return write_page(page, output_dir / "report.html")


def print_table(table: Table) -> None:
    """Print a table to stderr (stdout contains only the command's line of JSON), or as the running command does."""
    screen = current_screen()
    if screen is not None:
        screen.table(table.rich())
        return
    console = Console(stderr=True)
    if not console.is_terminal:  # do not wrap lines in a log file
        console = Console(stderr=True, width=200)
    console.print(table.rich())


def _decoding_sections(page: Page, rows: Sequence[Row], records: Sequence[Record]) -> None:
    few = len(rows) <= FEW + 1
    page.add("Speedup", bars_figure(rows, "speedup", "speedup (×)", "×"), INTERVAL_NOTE, few)
    tau = bars_figure(rows, "acceptance_length", "τ (tokens per forward)")
    page.add("Acceptance length τ", tau, TAU_NOTE, few)
    few = len(series_of(records)) <= FEW + 1
    page.add("Time by phase", phase_figure(records), "Time of a new token by phase, prefill included.", few)
    page.add("Prompt by prompt", prompts_figure(records), "Each point is a question with all its turns.", few)


def _close(
    page: Page, folder: Path, records: Sequence[Record], tokenizer: Any, prompts: Mapping[str, str] | None
) -> None:
    """Add the end of both pages and write the file: answers, conventions, provenance, config."""
    groups = {series.label: group for series, group in series_of(records).items() if any(r.draft for r in group)}
    page.answers = worst_answers(groups, tokenizer, prompts)
    table = conventions_table(records)
    if table:
        page.appendix.append(("Acceptance under the conventions of other tools", table))
    page.provenance = read_provenance(folder)
    page.config = read_config(folder)
