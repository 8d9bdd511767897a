"""A study as tables: cells, effects, claims, what differs, what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hass_lightning.measure.factorial import Effect
from hass_lightning.measure.statistics import Interval
from hass_lightning.report.provenance_text import without_paths
from hass_lightning.report.study.analysis import DECODED, Row, Study
from hass_lightning.report.study.cells import show
from hass_lightning.report.study.claims import ABOUT, claims_of
from hass_lightning.report.study.runs import differing
from hass_lightning.report.tables import Cell, Column, Table, is_number

BASELINE_WORD = "(baseline)"


def _cell(interval: Interval, unit: float = 1.0) -> Cell:
    return Cell(interval.value / unit, interval.low / unit, interval.high / unit)


def cells_table(study: Study) -> Table:
    """A line a cell: τ, difference from the baseline with its verdict, speedup, a_k, loss, compute."""
    rows = study.rows
    deepest = max(len(row.rates) for row in rows)
    simulated = "" if study.metric == DECODED else "simulated "
    columns = [
        Column("cell", "cell", numeric=False),
        Column("seeds", "seeds", digits=0),
        Column(f"{simulated}τ", "tau", interval=True),
        Column("against baseline", "difference_percent", digits=1, unit=" %", interval=True),
        Column("p (Holm)", "p_adjusted", digits=3),
        Column("verdict", "verdict", numeric=False),
        Column("speedup", "speedup", unit="×", interval=True),
        *(Column(f"a{depth}", f"a{depth}", interval=True) for depth in range(1, deepest + 1)),
    ]
    optional = [
        ("loss", "val_loss", 3, [_cell(row.loss) for row in rows]),
        ("tokens (k)", "tokens_thousands", 0, [_cell(row.tokens, 1e3) for row in rows]),
        ("TFLOPs", "tflops", 2, [_cell(row.flops, 1e12) for row in rows]),
        ("seconds", "train_seconds", 0, [_cell(row.seconds) for row in rows]),
    ]
    shown = [each for each in optional if any(is_number(cell.value) for cell in each[3])]
    columns += [Column(header, name, digits=digits, interval=True) for header, name, digits, _ in shown]
    found = dict(zip([p for p in range(len(rows)) if p != study.baseline], study.comparisons, strict=False))
    lines = []
    for position, row in enumerate(rows):
        effect = found.get(position)
        compared = _compared(effect) if effect else [Cell(), Cell(), Cell()]
        if position == study.baseline:
            compared[2] = Cell(BASELINE_WORD)
        rates = [_cell(rate) for rate in row.rates] + [Cell()] * (deepest - len(row.rates))
        start = [Cell(row.label), Cell(row.num_seeds), _cell(row.tau)]
        extra = [values[position] for _, _, _, values in shown]
        lines.append([*start, *compared, _cell(row.speedup), *rates, *extra])
    return Table(columns, lines, notes=notes(study))


def _compared(effect: Effect) -> list[Cell]:
    ends = [100 * (end - 1) for end in (effect.ratio.value, effect.ratio.low, effect.ratio.high)]
    return [Cell(*ends), Cell(effect.p_adjusted), Cell(effect.verdict)]


def notes(study: Study) -> list[str]:
    """What the numbers of the table mean."""
    what = (
        f"τ: tokens per target forward, bonus token counted, {study.decoder}"
        if study.metric == DECODED
        else "simulated τ: a chain on the validation answers (nothing was decoded in every run)"
    )
    several = any(row.num_seeds > 1 for row in study.rows)
    spread = "over seeds where there are two or more (loss and compute, too), else over questions"
    spread = spread if several else "over questions"
    return [
        f"{what}; [95 % interval], {spread}. a_k: accepted at depth k, of those that got there; always over questions.",
        f"{ABOUT[study.unit]} p-values: Holm over all tests of this report.",
    ]


def effects_table(study: Study) -> Table | None:
    """Main effects and interactions of the crossed factors; None without a crossing."""
    if not study.effects or study.grid is None:
        return None
    columns = [
        Column("effect", "effect", numeric=False),
        Column("kind", "kind", numeric=False),
        Column("on τ", "difference_percent", digits=1, unit=" %", interval=True),
        Column("p", "p_value", digits=3),
        Column("p (Holm)", "p_adjusted", digits=3),
        Column("resolvable", "detectable_percent", digits=1, unit=" %"),
        Column("verdict", "verdict", numeric=False),
    ]
    lines = []
    for effect in study.effects:
        difference, adjusted, verdict = _compared(effect)
        kind = "main effect" if effect.contrast.kind == "main" else "interaction"
        resolvable = Cell(100 * effect.detectable if math.isfinite(effect.detectable) else None)
        lines.append(
            [Cell(effect.contrast.name), Cell(kind), difference, Cell(effect.p_value), adjusted, resolvable, verdict]
        )
    levels = "; ".join(f"{name}: {', '.join(map(show, found))}" for name, found in study.grid.levels.items())
    text = [
        f"Crossed: {levels}. Main effect: a level against the factor's first, averaged over the other factors. "
        "Interaction: the factor by which both together differ from the product of their separate effects."
    ]
    if study.grid.left_out:
        text.append(f"Left out, for their combinations are incomplete: {', '.join(study.grid.left_out)}.")
    return Table(columns, lines, notes=text)


def claims_table(study: Study) -> Table:
    """Claims with their evidence."""
    columns = [Column("claim", "claim", numeric=False), Column("evidence", "evidence", numeric=False)]
    return Table(columns, [[Cell(claim.text), Cell(claim.evidence)] for claim in claims_of(study)])


def differences_table(study: Study) -> Table | None:
    """The config keys that differ, a column a cell; None where none does."""
    found = differing([cell.settings for cell in study.cells])
    if not found:
        return None
    columns = [Column("key", "key", numeric=False)]
    columns += [Column(row.label, f"cell{number}", numeric=False) for number, row in enumerate(study.rows, start=1)]
    lines = [[Cell(key), *(Cell(without_paths(show(value))) for value in values)] for key, values in found.items()]
    return Table(columns, lines)


def missing_table(study: Study) -> Table | None:
    """Runs that the report leaves out, and why."""
    if not study.left_out:
        return None
    columns = [Column("run", "run", numeric=False), Column("why", "why", numeric=False)]
    return Table(columns, [[Cell(name), Cell(without_paths(why))] for name, why in study.left_out])


def front(rows: Sequence[Row], costs: Sequence[float | None]) -> list[int]:
    """Positions of the cells that no other one beats in both τ and cost, by rising cost."""
    known = [
        (cost, -row.tau.value, position) for position, (row, cost) in enumerate(zip(rows, costs, strict=True)) if cost
    ]
    best, found = -math.inf, []
    for _, negative, position in sorted(known):
        if -negative > best:
            best = -negative
            found.append(position)
    return found
