"""Records grouped into the series of a plot, with the same color for a draft and decoder in every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hass_lightning.measure.record import BASELINE, Record
from hass_lightning.report.style import BASELINE_COLOR, color
from hass_lightning.report.summary_tables import in_order, line_keys, line_label
from hass_lightning.report.tables import Row

DASHES = ("solid", "dash", "dashdot", "dot")


@dataclass(frozen=True)
class Series:
    """A series: `label` is its full name, `line` omits the temperature (equal `line`s have equal colors)."""

    label: str
    line: str
    temperature: float
    is_baseline: bool


def series_of_rows(rows: Sequence[Row]) -> dict[Series, list[Row]]:
    """Group summary rows (or mappings with the same keys) by series, in the order of the tables."""
    # a decoder has one rule per temperature, so its label already distinguishes rules
    keys = [key for key in line_keys(rows) if key != "rule"]
    groups: dict[Series, list[Row]] = {}
    for row in in_order(rows):
        line = line_label(row, [key for key in keys if key != "temperature"])
        baseline = row.get("decoder") == BASELINE
        series = Series(line_label(row, keys), line, float(row.get("temperature") or 0.0), baseline)
        groups.setdefault(series, []).append(row)
    return groups


def series_of(records: Sequence[Record]) -> dict[Series, list[Record]]:
    """Group records by series, all benchmarks together."""
    names = ("draft", "decoder", "temperature", "top_p", "top_k", "target")
    rows = [{name: getattr(record, name) for name in names} | {"record": record} for record in records]
    return {series: [row["record"] for row in found] for series, found in series_of_rows(rows).items()}


def colors_of(series: Sequence[Series]) -> dict[str, str]:
    """Return a color for each `line`; gray for the baseline."""
    lines = list(dict.fromkeys(each.line for each in series if not each.is_baseline))
    grey = {each.line: BASELINE_COLOR for each in series if each.is_baseline}
    return {line: color(index) for index, line in enumerate(lines)} | grey


def dashes_of(series: Sequence[Series]) -> dict[float, str]:
    """Return a dash style for each temperature; the lowest one is solid."""
    temperatures = sorted({each.temperature for each in series})
    return {temperature: DASHES[index % len(DASHES)] for index, temperature in enumerate(temperatures)}
