"""The page that explains a published τ against a measured one (`hass-report gap=…`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml

from hass_lightning.measure.gap import FACTORS, Gap, Measurement, explain_gap, measurements_of
from hass_lightning.measure.record import read_records
from hass_lightning.report.headline import Tile
from hass_lightning.report.html import Page, write_page
from hass_lightning.report.pages import print_table
from hass_lightning.report.served import choose_records
from hass_lightning.report.style import BASELINE_COLOR, COLORS, safe, styled
from hass_lightning.report.tables import Column, Table
from hass_lightning.runs.files import write_json

FIGURE_NOTE = "From the measured τ to the published one, one factor at a time. The gray bar is what no record explains."
NOTE = "Intervals: 95 % jackknife over questions; the published number has none. Each row continues from the one above."


def gap_report(
    reference: str | Mapping[str, Any],
    mine: str | Sequence[str | Mapping[str, Any]],
    output_dir: Path | None = None,
    *,
    prompts: str | None = None,
    **chosen: Any,
) -> dict[str, Any]:
    """Explain the gap, print the table and write `gap.html` and `gap.json`.

    Args:
        reference: the published number and its conditions (`measure.gap.explain_gap`), or a YAML or JSON file of them.
        mine: run folders of `hass-benchmark`, or mappings with `records` (the folder), `template` and `training_rows`.
            The first one has the measurement to explain.
        output_dir: where to write; None: `report/` in the first folder.
        prompts: the benchmark to explain; None: the only one.
        chosen: `head`, `decoder` (None: dynamic_tree) and `temperature` of the measurement, as in `choose_records`.

    Returns:
        the content of `gap.json`, and the paths of the files.

    Raises:
        ValueError: the reference or a folder cannot be read, or the measurement to explain is not unique.
    """
    entries = [
        each if isinstance(each, Mapping) else {"records": each} for each in ([mine] if isinstance(mine, str) else mine)
    ]
    if not entries or not all(each.get("records") for each in entries):
        raise ValueError("gap.mine must be a run folder of hass-benchmark, or a list of them.")
    unknown = [key for each in entries for key in each if key not in ("records", "template", "training_rows")]
    if unknown:
        raise ValueError(f"gap.mine has the key {unknown[0]}: use records, template and training_rows.")
    found = [_measurements(each) for each in entries]
    start = _start(found[0], prompts, **chosen)
    gap = explain_gap(_reference(reference), start, [each for group in found for each in group if each is not start])
    output_dir = output_dir or Path(entries[0]["records"]) / "report"
    table = gap_table(gap)
    print_table(table)
    page = Page("Gap to the published acceptance length", f"{start.draft} · {start.records[0].decoder}")
    page.tiles = [
        Tile("measured τ", f"{gap.mine.value:.2f}", f"[{gap.mine.low:.2f}, {gap.mine.high:.2f}]"),
        Tile("published", f"{gap.reference:.2f}", f"convention {gap.convention}"),
        Tile("not explained", f"{gap.remainder.value:+.2f}", ", ".join(gap.not_evaluated)),
    ]
    page.add("Where the gap comes from", gap_figure(gap), FIGURE_NOTE)
    page.tables.append(("Factor by factor", table))
    named = [{"factor": name, "how": FACTORS[name]} for name in gap.not_evaluated]
    if named:
        columns = [Column("not evaluated", "factor", numeric=False), Column("how to evaluate it", "how", numeric=False)]
        page.tables.append(("Factors in the gray bar", Table.of(columns, named)))
    content = asdict(gap) | {"how_to_evaluate": {each["factor"]: each["how"] for each in named}}
    path = write_page(page, output_dir / "gap.html")
    content = dict(write_json(output_dir / "gap.json", content))
    return content | {"files": {"html": str(path), "json": str(output_dir / "gap.json")}}


def _measurements(entry: Mapping[str, Any]) -> list[Measurement]:
    records = read_records(Path(entry["records"]) / "records.jsonl")
    return measurements_of(records, entry.get("template"), entry.get("training_rows"))


def _start(found: Sequence[Measurement], prompts: str | None, **chosen: Any) -> Measurement:
    """Return the measurement to explain."""
    chosen["decoder"] = chosen.get("decoder") or "dynamic_tree"
    kept = choose_records([record for each in found for record in each.records], **chosen)
    names = sorted({record.benchmark for record in kept if prompts in (None, record.benchmark)})
    if len(names) != 1:
        measured = sorted({record.benchmark for record in kept})
        raise ValueError(f"prompts={prompts} must be one of the measured ones: {', '.join(measured)}.")
    first = next(record for record in kept if record.benchmark == names[0])
    return next(each for each in found if any(record is first for record in each.records))


def _reference(given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    try:
        read = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"gap.reference={given} cannot be read as YAML or JSON: {error}.") from error
    if not isinstance(read, dict):
        raise ValueError(f"gap.reference={given} must contain keys such as acceptance_length and prompts.")
    return read


def gap_table(gap: Gap) -> Table:
    """Return the measured τ, one row per step, the remainder and the published τ."""
    rows: list[dict[str, Any]] = [{"factor": "measured", "tau": gap.mine}]
    tau = gap.mine.value
    for step in gap.steps:
        tau += step.change.value
        rows.append(
            {
                "factor": step.factor,
                "mine": _text(step.mine),
                "reference": _text(step.reference),
                "change": step.change,
                "tau": tau,
            }
        )
    named = f"not explained ({', '.join(gap.not_evaluated)})" if gap.not_evaluated else "not explained"
    rows.append({"factor": named, "change": gap.remainder, "tau": gap.reference})
    columns = [
        *(Column(name, name, numeric=False) for name in ("factor", "mine", "reference")),
        Column("change of τ", "change", interval=True),
        Column("τ", "tau", interval=True),
    ]
    notes = [NOTE]
    if gap.not_stated:
        notes.append(f"Not stated by the reference or not known here, so not compared: {', '.join(gap.not_stated)}.")
    return Table.of(columns, rows, notes=notes)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={each}" for key, each in value.items() if each is not None)
    return "; ".join(map(_text, value)) if isinstance(value, list) else str(value)


def gap_figure(gap: Gap) -> go.Figure:
    """Draw the steps as bars that start where the bar before ends, from the measured to the published τ."""
    changes = [(step.factor, step.change) for step in gap.steps] + [("not explained", gap.remainder)]
    labels = ["measured", *(name for name, _ in changes), "published"]
    heights = [gap.mine.value, *(change.value for _, change in changes), gap.reference]
    bases, level = [0.0], gap.mine.value
    for _, change in changes:
        bases.append(level)
        level += change.value
    bases.append(0.0)
    steps = [COLORS[2] if change.value >= 0 else COLORS[4] for _, change in changes[:-1]]
    texts = [f"{heights[0]:.2f}", *(f"{change.value:+.2f}" for _, change in changes), f"{gap.reference:.2f}"]
    figure = go.Figure(
        go.Bar(
            x=list(map(safe, labels)),
            y=heights,
            base=bases,
            marker_color=[COLORS[0], *steps, BASELINE_COLOR, COLORS[0]],
            text=texts,
            textposition="outside",
            hovertext=[
                "{:.3f} [{:.3f}, {:.3f}]".format(*astuple(change)) for change in [gap.mine, *dict(changes).values()]
            ]
            + [f"{gap.reference:.3f}"],
            hovertemplate="%{x}: %{hovertext}<extra></extra>",
            cliponaxis=False,
        )
    )
    ends = [0.0, gap.mine.value, gap.reference, *(base + height for base, height in zip(bases, heights, strict=True))]
    figure.update_yaxes(range=[0, 1.12 * max(ends)])
    return styled(figure, y=f"τ ({gap.convention})")
