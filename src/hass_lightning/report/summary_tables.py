"""Tables of summary rows: one line per row, or the paper's layout with one line per draft, decoder and temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hass_lightning.measure.record import BASELINE
from hass_lightning.report.tables import Cell, Column, Row, Table, is_number, value_cell

# columns that, with the benchmark, identify a row
KEYS = ("draft", "decoder", "temperature", "top_p", "top_k", "rule", "target")
HEADERS = {"temperature": "T", "top_p": "top-p", "top_k": "top-k"}
MEAN = "mean"  # the group of the columns that average over benchmarks
TAU = Column("τ", "acceptance_length", interval=True)
SPEEDUP = Column("speedup", "speedup", unit="×", interval=True)
TAU_NOTE = "τ: tokens per target forward, bonus token counted; [95 % interval]"


def line_keys(rows: Sequence[Row]) -> list[str]:
    """Return the keys that distinguish rows: always the decoder, others only if they differ."""

    def differs(key: str) -> bool:
        if key == "draft":  # decoders without a head have no draft, which alone does not justify a column
            seen = {row.get(key) for row in rows if row.get("draft")}
        elif key == "rule":  # at temperature 0 the rule is always greedy
            seen = {row.get(key) for row in rows if row.get("temperature") and row.get("decoder") != BASELINE}
        else:
            seen = {row.get(key) for row in rows}
        return len(seen) > 1

    return [key for key in KEYS if key == "decoder" or differs(key)]


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Sort rows by temperature; then the baseline, decoders without a head, and the heads by name.

    A benchmark measures in random order, so the order of its rows has no meaning. The order of benchmarks is kept.
    """

    def place(row: Row) -> tuple[Any, ...]:
        sampling = (row.get("temperature") or 0.0, row.get("top_p") or 1.0, row.get("top_k") or 0)
        decoder = str(row.get("decoder", ""))
        return (str(row.get("target") or ""), *sampling, decoder != BASELINE, str(row.get("draft") or ""), decoder)

    return sorted(rows, key=place)


def line_label(row: Row, keys: Sequence[str]) -> str:
    """Return the name of a row in a plot: `hass · dynamic_tree · T=1`."""
    parts = []
    for key in keys:
        value = row.get(key)
        if value in (None, ""):
            continue
        named = key in HEADERS
        parts.append(f"{HEADERS[key]}={value:g}" if named and is_number(value) else str(value))
    return " · ".join(parts)


def share(num: Any, of: Any) -> str | None:
    """Return `6/6`, or None if nothing was compared."""
    return f"{num}/{of}" if is_number(num) and of else None


def _key_columns(keys: Sequence[str]) -> list[Column]:
    return [Column(HEADERS.get(key, key), key, numeric=False) for key in keys]


def plain_table(rows: Sequence[Row], caption: str = "") -> Table:
    """Return a table with one line per row: τ, speedup, tokens per second, prompts, identical answers."""
    rows = in_order(rows)
    keys = line_keys(rows)
    if len({row.get("benchmark") for row in rows}) > 1:
        keys.append("benchmark")
    shown = [
        {
            **row,
            "identical": share(row.get("num_identical"), row.get("num_compared", row.get("num_prompts"))),
            "identical_fp32": share(row.get("num_fp32_identical"), row.get("num_checked")),
        }
        for row in rows
    ]
    speed = Column("tokens/s", "tokens_per_second", digits=1)
    prompts = Column("prompts", "num_prompts", digits=0)
    checks = {"identical": "identical", "identical_fp32": "identical (fp32)"}
    compared = [Column(header, key, numeric=False) for key, header in checks.items() if any(row[key] for row in shown)]
    return Table.of([*_key_columns(keys), TAU, SPEEDUP, speed, prompts, *compared], shown, caption, [TAU_NOTE])


def mean_cell(cells: Sequence[Cell]) -> Cell:
    """Return the mean over benchmarks, whose questions are independent, with its interval by MOVER.

    Zou and Donner 2008: the distance from the mean to an end of its interval is the root of the summed squares of the
    parts' distances, divided by their number. If one part is missing there is no result, because a mean over other
    benchmarks is not comparable.
    """
    n = len(cells)
    if not n or not all(is_number(cell.value) for cell in cells):
        return Cell()
    mean = sum(cell.value for cell in cells) / n
    if not all(is_number(cell.low) and is_number(cell.high) for cell in cells):
        return Cell(mean)
    below = math.sqrt(sum((cell.value - cell.low) ** 2 for cell in cells)) / n
    above = math.sqrt(sum((cell.high - cell.value) ** 2 for cell in cells)) / n
    return Cell(mean, mean - below, mean + above)


def paper_table(rows: Sequence[Row], caption: str = "") -> Table:
    """Return the paper's layout: a row per draft, decoder and temperature, with speedup and τ of each benchmark."""
    benchmarks = list(dict.fromkeys(str(row.get("benchmark", "")) for row in rows))
    columns = {group: [replace(column, group=group) for column in (SPEEDUP, TAU)] for group in (*benchmarks, MEAN)}
    rows = in_order(rows)
    keys = line_keys(rows)
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(tuple(row.get(key) for key in keys), {key: row.get(key) for key in keys})
        line |= {column.key: value_cell(row, column.name) for column in columns[str(row.get("benchmark", ""))]}
    for line in lines.values():
        for place, column in enumerate(columns[MEAN]):
            line[column.key] = mean_cell([value_cell(line, columns[name][place].key) for name in benchmarks])
    shown = [*benchmarks, MEAN] if len(benchmarks) > 1 else benchmarks
    every = [*_key_columns(keys), *(column for group in shown for column in columns[group])]
    return Table.of(every, list(lines.values()), caption, [TAU_NOTE])
