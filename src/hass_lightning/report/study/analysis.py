"""Analysis of a study: a row per cell, cells compared with the baseline, main effects, interactions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile, zip_longest
from typing import Any

import numpy as np

from hass_lightning.measure.factorial import (
    Contrast,
    Effect,
    against,
    effects_of,
    estimate_over_questions,
    estimate_over_seeds,
    interactions,
    interval_over_seeds,
    main_effects,
)
from hass_lightning.measure.metrics import depth_counts
from hass_lightning.measure.record import BASELINE, Record, group_by, select
from hass_lightning.measure.statistics import LEAST_QUESTIONS, Interval, holm, paired_log_ratio, ratio_interval
from hass_lightning.measure.verdicts import metric_interval, question_columns, speedup_interval
from hass_lightning.report.study.cells import Grid, StudyCell, find_baseline, find_grid, make_cells, without_repeats
from hass_lightning.report.study.runs import StudyRun
from hass_lightning.runs.names import counted

DECODED, SIMULATED = "acceptance_length", "simulated_acceptance_length"
FEW_RESAMPLES = 2000  # for acceptance rates, of which there are many


@dataclass
class Row:
    """The results of a cell, with intervals where they exist."""

    label: str
    num_seeds: int
    tau: Interval
    speedup: Interval
    rates: list[Interval]  # a_1, a_2, …: accepted at depth k, of the cycles that reached it
    forced: list[float]  # correct at depth k on target features, of the simulated chains that reached it
    accuracies: list[float]  # correct at alignment step k, on the head's predicted features from the second on
    loss: Interval
    tokens: Interval
    flops: Interval
    seconds: Interval


@dataclass
class Study:
    """Everything that a report shows."""

    cells: list[StudyCell]
    baseline: int
    metric: str
    decoder: str
    unit: str  # unit of the tests: seeds, questions, or "" if nothing can be tested
    rows: list[Row]
    comparisons: list[Effect]
    grid: Grid | None
    effects: list[Effect]
    left_out: list[tuple[str, str]]  # run, reason


def analyse(runs: Sequence[StudyRun], baseline: str | None = None, decoder: str | None = None) -> Study:
    """Group the runs into cells, compute intervals, and test the differences.

    Args:
        runs: the runs.
        baseline: see `find_baseline`.
        decoder: the decoder whose records count if several were measured.

    Raises:
        ValueError: nothing to compare, or an unknown decoder or baseline.
    """
    finished = [run for run in runs if run.status == "completed" and (run.metrics or run.records)]
    left_out = [(run.name, run.error or run.status) for run in runs if run not in finished]
    if not finished:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out)
        raise ValueError(f"none of {counted(len(runs), 'run')} is finished ({reasons}): nothing to report.")
    finished, repeats = without_repeats(finished)
    left_out += repeats
    chosen = _choose_decoder(finished, decoder)
    for run in finished:
        run.records = _lowest_temperature([record for record in run.records if record.decoder in (BASELINE, chosen)])
    metric = DECODED if all(_value(run, DECODED) for run in finished) else SIMULATED
    unmeasured = [run for run in finished if _value(run, metric) is None]
    left_out += [(run.name, "no acceptance length was measured: hass-benchmark draft=<run>") for run in unmeasured]
    cells = make_cells([run for run in finished if run not in unmeasured])
    if not cells:
        raise ValueError("no run has an acceptance length, decoded or simulated: measure them with hass-benchmark.")
    home = find_baseline(cells, baseline)
    unit, tests = _test(cells, against(home, [cell.label for cell in cells]), metric)
    num_comparisons = len(tests)
    grid = find_grid(cells, home)
    if grid:
        crossed = [cells[position] for position in grid.cells]
        levels = [cell.levels for cell in crossed]
        family = main_effects(levels, grid.levels)
        if grid.strength is None or grid.strength >= 4:
            family += interactions(levels, grid.levels)
        tests += _test(crossed, family, metric)[1]
    # all tests of a report are one family; otherwise one in twenty reports without any difference would claim one
    adjusted = holm([effect.p_value for effect in tests])
    tests = [replace(effect, p_adjusted=p) for effect, p in zip(tests, adjusted, strict=True)]
    rows, comparisons, effects = (
        [_row(cell, metric) for cell in cells],
        tests[:num_comparisons],
        tests[num_comparisons:],
    )
    return Study(cells, home, metric, chosen, unit, rows, comparisons, grid, effects, left_out)


def _choose_decoder(runs: Sequence[StudyRun], wanted: str | None) -> str:
    known = list(dict.fromkeys(r.decoder for run in runs for r in run.records if r.decoder != BASELINE))
    if wanted and wanted not in known:
        raise ValueError(f"decoder={wanted} is not in the records; use one of: {', '.join(known) or 'none'}.")
    return wanted or next((name for name in known if "tree" in name), known[0] if known else "")


def _lowest_temperature(records: list[Record]) -> list[Record]:
    """Return the records of the lowest temperature (and of its first top-p and top-k)."""
    lowest = min((record.temperature for record in records), default=0.0)
    sampling = next((record.sampling for record in records if record.temperature == lowest), None)
    return [record for record in records if record.sampling == sampling]


def _own(run: StudyRun) -> list[Record]:
    return [record for record in run.records if record.decoder != BASELINE]


def _value(run: StudyRun, metric: str) -> float | None:
    """Return τ of one run: from its records, otherwise as recorded when the run ended."""
    if metric == DECODED and _own(run):
        sums = np.array(list(question_columns(_own(run), DECODED).values())).sum(0)
        return float(sums[0] / sums[1]) if sums[1] else None
    value = run.metrics.get(metric)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _row(cell: StudyCell, metric: str) -> Row:
    runs = cell.runs
    speeds = [speedup_interval(_own(run), select(run.records, decoder=BASELINE)) for run in runs]
    tau, speedup = _over_seeds([_value(run, metric) for run in runs]), speeds[0]
    if len(runs) > 1:
        speedup = _over_seeds([speed.value for speed in speeds if speed.value > 0])
    elif metric == DECODED and _own(runs[0]):
        tau = metric_interval(_own(runs[0]), DECODED)
    return Row(
        label=cell.label,
        num_seeds=len({run.seed for run in runs}),
        tau=tau,
        speedup=speedup,
        rates=rate_intervals([record for run in runs for record in _own(run)]),
        forced=_mean_by_step([_forced(run) for run in runs]),
        accuracies=_mean_by_step([_by_step(run, "val/accuracy") for run in runs]),
        loss=_over_seeds([run.at_best("val/loss") for run in runs]),
        tokens=_over_seeds([run.metrics.get("train_tokens", run.last("compute/tokens")) for run in runs]),
        flops=_over_seeds([run.metrics.get("train_flops", run.last("compute/flops")) for run in runs]),
        seconds=_over_seeds([run.metrics.get("train_seconds") for run in runs]),
    )


def _over_seeds(values: Sequence[Any]) -> Interval:
    """Return the mean of the known values, with an interval if there are two or more; nan without any."""
    known = [float(value) for value in values if isinstance(value, int | float)]
    if known and min(known) > 0:
        return interval_over_seeds(known)
    # a loss of exactly 0 has no logarithm
    return Interval(sum(known) / len(known) if known else math.nan, math.nan, math.nan)


def _mean_by_step(by_run: Sequence[list[float]]) -> list[float]:
    return np.mean(list(zip(*by_run, strict=False)), axis=1).tolist() if all(by_run) else []


def _by_step(run: StudyRun, stem: str) -> list[float]:
    """Return `<stem>/step1`, `<stem>/step2`, … at the validation that selected the head."""
    values = (run.at_best(f"{stem}/step{step}") for step in count(1))
    return list(takewhile(lambda value: value is not None, values))  # type: ignore[arg-type]


def _forced(run: StudyRun) -> list[float]:
    """Return val/forced_accuracy by depth; for runs without it, the accuracy of step 1 at every depth."""
    accuracies = _by_step(run, "val/accuracy")
    return _by_step(run, "val/forced_accuracy") or accuracies[:1] * len(accuracies)


def rate_intervals(records: Sequence[Record]) -> list[Interval]:
    """Return a_k by depth with intervals over questions (several seeds of a question are one unit)."""
    by_question = [depth_counts(group) for group in group_by(records, lambda record: record.question).values()]
    result = []
    for pairs in zip_longest(*by_question, fillvalue=(0, 0)):
        passed, reached = zip(*pairs, strict=True)
        interval = ratio_interval(passed, reached, num_resamples=FEW_RESAMPLES)
        if not any(passed):
            interval = Interval(0.0, math.nan, math.nan)
        result.append(Interval(interval.value, interval.low, min(interval.high, 1.0)))
    return result


def _test(cells: Sequence[StudyCell], contrasts: list[Contrast], metric: str) -> tuple[str, list[Effect]]:
    """Test all contrasts as one family: over seeds if possible, otherwise over questions, otherwise not at all."""
    if not contrasts:
        return "", []
    runs = [(position, run) for position, cell in enumerate(cells) for run in cell.runs]
    logs = np.log([_value(run, metric) for _, run in runs])  # type: ignore[arg-type]
    seeds = [run.seed for _, run in runs]
    estimates = estimate_over_seeds(logs, [position for position, _ in runs], seeds, contrasts)
    if estimates is not None and len(set(seeds)) > 1:
        return "seeds", effects_of(contrasts, estimates, "seeds", len(set(seeds)))
    columns = _common_questions(cells) if metric == DECODED else None
    if columns is None:
        return "", []
    estimates = estimate_over_questions(columns, contrasts)
    assert estimates is not None  # there are at least LEAST_QUESTIONS questions
    effects = effects_of(contrasts, estimates, "questions", columns.shape[-1])
    return "questions", [_paired(each, columns) if each.contrast.kind == "cell" else each for each in effects]


def _paired(effect: Effect, columns: np.ndarray) -> Effect:
    """Compare two heads as hass-benchmark does: bootstrap-t and sign-flip permutation."""
    head, home = (effect.contrast.weights.index(weight) for weight in (1.0, -1.0))
    found = paired_log_ratio(*columns[:, head, 0], *columns[:, home, 0])
    return replace(effect, ratio=found.ratio, p_value=found.p_value, detectable=found.detectable)


def _common_questions(cells: Sequence[StudyCell]) -> np.ndarray | None:
    """Return verified tokens and forwards [2, C, 1, n] of the questions that all cells answered, at a common seed."""
    seeds = set.intersection(*({run.seed for run in cell.runs if _own(run)} for cell in cells))
    if not seeds:
        return None
    sides = [
        question_columns(_own(next(run for run in cell.runs if run.seed == min(seeds))), DECODED) for cell in cells
    ]
    common = [question for question in sides[0] if all(question in side for side in sides)]
    if len(common) < LEAST_QUESTIONS:
        return None
    table = np.array([[side[question] for question in common] for side in sides], dtype=float)  # [C, n, 2]
    return table.transpose(2, 0, 1)[:, :, None, :]
