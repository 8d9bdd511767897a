"""Comparisons in plain language: heads on the same questions, methods over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from hass_lightning.measure.factorial import against, effects_of, estimate_over_seeds
from hass_lightning.measure.record import Record, matched, select, totals_by_question
from hass_lightning.measure.statistics import Interval, holm, paired_log_ratio, ratio_interval
from hass_lightning.runs.names import counted

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
    """Return a ratio as a clause: "the head accepts 6.1 % [3.9, 8.2] more tokens per target forward"."""
    verb, more, fewer = SENTENCES[metric]
    value, low, high = astuple(ratio.percent)
    if value < 0:
        value, low, high, more = -value, -high, -low, fewer
    return f"{name} {verb} {value:.1f} % [{low:.1f}, {high:.1f}] {more}"


@dataclass(frozen=True)
class Comparison:
    """Head A compared with head B on the questions that both answered."""

    name_a: str
    name_b: str
    metric: str
    ratio: Interval  # A divided by B
    p_value: float
    num_questions: int
    detectable: float
    p_adjusted: float  # adjusted by Holm's method over the benchmarks compared together; the p-value itself for one

    @property
    def significant(self) -> bool:
        """Whether a difference is shown at the 5 % level, by the p-value and not the interval."""
        return self.p_adjusted < 0.05

    @property
    def verdict(self) -> str:
        """Return the result as one or two sentences."""
        found = f"{percent(self.ratio, self.metric, self.name_a)} than {self.name_b}"
        adjusted = "" if self.p_adjusted == self.p_value else ", adjusted for several benchmarks"
        resolves = f"{counted(self.num_questions, 'question')} can resolve {100 * self.detectable:.1f} %"
        basis = f"(p = {self.p_adjusted:.2g}{adjusted}; {resolves})"
        if math.isnan(self.ratio.low):
            return f"no verdict: {found} on {counted(self.num_questions, 'question')}, too few for an interval."
        heads = "This is about these two heads; a verdict on methods needs several seeds."
        if self.significant:
            return f"{found} {basis}. {heads}"
        return f"no difference is shown: {found} {basis}. {heads}"


def question_columns(records: Iterable[Record], metric: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Return numerator and denominator of `metric` by question.

    Raises:
        ValueError: if the metric is unknown.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric} must be one of {', '.join(METRICS)}.")
    up, down = METRICS[metric]
    return {key: (getattr(sums, up), getattr(sums, down)) for key, sums in totals_by_question(records).items()}


def metric_interval(records: Iterable[Record], metric: str = "acceptance_length", seed: int = 0) -> Interval:
    """Return τ or tokens per second of one head with its interval."""
    columns = list(question_columns(records, metric).values())
    return ratio_interval([up for up, _ in columns], [down for _, down in columns], seed)


def speedup_interval(
    records: Iterable[Record], baseline: Iterable[Record], prefill: bool = True, seed: int = 0
) -> Interval:
    """Return the speedup over the baseline's answers to the same questions with its interval (nan without any)."""
    ours, theirs = matched(records, baseline)
    if not ours:
        return Interval(math.nan, math.nan, math.nan)
    metric = "speed" if prefill else "decode_speed"
    # both sides have the same questions in the same order
    (tokens, seconds), (base_tokens, base_seconds) = (
        np.array(list(question_columns(side, metric).values())).T for side in (ours, theirs)
    )
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
    """Compare head A with head B on the questions and turns that both answered under the same sampling.

    Raises:
        ValueError: no question in common, or an unknown metric.
    """
    ours, theirs = matched(records_a, records_b)
    if not ours:
        raise ValueError(f"{name_a} and {name_b} answered no question in common: nothing can be compared.")
    a, b = question_columns(ours, metric), question_columns(theirs, metric)
    rows = np.array([(*a[key], *b[key]) for key in a], dtype=float).T  # [4, n]
    found = paired_log_ratio(*rows, seed=seed)
    return Comparison(name_a, name_b, metric, **vars(found), p_adjusted=found.p_value)


def compare_benchmarks(
    records_a: Sequence[Record], records_b: Sequence[Record], **options: Any
) -> dict[str, Comparison]:
    """Return one comparison per benchmark, with p-values adjusted by Holm's method over the benchmarks.

    Args:
        records_a, records_b: records of the two heads.
        options: arguments of `compare`.
    """
    names = sorted({record.benchmark for record in records_a} & {record.benchmark for record in records_b})
    sides = [[select(records, benchmark=name) for records in (records_a, records_b)] for name in names]
    found = [compare(*pair, **options) for pair in sides]
    adjusted = holm([comparison.p_value for comparison in found])
    return {n: replace(each, p_adjusted=p) for n, each, p in zip(names, found, adjusted, strict=True)}


@dataclass(frozen=True)
class MethodComparison:
    """Method A compared with method B, each trained with several seeds."""

    name_a: str
    name_b: str
    metric: str
    num_seeds: int
    ratio: Interval | None = None  # None with fewer than two common seeds
    p_value: float | None = None
    detectable: float | None = None

    @property
    def significant(self) -> bool:
        """Whether a difference is shown at the 5 % level."""
        return self.p_value is not None and self.p_value < 0.05

    @property
    def verdict(self) -> str:
        """Return the result as one sentence."""
        if self.ratio is None or self.p_value is None or self.detectable is None:
            return (
                f"no verdict on {self.name_a} against {self.name_b}: they share {counted(self.num_seeds, 'seed')}, and "
                "a method needs at least 2 (3 or more to find anything)."
            )
        found = f"{percent(self.ratio, self.metric, self.name_a)} than {self.name_b}"
        resolves = f"{counted(self.num_seeds, 'seed')} can resolve {100 * self.detectable:.1f} %"
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
    """Compare two methods by a paired t-test on log values, seed by seed.

    Args:
        values_a, values_b: seed to τ (or tokens per second) of the head trained with it. Seeds of one side are ignored.
        metric: the metric.
        name_a, name_b: names of the methods in the sentence.

    Raises:
        ValueError: if a value is not positive.
    """
    seeds = sorted(set(values_a) & set(values_b))
    if any(values[seed] <= 0 for values in (values_a, values_b) for seed in seeds):
        raise ValueError("methods are compared on positive values (τ, tokens per second).")
    logs = np.log([values[seed] for values in (values_a, values_b) for seed in seeds])
    contrasts = against(1, [name_a, name_b])
    cells = np.repeat([0, 1], len(seeds)).tolist()
    estimates = estimate_over_seeds(logs, cells, [*seeds, *seeds], contrasts) if len(seeds) > 1 else None
    if estimates is None:
        return MethodComparison(name_a, name_b, metric, len(seeds))
    (found,) = effects_of(contrasts, estimates, "seeds", len(seeds))
    return MethodComparison(name_a, name_b, metric, len(seeds), found.ratio, found.p_value, found.detectable)


def verdicts(records: list[Record], drafts: list[str]) -> list[str]:
    """Compare each head with the first one, decoder by decoder, in plain language."""
    sentences = []
    decoders = dict.fromkeys(record.decoder for record in records if record.draft)
    for decoder, temperature in product(decoders, dict.fromkeys(record.temperature for record in records)):
        home, *others = (select(records, draft=name, decoder=decoder, temperature=temperature) for name in drafts)
        for label, side in zip(drafts[1:], others, strict=True):
            if side and home:
                for benchmark, comparison in compare_benchmarks(side, home).items():
                    where = f"{label} against {drafts[0]} ({benchmark}, {decoder}, T={temperature:g})"
                    sentences.append(f"{where}: {comparison.verdict}")
    return sentences
