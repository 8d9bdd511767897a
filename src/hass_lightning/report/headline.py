"""The numbers at the top of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hass_lightning.measure.record import BASELINE, Record
from hass_lightning.report.series import Series, series_of_rows
from hass_lightning.report.summary_tables import mean_cell, share
from hass_lightning.report.tables import Column, Row, is_number, value_cell


@dataclass(frozen=True)
class Tile:
    """One of the numbers at the top."""

    name: str
    value: str
    detail: str = ""
    hint: str = ""
    bad: bool = False  # a defect, shown in red


def fastest(rows: Sequence[Row]) -> tuple[Series, list[Row]] | None:
    """Return the speculative series with the largest mean speedup (τ if no speed is known), and its rows."""
    groups = series_of_rows([row for row in rows if row.get("decoder") != BASELINE])

    def rank(series: Series) -> tuple[float, float]:
        cells = (mean_cell([value_cell(r, name) for r in groups[series]]) for name in ("speedup", "acceptance_length"))
        speed, tau = (cell.value if is_number(cell.value) else 0.0 for cell in cells)
        return speed, tau

    best = max(groups, key=rank, default=None)
    return None if best is None else (best, groups[best])


def headline_note(rows: Sequence[Row]) -> str:
    """Return which series the numbers belong to if there are several series or benchmarks."""
    best = fastest(rows)
    if best is None:
        return ""
    series, lines = best
    several = len(series_of_rows([row for row in rows if row.get("decoder") != BASELINE])) > 1
    parts = [f"fastest line measured: {series.label}" if several else series.label]
    if len(lines) > 1:
        parts.append(f"mean of {len(lines)} benchmarks")
    return ", ".join(parts) if several or len(lines) > 1 else ""


def headline_tiles(rows: Sequence[Row], train_seconds: Any = None) -> list[Tile]:
    """Return τ, speedup, tokens per second and prompts of the fastest series, identity checks of all, training time."""
    tiles = []
    best = fastest(rows)
    if best is not None:
        series, lines = best
        tau, speed = (mean_cell([value_cell(row, name) for row in lines]) for name in ("acceptance_length", "speedup"))
        column, times = Column("", ""), Column("", "", unit="×")
        tiles.append(Tile("acceptance τ", column.number(tau), column.ends(tau), "tokens per target forward"))
        tiles.append(Tile("speedup", times.number(speed), times.ends(speed), "over autoregressive decoding"))
        if len(lines) == 1 and is_number(lines[0].get("tokens_per_second")):
            places = ("benchmark", "temperature", "top_p", "top_k", "target")
            same = [row for row in rows if all(row.get(name) == lines[0].get(name) for name in places)]
            base = next((row.get("tokens_per_second") for row in same if row.get("decoder") == BASELINE), None)
            detail = f"baseline {base:.1f}" if is_number(base) else ""
            tiles.append(Tile("tokens per second", f"{lines[0]['tokens_per_second']:.1f}", detail, series.label))
        prompts = sum(row["num_prompts"] for row in lines if is_number(row.get("num_prompts")))
        tiles.append(Tile("prompts", str(prompts), f"{len(lines)} benchmarks" if len(lines) > 1 else ""))
    dtypes = {str(row.get("target", "")).rpartition("/")[2] for row in rows} - {""}
    working = dtypes.pop() if len(dtypes) == 1 else ""
    named = {"bfloat16": "identical in bf16", "float16": "identical in fp16"}.get(working, "identical as timed")
    for name, total, title, detail in (
        ("num_fp32_identical", "num_checked", "identical in fp32", "must be all"),
        ("num_identical", "num_compared", named, "" if working == "float32" else "ties may differ"),
    ):
        compared = [row for row in rows if is_number(row.get(name)) and row.get(total)]
        if compared:
            equal, of = sum(row[name] for row in compared), sum(row[total] for row in compared)
            hint = "greedy answers equal to the autoregressive ones, all decoders"
            tiles.append(Tile(title, str(share(equal, of)), detail, hint, bad="fp32" in name and equal < of))
    if is_number(train_seconds):
        tiles.append(Tile("training", f"{train_seconds / 60:.1f} min", "", "wall clock, all attempts"))
    return tiles


def subtitle(records: Sequence[Record]) -> str:
    """Return what all records share: target, answer length, benchmarks."""
    targets = sorted({record.target for record in records} - {""})
    lengths = sorted({record.max_new_tokens for record in records} - {0})
    benchmarks = list(dict.fromkeys(record.benchmark for record in records))
    parts = [f"target {', '.join(targets)}"] if targets else []
    parts += [f"at most {' or '.join(map(str, lengths))} new tokens"] if lengths else []
    return " · ".join([*parts, *([", ".join(benchmarks)] if benchmarks else [])])
