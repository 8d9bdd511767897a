"""Contrasts of the cells of a study: main effects, interactions, cell against baseline, each a factor on τ.

A contrast is Σ_c w_c log τ_c over cells c with Σ w = 0: its exp is a ratio of (geometric means of) τ. Two errors:

- over seeds: log τ = cell + seed + noise (randomised blocks), least squares, Student's t on the pooled residuals. With
  two cells it is the paired t-test over seeds. It speaks about training methods, on these questions.
- over questions: one run a cell, the same questions in all; the linearised error of the ratios of sums, Student's t
  over questions. It speaks about these heads alone.

Shapes: C cells, m contrasts, N runs, S independent data sets, n questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hass_lightning.measure.statistics import Interval, log_ratio_errors, minimum_detectable_effect

Levels = Mapping[str, Any]  # factor to level, of one cell


@dataclass(frozen=True)
class Contrast:
    """`kind` is `main`, `interaction` or `cell`; `weights` [C] sum to 0."""

    kind: str
    name: str
    weights: tuple[float, ...]


def main_effects(cells: Sequence[Levels], factors: Mapping[str, Sequence[Any]]) -> list[Contrast]:
    """Each level of each factor against that factor's first level, averaged over the other factors' levels.

    Args:
        cells: a full crossing of `factors`, one cell a combination. factors: name to levels, the reference first.
    """
    return [
        Contrast("main", f"{factor}: {level} against {first}", _weights(cells, [(factor, level, first)]))
        for factor, (first, *others) in factors.items()
        for level in others
    ]


def interactions(cells: Sequence[Levels], factors: Mapping[str, Sequence[Any]]) -> list[Contrast]:
    """For two factors: what a level of one changes in the effect of a level of the other."""
    found = []
    for a, b in combinations(factors, 2):
        for level_a in factors[a][1:]:
            for level_b in factors[b][1:]:
                moves = [(a, level_a, factors[a][0]), (b, level_b, factors[b][0])]
                found.append(Contrast("interaction", f"{a} {level_a} × {b} {level_b}", _weights(cells, moves)))
    return found


def _weights(cells: Sequence[Levels], moves: Sequence[tuple[str, Any, Any]]) -> tuple[float, ...]:
    signs = np.array(
        [math.prod((cell[factor] == to) - (cell[factor] == start) for factor, to, start in moves) for cell in cells],
        dtype=float,
    )
    return tuple(signs / (np.abs(signs).sum() / 2 ** len(moves)))


def against(baseline: int, names: Sequence[str]) -> list[Contrast]:
    """Each cell but `baseline` against it."""
    found = []
    for cell, name in enumerate(names):
        if cell != baseline:
            weights = [0.0] * len(names)
            weights[cell], weights[baseline] = 1.0, -1.0
            found.append(Contrast("cell", f"{name} against {names[baseline]}", tuple(weights)))
    return found


@dataclass(frozen=True)
class Estimates:
    """θ and its standard error, [m, S] each, with the degrees of freedom of the error."""

    theta: NDArray
    error: NDArray
    freedom: int

    @property
    def p_values(self) -> NDArray:
        """Two-sided, [m, S]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(self.theta) / self.error
        # no spread at all: two identical runs differ in nothing, two different ones surely
        ratio = np.where(self.error > 1e-12, ratio, np.where(np.abs(self.theta) > 1e-12, np.inf, 0.0))
        return 2 * stats.t.sf(ratio, self.freedom)


def estimate_over_seeds(
    values: NDArray, cells: Sequence[int], seeds: Sequence[int], contrasts: Sequence[Contrast]
) -> Estimates | None:
    """Least squares of log τ = cell + seed; None where the runs leave no degree of freedom or do not tell cells apart.

    Args:
        values: log τ [N] or [N, S]. cells, seeds: of each run [N].
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


def estimate_over_questions(columns: NDArray, contrasts: Sequence[Contrast]) -> Estimates | None:
    """Ratios of sums over the same questions in every cell; None with fewer than two questions.

    Args:
        columns: [2, C, S, n], numerators and denominators of τ by cell and question.
    """
    if columns.shape[-1] < 2:
        return None
    theta, error = [], []
    for contrast in contrasts:
        used = [cell for cell, weight in enumerate(contrast.weights) if weight]
        signs = [contrast.weights[cell] for cell in used]
        found = log_ratio_errors(np.concatenate(columns[:, used]), [*signs, *(-sign for sign in signs)])
        theta.append(found[0])
        error.append(found[1])
    return Estimates(np.stack(theta), np.stack(error), columns.shape[-1] - 1)


@dataclass(frozen=True)
class Effect:
    """A contrast with what was found: `ratio` is the factor on the metric."""

    contrast: Contrast
    ratio: Interval
    p_value: float
    p_adjusted: float  # Holm over all tests of the family
    unit: str  # "seeds" or "questions"
    count: int  # of them
    detectable: float  # relative difference found with 80 % power at the 5 % level

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `no difference is shown`: the first two only where interval and adjusted p say so."""
        outside = self.ratio.low > 1 or self.ratio.high < 1
        if not (outside and self.p_adjusted < 0.05):
            return "no difference is shown"
        return "better" if self.ratio.value > 1 else "worse"


def effects_of(contrasts: Sequence[Contrast], estimates: Estimates, unit: str, count: int) -> list[Effect]:
    """What was found (in the first data set of `estimates`); p-values not yet adjusted."""
    quantile = float(stats.t.ppf(0.975, estimates.freedom))
    found = []
    for contrast, theta, error, p in zip(
        contrasts, estimates.theta[:, 0], estimates.error[:, 0], estimates.p_values[:, 0], strict=True
    ):
        ends = (math.exp(theta + sign * quantile * error) for sign in (0, -1, 1))
        detectable = minimum_detectable_effect(float(error))
        found.append(Effect(contrast, Interval(*ends), float(p), float(p), unit, count, detectable))
    return found


def interval_over_seeds(values: Sequence[float]) -> Interval:
    """The geometric mean of positive values with its t-interval (on the log); nan ends for fewer than two."""
    logs = np.log(np.asarray(values, float))
    mean = float(logs.mean())
    if len(logs) < 2:
        return Interval(math.exp(mean), math.nan, math.nan)
    margin = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return Interval(math.exp(mean), math.exp(mean - margin), math.exp(mean + margin))
