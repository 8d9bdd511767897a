"""Contrasts of the cells of a study: main effects, interactions, cell against baseline, each as a factor on τ.

A contrast is Σ_c w_c log τ_c over cells c with Σ w = 0; its exp is a ratio of (geometric means of) τ. There are two
kinds of error:

- over seeds: log τ = cell + seed + noise (randomized blocks), least squares, Student's t on the pooled residuals. With
  two cells this is the paired t-test over seeds. It generalizes over training runs, on these questions.
- over questions: one run per cell, the same questions in all; linearized error of the ratios of sums, Student's t over
  questions. It holds for these heads only.

Shapes: C cells, m contrasts, N runs, S independent data sets, n questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hass_lightning.measure.statistics import Interval, log_ratio_errors, minimum_detectable_effect

NOTHING_SHOWN = "no difference is shown"
Levels = Mapping[str, Any]  # factor to level, for one cell


@dataclass(frozen=True)
class Contrast:
    """A contrast. `kind` is `main`, `interaction` or `cell`; `weights` [C] sum to 0."""

    kind: str
    name: str
    weights: tuple[float, ...]


def main_effects(cells: Sequence[Levels], factors: Mapping[str, Sequence[Any]]) -> list[Contrast]:
    """Return the contrasts of each factor's levels with its first level, averaged over the levels of the other factors.

    Args:
        cells: a full crossing of `factors`, one cell per combination, or a fraction of it (`strength`).
        factors: levels by factor name, the reference level first.
    """
    return [
        Contrast("main", f"{factor}: {level} against {first}", _weights(cells, [(factor, level, first)]))
        for factor, (first, *others) in factors.items()
        for level in others
    ]


def interactions(cells: Sequence[Levels], factors: Mapping[str, Sequence[Any]]) -> list[Contrast]:
    """Return, for each pair of factors, how a level of one changes the effect of a level of the other."""
    found = []
    for a, b in combinations(factors, 2):
        for level_a in factors[a][1:]:
            for level_b in factors[b][1:]:
                moves = [(a, level_a, factors[a][0]), (b, level_b, factors[b][0])]
                found.append(Contrast("interaction", f"{a} {level_a} × {b} {level_b}", _weights(cells, moves)))
    return found


def strength(cells: Sequence[Levels], factors: Mapping[str, Sequence[Any]]) -> int:
    """Return the largest t such that the levels of any t factors are crossed, each combination equally often.

    A full crossing of n factors has strength n. A fraction of strength t (an orthogonal array, of resolution t + 1)
    estimates main effects that interactions of fewer than t factors do not change. From 4, interactions of two factors
    do not change each other either.

    Args:
        cells: the levels of each cell, all different.
        factors: levels by factor name.
    """
    for size in range(1, len(factors) + 1):
        for names in combinations(factors, size):
            counts = Counter(tuple(repr(cell[name]) for name in names) for cell in cells)
            if len(counts) < math.prod(len(factors[name]) for name in names) or len(set(counts.values())) > 1:
                return size - 1
    return len(factors)


def _weights(cells: Sequence[Levels], moves: Sequence[tuple[str, Any, Any]]) -> tuple[float, ...]:
    signs = np.array(
        [math.prod((cell[factor] == to) - (cell[factor] == start) for factor, to, start in moves) for cell in cells],
        dtype=float,
    )
    return tuple(signs / (np.abs(signs).sum() / 2 ** len(moves)))


def against(baseline: int, names: Sequence[str]) -> list[Contrast]:
    """Return the contrasts of each other cell with `baseline`."""
    weights = np.eye(len(names)) - np.eye(len(names))[baseline]
    return [
        Contrast("cell", f"{name} against {names[baseline]}", tuple(weights[cell].tolist()))
        for cell, name in enumerate(names)
        if cell != baseline
    ]


@dataclass(frozen=True)
class Estimates:
    """Estimates θ and their standard errors, [m, S] each, with the degrees of freedom of the error."""

    theta: NDArray[Any]
    error: NDArray[Any]
    freedom: int

    @property
    def p_values(self) -> NDArray[Any]:
        """Return two-sided p-values, [m, S]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(self.theta) / self.error
        # without any spread, two identical runs do not differ, and two different ones certainly do
        ratio = np.where(self.error > 1e-12, ratio, np.where(np.abs(self.theta) > 1e-12, np.inf, 0.0))
        return 2 * stats.t.sf(ratio, self.freedom)


def estimate_over_seeds(
    values: NDArray[Any], cells: Sequence[int], seeds: Sequence[int], contrasts: Sequence[Contrast]
) -> Estimates | None:
    """Fit log τ = cell + seed by least squares.

    Returns None without a degree of freedom, or if the runs do not separate the cells.

    Args:
        values: log τ [N] or [N, S].
        cells, seeds: cell and seed of each run [N].
        contrasts: the contrasts to estimate.
    """
    y = np.asarray(values, float).reshape(len(values), -1)  # [N, S]
    num_cells = len(contrasts[0].weights)
    seed_ids = sorted(set(seeds))
    design = np.zeros((len(y), num_cells + len(seed_ids)))
    for row, (cell, seed) in enumerate(zip(cells, seeds, strict=True)):
        design[row, cell] = design[row, num_cells + seed_ids.index(seed)] = 1.0
    freedom = len(y) - int(np.linalg.matrix_rank(design))
    wanted = np.zeros((len(contrasts), design.shape[1]))
    wanted[:, :num_cells] = [contrast.weights for contrast in contrasts]
    inverse = np.linalg.pinv(design)
    if freedom < 1 or not np.allclose(wanted @ inverse @ design, wanted, atol=1e-8):
        return None
    residual = y - design @ (inverse @ y)
    variance = (residual**2).sum(0) / freedom  # [S]
    scale = ((wanted @ inverse) ** 2).sum(1)  # [m]
    return Estimates(wanted @ (inverse @ y), np.sqrt(scale[:, None] * variance), freedom)


def estimate_over_questions(columns: NDArray[Any], contrasts: Sequence[Contrast]) -> Estimates | None:
    """Estimate contrasts from ratios of sums over the same questions in every cell; None with fewer than two questions.

    Args:
        columns: [2, C, S, n], numerators and denominators of τ by cell and question.
        contrasts: the contrasts to estimate.
    """
    if columns.shape[-1] < 2:
        return None
    found = []
    for contrast in contrasts:
        weights = np.array(contrast.weights)
        used = weights != 0
        found.append(log_ratio_errors(np.concatenate(columns[:, used]), [*weights[used], *-weights[used]]))
    theta, error = zip(*found, strict=True)
    return Estimates(np.stack(theta), np.stack(error), columns.shape[-1] - 1)


@dataclass(frozen=True)
class Effect:
    """A contrast with its estimate; `ratio` is the factor on the metric."""

    contrast: Contrast
    ratio: Interval
    p_value: float
    p_adjusted: float  # adjusted by Holm's method over all tests of the family
    unit: str  # "seeds" or "questions"
    count: int  # number of units
    detectable: float  # relative difference detected with 80 % power at the 5 % level

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `no difference is shown`. The first two require both interval and adjusted p-value."""
        outside = self.ratio.low > 1 or self.ratio.high < 1
        if not (outside and self.p_adjusted < 0.05):
            return NOTHING_SHOWN
        return "better" if self.ratio.value > 1 else "worse"


def effects_of(contrasts: Sequence[Contrast], estimates: Estimates, unit: str, count: int) -> list[Effect]:
    """Return the effects in the first data set of `estimates`, with p-values not yet adjusted."""
    quantile = float(stats.t.ppf(0.975, estimates.freedom))
    first = np.stack([estimates.theta[:, 0], estimates.error[:, 0], estimates.p_values[:, 0]], axis=1).tolist()
    found = []
    for contrast, (theta, error, p) in zip(contrasts, first, strict=True):
        ends = (math.exp(theta + sign * quantile * error) for sign in (0, -1, 1))
        found.append(Effect(contrast, Interval(*ends), p, p, unit, count, minimum_detectable_effect(error)))
    return found


def interval_over_seeds(values: Sequence[float]) -> Interval:
    """Return the geometric mean of positive values with its t-interval on the log scale; nan ends for one value."""
    logs = np.log(np.asarray(values, float))
    mean = float(logs.mean())
    if len(logs) < 2:
        return Interval(math.exp(mean), math.nan, math.nan)
    margin = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return Interval(math.exp(mean), math.exp(mean - margin), math.exp(mean + margin))
