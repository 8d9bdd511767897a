"""What a study found: a row a cell, cells against the baseline, main effects, interactions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from hass_lightning.measure.statistics import LEAST_QUESTIONS, Interval, holm, paired_log_ratio, ratio_interval
from hass_lightning.measure.trace import BASELINE, Record
from hass_lightning.measure.verdicts import metric_interval, question_columns, speedup_interval
from hass_lightning.report.study.cells import Grid, StudyCell, find_baseline, find_grid, make_cells, without_repeats
from hass_lightning.report.study.runs import StudyRun

DECODED, SIMULATED = "acceptance_length", "simulated_acceptance_length"
FEW_RESAMPLES = 2000  # for accept rates, of which there are many


@dataclass
class Row:
    """A cell's numbers, each with its interval where it has one."""

    label: str
    num_seeds: int
    tau: Interval
    speedup: Interval
    rates: list[Interval]  # a_1, a_2, …: accepted at depth k, of those that got there
    forced: list[float]  # right at depth k on the target's true features, of the simulated chains that got there
    accuracies: list[float]  # right at alignment step k, on the head's own features from the second on
    loss: Interval
    tokens: Interval
    flops: Interval
    seconds: Interval


@dataclass
class Study:
    """Everything a report shows."""

    cells: list[StudyCell]
    baseline: int
    metric: str
    decoder: str
    unit: str  # what the tests are about: seeds, questions, or "" where nothing can be tested
    rows: list[Row]
    comparisons: list[Effect]
    grid: Grid | None = None
    effects: list[Effect] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # run, why


def analyse(runs: Sequence[StudyRun], baseline: str | None = None, decoder: str | None = None) -> Study:
    """Group the runs, take the intervals, test.

    Args:
        baseline: see `find_baseline`. decoder: whose records count, where several were measured.

    Raises:
        ValueError: nothing to compare, an unknown decoder or baseline.
    """
    finished = [run for run in runs if run.status == "completed" and (run.metrics or run.records)]
    left_out = [(run.name, run.error or run.status) for run in runs if run not in finished]
    if not finished:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out)
        raise ValueError(f"none of the {len(runs)} runs is finished ({reasons}): there is nothing to report.")
    finished, repeats = without_repeats(finished)
    left_out += repeats
    chosen = _choose_decoder(finished, decoder)
    for run in finished:
        run.records = _one_sampling([record for record in run.records if record.decoder in (BASELINE, chosen)])
    metric = DECODED if all(_value(run, DECODED) for run in finished) else SIMULATED
    unmeasured = [run for run in finished if _value(run, metric) is None]
    left_out += [(run.name, "no acceptance length was measured: hass-benchmark draft=<run>") for run in unmeasured]
    cells = make_cells([run for run in finished if run not in unmeasured])
    if not cells:
        raise ValueError("no run has an acceptance length, decoded or simulated: measure them with hass-benchmark.")
    home = find_baseline(cells, baseline)
    rows = [_row(cell, metric) for cell in cells]
    unit, comparisons = _test(cells, against(home, [cell.label for cell in cells]), metric)
    study = Study(cells, home, metric, chosen, unit, rows, comparisons, left_out=left_out)
    study.grid = find_grid(cells, home)
    if study.grid:
        crossed = [cells[position] for position in study.grid.cells]
        levels = [cell.levels for cell in crossed]
        family = [*main_effects(levels, study.grid.levels), *interactions(levels, study.grid.levels)]
        _, study.effects = _test(crossed, family, metric)
    _adjust(study)
    return study


def _adjust(study: Study) -> None:
    """All tests of a report are one family: without any difference, one in twenty reports claims one."""
    adjusted = holm([effect.p_value for effect in (*study.comparisons, *study.effects)])
    count = len(study.comparisons)
    for effects, values in ((study.comparisons, adjusted[:count]), (study.effects, adjusted[count:])):
        effects[:] = [replace(effect, p_adjusted=value) for effect, value in zip(effects, values, strict=True)]


def _choose_decoder(runs: Sequence[StudyRun], wanted: str | None) -> str:
    known = list(dict.fromkeys(r.decoder for run in runs for r in run.records if r.decoder != BASELINE))
    if wanted and wanted not in known:
        raise ValueError(f"decoder={wanted} is not in the records; there are: {', '.join(known) or 'none'}.")
    return wanted or next((name for name in known if "tree" in name), known[0] if known else "")


def _one_sampling(records: list[Record]) -> list[Record]:
    """The records of the lowest temperature (and of its first top-p and top-k)."""
    lowest = min((record.temperature for record in records), default=0.0)
    sampling = next((record.sampling for record in records if record.temperature == lowest), None)
    return [record for record in records if record.sampling == sampling]


def _own(run: StudyRun) -> list[Record]:
    return [record for record in run.records if record.decoder != BASELINE]


def _value(run: StudyRun, metric: str) -> float | None:
    """τ of one run: from its records, else as it was noted when the run ended."""
    if metric == DECODED and _own(run):
        sums = np.array(list(question_columns(_own(run), DECODED).values())).sum(0)
        return float(sums[0] / sums[1]) if sums[1] else None
    value = run.metrics.get(metric)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _row(cell: StudyCell, metric: str) -> Row:
    runs = cell.runs
    records = [_own(run) for run in runs]
    values = [value for run in runs if (value := _value(run, metric))]
    tau = interval_over_seeds(values)
    speeds = [
        speedup_interval(own, [record for record in run.records if record.decoder == BASELINE])
        for run, own in zip(runs, records, strict=True)
    ]
    known = [speed.value for speed in speeds if speed.value > 0]
    if len(runs) == 1 and records[0]:
        tau = metric_interval(records[0], DECODED) if metric == DECODED else tau
    speedup = speeds[0] if len(runs) == 1 else interval_over_seeds(known) if known else _nothing()
    return Row(
        cell.label,
        len({run.seed for run in runs}),
        tau,
        speedup,
        rate_intervals([record for own in records for record in own]),
        _mean_by_step([_forced(run) for run in runs]),
        _mean_by_step([_by_step(run, "val/accuracy") for run in runs]),
        _over_seeds([run.at_best("val/loss") for run in runs]),
        _over_seeds([run.metrics.get("train_tokens", run.last("compute/tokens")) for run in runs]),
        _over_seeds([run.metrics.get("train_flops", run.last("compute/flops")) for run in runs]),
        _over_seeds([run.metrics.get("train_seconds") for run in runs]),
    )


def _nothing() -> Interval:
    return Interval(math.nan, math.nan, math.nan)


def _over_seeds(values: Sequence[Any]) -> Interval:
    """The mean of what is known, with its interval where that is of two or more runs; nan where nothing is."""
    known = [float(value) for value in values if isinstance(value, int | float)]
    if not known or min(known) <= 0:  # a loss of exactly 0 has no logarithm
        return Interval(sum(known) / len(known), math.nan, math.nan) if known else _nothing()
    return interval_over_seeds(known)


def _mean_by_step(by_run: Sequence[list[float]]) -> list[float]:
    depth = min(map(len, by_run))
    return np.mean([values[:depth] for values in by_run], axis=0).tolist()


def _by_step(run: StudyRun, stem: str) -> list[float]:
    """`<stem>/step1`, `<stem>/step2`, … of the validation that chose the head."""
    found: list[float] = []
    while (value := run.at_best(f"{stem}/step{len(found) + 1}")) is not None:
        found.append(value)
    return found


def _forced(run: StudyRun) -> list[float]:
    """val/forced_accuracy by depth; of runs that did not log it, the accuracy of step 1 at every depth."""
    accuracies = _by_step(run, "val/accuracy")
    return _by_step(run, "val/forced_accuracy") or accuracies[:1] * len(accuracies)


def rate_intervals(records: Sequence[Record]) -> list[Interval]:
    """a_k by depth with intervals over questions (several seeds of a question are one unit)."""
    counts: dict[tuple[str, str], dict[int, list[int]]] = {}
    for record in records:
        by_depth = counts.setdefault(record.question, {})
        for accepted, drafted in zip(record.accepted, record.drafted, strict=True):
            for depth in range(1, min(accepted + 1, drafted) + 1):
                cell = by_depth.setdefault(depth, [0, 0])
                cell[0] += accepted >= depth
                cell[1] += 1
    deepest = max((max(by_depth, default=0) for by_depth in counts.values()), default=0)
    result = []
    for depth in range(1, deepest + 1):
        pairs = [by_depth.get(depth, [0, 0]) for by_depth in counts.values()]
        passed, reached = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        interval = ratio_interval(passed, reached, num_resamples=FEW_RESAMPLES)
        if not sum(passed):
            interval = Interval(0.0, math.nan, math.nan)
        result.append(Interval(interval.value, interval.low, min(interval.high, 1.0)))
    return result


def _test(cells: Sequence[StudyCell], contrasts: list[Contrast], metric: str) -> tuple[str, list[Effect]]:
    """All contrasts as one family: over seeds where the runs allow it, else over questions, else not at all."""
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
    if estimates is None:
        return "", []
    effects = effects_of(contrasts, estimates, "questions", columns.shape[-1])
    return "questions", [_paired(each, columns) if each.contrast.kind == "cell" else each for each in effects]


def _paired(effect: Effect, columns: np.ndarray) -> Effect:
    """Head against head as hass-benchmark compares them: bootstrap-t and sign-flip permutation."""
    head, home = (effect.contrast.weights.index(weight) for weight in (1.0, -1.0))
    found = paired_log_ratio(*columns[:, head, 0], *columns[:, home, 0])
    return replace(
        effect, ratio=found.ratio, p_value=found.p_value, p_adjusted=found.p_value, detectable=found.detectable
    )


def _common_questions(cells: Sequence[StudyCell]) -> np.ndarray | None:
    """[2, C, 1, n]: verified tokens and forwards of the questions that all cells answered, at a seed that all have."""
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
