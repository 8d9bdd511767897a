"""Verdicts in plain language: head against head on the same questions, method against method over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from hass_lightning.measure.statistics import (
    Interval,
    holm,
    minimum_detectable_effect,
    paired_log_ratio,
    ratio_interval,
)
from hass_lightning.measure.trace import Record, matched, totals_by_question

METRICS = {
    "acceptance_length": ("verified_tokens", "forwards"),  # tokens per target forward
    "speed": ("num_tokens", "seconds"),  # tokens per second, prefill included
    "decode_speed": ("decoded_tokens", "decode_seconds"),  # … without the prefill
}
SENTENCES = {
    "acceptance_length": ("accepts", "more tokens per target forward", "fewer tokens per target forward"),
    "speed": ("writes", "more tokens per second", "fewer tokens per second"),
    "decode_speed": ("writes", "more tokens per second after the prefill", "fewer tokens per second after the prefill"),
}


def percent(ratio: Interval, metric: str, name: str) -> str:
    """ "the head accepts 6.1 % [3.9, 8.2] more tokens per target forward": a ratio as a clause."""
    verb, more, fewer = SENTENCES[metric]
    value, low, high = (100 * (end - 1) for end in (ratio.value, ratio.low, ratio.high))
    if value < 0:
        value, low, high, more = -value, -high, -low, fewer
    return f"{name} {verb} {value:.1f} % [{low:.1f}, {high:.1f}] {more}"


@dataclass(frozen=True)
class Comparison:
    """Head A against head B on the questions both answered."""

    name_a: str
    name_b: str
    metric: str
    ratio: Interval  # A over B
    p_value: float
    num_questions: int
    detectable: float
    p_adjusted: float  # Holm over the benchmarks compared together; the p-value itself for one

    @property
    def significant(self) -> bool:
        """Whether a difference is shown at the 5 % level. The p-value decides, not the interval."""
        return self.p_adjusted < 0.05

    @property
    def verdict(self) -> str:
        """One or two sentences for a person."""
        found = f"{percent(self.ratio, self.metric, self.name_a)} than {self.name_b}"
        adjusted = "" if self.p_adjusted == self.p_value else ", adjusted for several benchmarks"
        resolves = f"{self.num_questions} questions can resolve {100 * self.detectable:.1f} %"
        basis = f"(p = {self.p_adjusted:.2g}{adjusted}; {resolves})"
        if math.isnan(self.ratio.low):
            return f"no verdict: {found} on {self.num_questions} question, too few for an interval."
        heads = "This is about these two heads; a verdict on methods needs several seeds."
        if self.significant:
            return f"{found} {basis}. {heads}"
        return f"no difference is shown: {found} {basis}. {heads}"


def question_columns(records: Iterable[Record], metric: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Numerator and denominator of `metric` per question.

    Raises:
        ValueError: an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric} is none of {', '.join(METRICS)}.")
    up, down = METRICS[metric]
    return {key: (getattr(sums, up), getattr(sums, down)) for key, sums in totals_by_question(records).items()}


def metric_interval(records: Iterable[Record], metric: str = "acceptance_length", seed: int = 0) -> Interval:
    """τ or tokens per second of one head with its interval."""
    columns = list(question_columns(records, metric).values())
    return ratio_interval([up for up, _ in columns], [down for _, down in columns], seed)


def speedup_interval(
    records: Iterable[Record], baseline: Iterable[Record], prefill: bool = True, seed: int = 0
) -> Interval:
    """Speedup over the baseline's answers to the same questions, with its interval (nan: none in common)."""
    ours, theirs = matched(records, baseline)
    if not ours:
        return Interval(math.nan, math.nan, math.nan)
    metric = "speed" if prefill else "decode_speed"
    mine, base = question_columns(ours, metric), question_columns(theirs, metric)
    pairs = [(mine[key], base[key]) for key in mine]
    tokens, seconds = [m[0] for m, _ in pairs], [m[1] for m, _ in pairs]
    base_tokens, base_seconds = [b[0] for _, b in pairs], [b[1] for _, b in pairs]
    return ratio_interval([base_seconds, tokens], [base_tokens, seconds], seed)


def compare(
    records_a: Sequence[Record],
    records_b: Sequence[Record],
    *,
    metric: str = "acceptance_length",
    name_a: str = "this head",
    name_b: str = "the other",
    seed: int = 0,
) -> Comparison:
    """Head A against head B on the questions and turns both answered under the same sampling.

    Raises:
        ValueError: no question in common, or an unknown metric.
    """
    ours, theirs = matched(records_a, records_b)
    if not ours:
        raise ValueError(f"{name_a} and {name_b} answered no question in common: nothing can be compared.")
    a, b = question_columns(ours, metric), question_columns(theirs, metric)
    rows = np.array([(*a[key], *b[key]) for key in a], dtype=float).T  # [4, n]
    found = paired_log_ratio(*rows, seed=seed)
    return Comparison(
        name_a, name_b, metric, found.ratio, found.p_value, found.num_questions, found.detectable, found.p_value
    )


def compare_benchmarks(
    records_a: Sequence[Record],
    records_b: Sequence[Record],
    *,
    metric: str = "acceptance_length",
    name_a: str = "this head",
    name_b: str = "the other",
    seed: int = 0,
) -> dict[str, Comparison]:
    """One comparison a benchmark, p-values adjusted by Holm over the benchmarks."""
    names = sorted({record.benchmark for record in records_a} & {record.benchmark for record in records_b})

    def of(records: Sequence[Record], name: str) -> list[Record]:
        return [record for record in records if record.benchmark == name]

    found = {
        name: compare(of(records_a, name), of(records_b, name), metric=metric, name_a=name_a, name_b=name_b, seed=seed)
        for name in names
    }
    adjusted = holm([comparison.p_value for comparison in found.values()])
    return {name: replace(each, p_adjusted=p) for (name, each), p in zip(found.items(), adjusted, strict=True)}


@dataclass(frozen=True)
class MethodComparison:
    """Method A against method B, each trained with several seeds."""

    name_a: str
    name_b: str
    metric: str
    num_seeds: int
    ratio: Interval | None  # None: fewer than two seeds in common
    p_value: float | None
    detectable: float | None

    @property
    def significant(self) -> bool:
        """Whether a difference is shown at the 5 % level."""
        return self.p_value is not None and self.p_value < 0.05

    @property
    def verdict(self) -> str:
        """One sentence for a person."""
        if self.ratio is None or self.p_value is None or self.detectable is None:
            return (
                f"no verdict on {self.name_a} against {self.name_b}: they share {self.num_seeds} seed(s), and a method "
                "needs at least 2 (3 or more to find anything)."
            )
        found = f"{percent(self.ratio, self.metric, self.name_a)} than {self.name_b}"
        resolves = f"{self.num_seeds} seeds can resolve {100 * self.detectable:.1f} %"
        shown = "" if self.significant else "no difference is shown: "
        return f"{shown}{found} (p = {self.p_value:.2g}, paired by seed; {resolves})."


def compare_methods(
    values_a: Mapping[int, float],
    values_b: Mapping[int, float],
    *,
    metric: str = "acceptance_length",
    name_a: str = "method A",
    name_b: str = "method B",
) -> MethodComparison:
    """A verdict on a method: paired t-test on log values, seed by seed.

    Args:
        values_a, values_b: seed to τ (or tokens per second) of the head that this seed gave. Other seeds are left out.

    Raises:
        ValueError: a value that is not positive.
    """
    seeds = sorted(set(values_a) & set(values_b))
    if any(values[seed] <= 0 for values in (values_a, values_b) for seed in seeds):
        raise ValueError("a method is compared on positive values (τ, tokens per second).")
    n = len(seeds)
    if n < 2:
        return MethodComparison(name_a, name_b, metric, n, None, None, None)
    differences = np.log([values_a[seed] / values_b[seed] for seed in seeds])
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(n))
    margin = float(stats.t.ppf(0.975, n - 1)) * error
    ratio = Interval(math.exp(mean), math.exp(mean - margin), math.exp(mean + margin))
    if error > 0:
        p_value = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    else:
        p_value = 1.0 if mean == 0 else 0.0
    return MethodComparison(name_a, name_b, metric, n, ratio, p_value, minimum_detectable_effect(error))
