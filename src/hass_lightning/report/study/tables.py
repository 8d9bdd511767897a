"""The tables of a study: cells, effects, claims, differences, missing runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hass_lightning.measure.factorial import Effect
from hass_lightning.measure.statistics import Interval
from hass_lightning.report.provenance_text import without_paths
from hass_lightning.report.study.analysis import DECODED, Row, Study
from hass_lightning.report.study.cells import Grid, show
from hass_lightning.report.study.claims import ABOUT, claims_of
from hass_lightning.report.study.runs import differing
from hass_lightning.report.tables import Column, Table, is_number

BASELINE_WORD = "(baseline)"
DIFFERENCE = Column("on τ", "difference_percent", digits=1, unit=" %", interval=True)
P_ADJUSTED = Column("p (Holm)", "p_adjusted", digits=3)
VERDICT = Column("verdict", "verdict", numeric=False)


def _texts(*names: str) -> list[Column]:
    return [Column(name, name, numeric=False) for name in names]


def _tested(effect: Effect) -> dict[str, Any]:
    return {
        "difference_percent": effect.ratio.percent,
        "p_value": effect.p_value,
        "p_adjusted": effect.p_adjusted,
        "detectable_percent": 100 * effect.detectable if math.isfinite(effect.detectable) else None,
        "verdict": effect.verdict,
    }


def _in_units(interval: Interval, unit: float) -> Interval:
    return Interval(interval.value / unit, interval.low / unit, interval.high / unit)


def cells_table(study: Study) -> Table:
    """Return a row per cell: τ, difference from the baseline with its verdict, speedup, a_k, loss, compute."""
    compared = [_tested(effect) for effect in study.comparisons] or [{} for _ in study.rows[1:]]
    compared.insert(study.baseline, {"verdict": BASELINE_WORD})
    lines: list[dict[str, Any]] = [
        {
            "cell": row.label,
            "seeds": row.num_seeds,
            "tau": row.tau,
            "speedup": row.speedup,
            "val_loss": row.loss,
            "tokens_thousands": _in_units(row.tokens, 1e3),
            "tflops": _in_units(row.flops, 1e12),
            "train_seconds": row.seconds,
            **{f"a{depth}": rate for depth, rate in enumerate(row.rates, start=1)},
            **tested,
        }
        for row, tested in zip(study.rows, compared, strict=True)
    ]
    deepest = max(len(row.rates) for row in study.rows)
    optional = [
        Column("loss", "val_loss", digits=3, interval=True),
        Column("tokens (k)", "tokens_thousands", digits=0, interval=True),
        Column("TFLOPs", "tflops", interval=True),
        Column("seconds", "train_seconds", digits=0, interval=True),
    ]
    columns = [
        *_texts("cell"),
        Column("seeds", "seeds", digits=0),
        Column("τ" if study.metric == DECODED else "simulated τ", "tau", interval=True),
        replace(DIFFERENCE, header="against baseline"),
        P_ADJUSTED,
        VERDICT,
        Column("speedup", "speedup", unit="×", interval=True),
        *(Column(f"a{depth}", f"a{depth}", interval=True) for depth in range(1, deepest + 1)),
        *(column for column in optional if any(is_number(line[column.name].value) for line in lines)),
    ]
    return Table.of(columns, lines, notes=notes(study))


def notes(study: Study) -> list[str]:
    """Return explanations of the numbers in the table."""
    what = (
        f"τ: tokens per target forward, bonus token counted, {study.decoder}"
        if study.metric == DECODED
        else "simulated τ: a chain on the validation answers (nothing was decoded in every run)"
    )
    several = any(row.num_seeds > 1 for row in study.rows)
    spread = "over seeds if there are two or more (also loss and compute), else over questions"
    spread = spread if several else "over questions"
    return [
        f"{what}; [95 % interval], {spread}. a_k: accepted at depth k, of those that reached it; always over "
        "questions.",
        f"{ABOUT[study.unit]} p-values: Holm's method over all tests of this report.",
    ]


def effects_table(study: Study) -> Table | None:
    """Return main effects and interactions of the crossed factors; None without a crossing."""
    if not study.effects or study.grid is None:
        return None
    columns = [
        *_texts("effect", "kind"),
        DIFFERENCE,
        Column("p", "p_value", digits=3),
        P_ADJUSTED,
        Column("resolvable", "detectable_percent", digits=1, unit=" %"),
        VERDICT,
    ]
    kinds = {"main": "main effect", "interaction": "interaction"}
    lines = [
        {"effect": effect.contrast.name, "kind": kinds[effect.contrast.kind], **_tested(effect)}
        for effect in study.effects
    ]
    levels = "; ".join(f"{name}: {', '.join(map(show, found))}" for name, found in study.grid.levels.items())
    text = [
        f"Crossed: {levels}. Main effect: a level compared with the factor's first, averaged over the other factors. "
        "Interaction: the factor by which both together differ from the product of their separate effects."
    ]
    if study.grid.strength is not None:
        text.append(_fraction_note(study.grid))
    if study.grid.left_out:
        text.append(f"Left out, because their combinations are incomplete: {', '.join(study.grid.left_out)}.")
    return Table.of(columns, lines, notes=text)


def _fraction_note(grid: Grid) -> str:
    total = math.prod(map(len, grid.levels.values()))
    start = f"{len(grid.cells)} of {total} combinations, chosen so that a main effect contains no interaction of two"
    if grid.strength is not None and grid.strength >= 4:
        return (
            f"{start} or three factors, and an interaction of two contains none of two (but may contain one of three)."
        )
    return f"{start} factors. Interactions of two cannot be told from each other and are not shown."


def claims_table(study: Study) -> Table:
    """Return the claims with their evidence."""
    return Table.of(_texts("claim", "evidence"), [{"claim": c.text, "evidence": c.evidence} for c in claims_of(study)])


def differences_table(study: Study) -> Table | None:
    """Return the config keys that differ, a column per cell; None if there are none."""
    found = differing([cell.settings for cell in study.cells])
    cells = [Column(row.label, f"cell{number}", numeric=False) for number, row in enumerate(study.rows, start=1)]
    lines = [
        {"key": key} | {cell.name: without_paths(show(value)) for cell, value in zip(cells, values, strict=True)}
        for key, values in found.items()
    ]
    return Table.of([*_texts("key"), *cells], lines) if lines else None


def missing_table(study: Study) -> Table | None:
    """Return the runs that the report leaves out, with reasons."""
    lines = [{"run": name, "why": without_paths(why)} for name, why in study.left_out]
    return Table.of(_texts("run", "why"), lines) if lines else None


def front(rows: Sequence[Row], costs: Sequence[float | None]) -> list[int]:
    """Return the positions of the cells on the Pareto front of τ and cost, by increasing cost."""
    known = [
        (cost, -row.tau.value, position) for position, (row, cost) in enumerate(zip(rows, costs, strict=True)) if cost
    ]
    best, found = -math.inf, []
    for _, negative, position in sorted(known):
        if -negative > best:
            best = -negative
            found.append(position)
    return found
