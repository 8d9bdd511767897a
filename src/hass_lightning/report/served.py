"""The page of a comparison between a serving engine and the records measured here (`hass-report served=…`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from hass_lightning.measure.engine_counts import read_engine_counts
from hass_lightning.measure.record import Record, read_records
from hass_lightning.measure.served import ServedComparison, compare_served, likely_causes
from hass_lightning.report.headline import Tile
from hass_lightning.report.html import Page, write_page
from hass_lightning.report.pages import print_table
from hass_lightning.report.style import color, styled
from hass_lightning.report.tables import Column, Table
from hass_lightning.runs.files import write_whole

FIGURE_NOTE = (
    "Share of the cycles that accepted the position, of those that accepted all earlier ones. *: p < 0.05 (Holm)."
)


def served_report(
    folder: Path,
    served: str,
    output_dir: Path | None = None,
    *,
    before: str | None = None,
    **chosen: Any,
) -> dict[str, Any]:
    """Compare an engine's counts with records, print the table and write `served.html` and `served.json`.

    Args:
        folder: run folder of `hass-benchmark`.
        served, before: as `path` and `before` of `read_engine_counts`.
        output_dir: where to write; None: `<folder>/report`.
        chosen: values of `choose_records`.

    Returns:
        the content of `served.json`, and the path of the page.
    """
    records = choose_records(read_records(folder / "records.jsonl"), **chosen)
    found = compare_served(records, read_engine_counts(served, before))
    causes = [asdict(cause) for cause in likely_causes(found)]
    content = {
        "verdict": verdict(found),
        "engine": found.counts.engine,
        "length_is_consistent": found.counts.consistent,
        "our_length": found.our_length,
        "served_length": found.served_length,
        "positions": [asdict(each) for each in found.positions],
        "causes": causes,
    }
    output_dir = output_dir or folder / "report"
    table = served_table(found)
    print_table(table)
    page = Page("Trained against served", f"{found.counts.engine} · {records[0].decoder} of {records[0].draft}")
    page.tiles = [
        Tile("measured here", f"{found.our_length:.3f}", "1 + Σ positions", "the compared positions only"),
        Tile("served", f"{found.served_length:.3f}", "1 + Σ positions", "", bad=found.differs),
    ]
    page.tiles_note = verdict(found)
    page.add("Acceptance by position", served_figure(found), FIGURE_NOTE)
    page.tables.append(("By position", table))
    if causes:
        columns = [Column(name, name, numeric=False) for name in ("name", "evidence", "check")]
        page.tables.append(("Likely causes", Table.of(columns, causes)))
    path = write_page(page, output_dir / "served.html")
    write_whole(output_dir / "served.json", json.dumps(content, indent=2) + "\n")
    return content | {"files": {"html": str(path), "json": str(output_dir / "served.json")}}


def choose_records(
    records: Sequence[Record],
    head: str | None = None,
    decoder: str | None = None,
    temperature: float | None = None,
) -> list[Record]:
    """Return the records of one head, decoder and temperature; the decoder is `chain` unless given.

    Raises:
        ValueError: no record is left, or several heads or temperatures are.
    """
    decoder = decoder or "chain"
    kept = [record for record in records if record.decoder == decoder]
    if not kept:
        decoders = sorted({record.decoder for record in records if any(record.drafted)})
        raise ValueError(f"decoder={decoder} was not measured: choose one of {', '.join(decoders) or 'none'}.")
    for key, name, value in (("head", "draft", head), ("temperature", "temperature", temperature)):
        values = sorted({getattr(record, name) for record in kept})
        if value is None and len(values) > 1:
            raise ValueError(f"{key}=null, but the records have several: set it to one of {values}.")
        if value is not None and value not in values:
            raise ValueError(f"{key}={value} was not measured: choose one of {values}.")
        kept = kept if value is None else [record for record in kept if getattr(record, name) == value]
    return kept


def verdict(found: ServedComparison) -> str:
    """Return the result in one sentence."""
    lengths = f"{found.served_length:.3f} served, {found.our_length:.3f} measured here"
    shown = [str(each.position) for each in found.positions if each.significant]
    if shown:
        return f"acceptance differs at position {', '.join(shown)} ({lengths})."
    return f"no difference is shown at any position ({lengths})."


def served_table(found: ServedComparison) -> Table:
    """Return one row per position: conditional and joint rates of both sides, and the test."""
    rows = [{**asdict(each), "verdict": "differs" if each.significant else "–"} for each in found.positions]
    columns = [
        Column("position", "position", digits=0),
        Column("here", "ours", "given the earlier ones", digits=4),
        Column("served", "served", "given the earlier ones", digits=4),
        Column("here", "joint_ours", "of all drafts", digits=4),
        Column("served", "joint_served", "of all drafts", digits=4),
        Column("p", "p_value", digits=4),
        Column("p (Holm)", "p_adjusted", digits=4),
        Column("verdict", "verdict", numeric=False),
    ]
    keyed = [{column.key: row[column.name] for column in columns} for row in rows]
    note = f"{found.counts.engine}: {found.counts.num_drafts} drafts. Fisher's exact test on counts divided by the "
    return Table.of(columns, keyed, notes=[note + "design effect of the questions; Holm over positions."])


def served_figure(found: ServedComparison) -> go.Figure:
    """Draw the conditional rates of both sides as bars, with a star where they differ."""
    figure = go.Figure()
    places = [str(each.position) for each in found.positions]
    for index, (name, label) in enumerate((("ours", "measured here"), ("served", "served"))):
        values = [getattr(each, name) for each in found.positions]
        stars = ["*" if each.significant and name == "served" else "" for each in found.positions]
        figure.add_bar(x=places, y=values, name=label, marker_color=color(index), text=stars, textposition="outside")
    figure.update_layout(barmode="group")
    figure.update_yaxes(range=[0, 1.05])
    return styled(figure, x="position", y="accepted, given the earlier ones")
