"""Records grouped into the lines of a plot, with colours that stay with a draft and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hass_lightning.measure.records import BASELINE, Record
from hass_lightning.report.style import BASELINE_COLOR, color
from hass_lightning.report.tables import Row, in_order, line_keys, line_label

DASHES = ("solid", "dash", "dashdot", "dot")


@dataclass(frozen=True)
class Series:
    """A line: `label` names it in full, `line` without its temperature (equal `line`s have equal colours)."""

    label: str
    line: str
    temperature: float
    is_baseline: bool


def series_of_rows(rows: Sequence[Row]) -> dict[Series, list[Row]]:
    """Summary rows (or mappings with the same keys) by line, in the order of the tables."""
    # a decoder has one rule at a temperature, so that its label tells rules apart already
    keys = [key for key in line_keys(rows) if key != "rule"]
    groups: dict[Series, list[Row]] = {}
    for row in in_order(rows):
        line = line_label(row, [key for key in keys if key != "temperature"])
        baseline = row.get("decoder") == BASELINE
        series = Series(line_label(row, keys), line, float(row.get("temperature") or 0.0), baseline)
        groups.setdefault(series, []).append(row)
    return groups


def series_of(records: Sequence[Record]) -> dict[Series, list[Record]]:
    """Records by line, all benchmarks together."""
    names = ("draft", "decoder", "temperature", "top_p", "top_k", "target")
    rows = [{name: getattr(record, name) for name in names} | {"record": record} for record in records]
    return {series: [row["record"] for row in found] for series, found in series_of_rows(rows).items()}


def colors_of(series: Sequence[Series]) -> dict[str, str]:
    """A colour for each `line`; grey for the baseline."""
    lines = list(dict.fromkeys(each.line for each in series if not each.is_baseline))
    grey = {each.line: BASELINE_COLOR for each in series if each.is_baseline}
    return {line: color(index) for index, line in enumerate(lines)} | grey


def dashes_of(series: Sequence[Series]) -> dict[float, str]:
    """A dash for each temperature, the lowest one solid."""
    temperatures = sorted({each.temperature for each in series})
    return {temperature: DASHES[index % len(DASHES)] for index, temperature in enumerate(temperatures)}
