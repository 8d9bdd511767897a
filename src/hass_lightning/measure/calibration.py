"""Calibration of a draft's confidence: reliability curve, expected calibration error, AUROC.

The confidence of a draft token is the head's probability of it. It is calibrated if tokens drafted with confidence c
are accepted with frequency c; EAGLE-2's trees rank nodes by products of confidences.
Shapes: n draft tokens, K bins.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hass_lightning.measure.statistics import LEVEL, Interval, ratio_interval

NUM_BINS = 10
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Bin:
    """Draft tokens with a confidence in one range."""

    low: float
    high: float
    num_tokens: int
    confidence: float  # mean
    accuracy: Interval  # fraction accepted, interval over questions


def _bin_of(confidence: NDArray[Any], num_bins: int) -> NDArray[Any]:
    """Return the bin of each confidence [n]: bin k is [k/K, (k+1)/K), the last one includes 1."""
    bins: NDArray[Any] = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    return bins


def reliability(
    confidence: ArrayLike, correct: ArrayLike, questions: Sequence[Hashable], num_bins: int = NUM_BINS
) -> list[Bin]:
    """Return the bins that contain tokens, of equal width.

    Args:
        confidence: [n], in [0, 1].
        correct: [n] bool.
        questions: n questions, the unit of resampling.
        num_bins: K.
    """
    values, hits = np.asarray(confidence, float), np.asarray(correct, bool)
    places = _bin_of(values, num_bins)
    _, unit = np.unique([str(each) for each in questions], return_inverse=True)
    bins = []
    for place in np.unique(places):
        kept = places == place
        _, units = np.unique(unit[kept], return_inverse=True)  # the questions with tokens in this bin
        counts, accepted = np.bincount(units), np.bincount(units, weights=hits[kept])
        interval = ratio_interval(accepted, counts)
        value = float(hits[kept].mean())
        low, high = (float(np.clip(end, 0, 1)) for end in (interval.low, interval.high))  # nan if none was accepted
        ends = (place / num_bins, (place + 1) / num_bins)
        bins.append(Bin(*ends, int(kept.sum()), float(values[kept].mean()), Interval(value, low, high)))
    return bins


def calibration_error(confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS) -> float:
    """Return the expected calibration error: Σ_k n_k/n |mean accuracy - mean confidence| over bins of equal width.

    nan without tokens. The error is biased upwards if bins have few tokens (Guo et al., arXiv 1706.04599).
    """
    values, hits = np.asarray(confidence, float), np.asarray(correct, float)
    if not len(values):
        return float("nan")
    gaps = np.bincount(_bin_of(values, num_bins), weights=hits - values, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(values))


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return the area under the ROC curve: P(an accepted token has the higher confidence), ties count half.

    It is the Mann-Whitney statistic U / (n₁ n₀); nan if all tokens were accepted, or none.
    """
    values, hits = np.asarray(confidence, float), np.asarray(correct, bool)
    accepted, rejected = values[hits], values[~hits]
    if not len(accepted) or not len(rejected):
        return float("nan")
    return float(stats.mannwhitneyu(accepted, rejected).statistic / (len(accepted) * len(rejected)))


def auroc_interval(
    confidence: ArrayLike,
    correct: ArrayLike,
    questions: Sequence[Hashable],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the AUROC with its 95 % percentile interval, questions resampled. Arguments as in `reliability`."""
    values, hits = np.asarray(confidence, float), np.asarray(correct, bool)
    _, unit = np.unique([str(each) for each in questions], return_inverse=True)
    members = [np.flatnonzero(unit == number) for number in range(unit.max() + 1)] if len(unit) else []
    if len(members) < 2:
        return Interval(auroc(values, hits), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num_resamples):
        rows = np.concatenate([members[number] for number in rng.integers(0, len(members), len(members))])
        ranks, accepted = stats.rankdata(values[rows]), hits[rows]
        num_accepted, num_rejected = int(accepted.sum()), int((~accepted).sum())
        if num_accepted and num_rejected:
            u = ranks[accepted].sum() - num_accepted * (num_accepted + 1) / 2
            found.append(u / (num_accepted * num_rejected))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(found, [tail, 100 - tail]) if found else (float("nan"), float("nan"))
    return Interval(auroc(values, hits), float(low), float(high))
