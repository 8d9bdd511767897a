"""Contrasts against slow implementations and known tests; simulated effects are found, and none if there are none."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from hass_lightning.measure.factorial import (
    against,
    effects_of,
    estimate_over_questions,
    estimate_over_seeds,
    interactions,
    interval_over_seeds,
    main_effects,
    strength,
)

FACTORS = {"loss": ["eagle", "hass"], "depth": [1, 3]}
CELLS = [{"loss": loss, "depth": depth} for loss in FACTORS["loss"] for depth in FACTORS["depth"]]
FAMILY = [*main_effects(CELLS, FACTORS), *interactions(CELLS, FACTORS)]
REPEATS = 4000


def names_found(estimates, unit="seeds", count=3):
    """Return the effects that a report would claim, after Holm's method over the family."""
    from hass_lightning.measure.statistics import holm

    effects = effects_of(FAMILY, estimates, unit, count)
    adjusted = holm([effect.p_value for effect in effects])
    return {effect.contrast.name for effect, p in zip(effects, adjusted, strict=True) if p < 0.05}


def family_error(estimates):
    """Return the fraction of data sets in which Holm's method claims anything, which its first step decides."""
    return (estimates.p_values.min(0) * len(FAMILY) < 0.05).mean()


def seed_runs(rng, effects=(0.0, 0.0, 0.0), num_seeds=3, repeats=1):
    """Return log τ [N, S] of the four cells with effects of loss, of depth, and of both; seeds shift all cells."""
    noise = rng.normal(0, 0.01, (4, num_seeds, repeats)) + rng.normal(0, 0.03, (num_seeds, repeats))
    planted = [effects[0] * (c["loss"] == "hass") + effects[1] * (c["depth"] == 3) for c in CELLS]
    planted[3] += effects[2]
    values = np.log(2.4) + np.array(planted)[:, None, None] + noise
    return values.reshape(-1, repeats), np.repeat(range(4), num_seeds), np.tile(range(num_seeds), 4)


def question_columns(rng, factors=(1.0, 1.0, 1.0, 1.0), num_questions=80, repeats=1):
    """Return [2, 4, S, n]: questions differ in length and difficulty, cells in their factor on it."""
    forwards = rng.integers(8, 60, (1, repeats, num_questions)) * np.ones((4, 1, 1))
    ease = rng.gamma(20, 1.4 / 20, (1, repeats, num_questions))
    own = rng.normal(1, 0.08, (4, repeats, num_questions))
    tokens = forwards * (1 + ease * own * np.array(factors)[:, None, None])
    return np.stack([tokens, forwards])


def test_contrasts_are_differences_of_means_and_differences_of_differences():
    y = np.array([1.0, 2.0, 4.0, 9.0])  # (eagle 1, eagle 3, hass 1, hass 3)
    by_name = {contrast.name: float(np.dot(contrast.weights, y)) for contrast in FAMILY}
    assert by_name == {
        "loss: hass against eagle": (4 + 9) / 2 - (1 + 2) / 2,
        "depth: 3 against 1": (2 + 9) / 2 - (1 + 4) / 2,
        "loss hass × depth 3": (9 - 4) - (2 - 1),
    }
    wide = {"k": [1, 5, 10], "w": [0.1, 1.0], "depth": [1, 3]}
    cells = [{"k": k, "w": w, "depth": d} for k in wide["k"] for w in wide["w"] for d in wide["depth"]]
    effects = main_effects(cells, wide)
    assert [e.name for e in effects] == [
        "k: 5 against 1",
        "k: 10 against 1",
        "w: 1.0 against 0.1",
        "depth: 3 against 1",
    ]
    assert all(abs(sum(e.weights)) < 1e-12 and sum(map(abs, e.weights)) == pytest.approx(2) for e in effects)
    assert len(interactions(cells, wide)) == 2 + 2 + 1
    assert sum(map(abs, interactions(cells, wide)[0].weights)) == pytest.approx(4)


def test_two_cells_over_seeds_are_the_paired_t_test():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.9, 0.02, 5), rng.normal(0.87, 0.02, 5)
    estimates = estimate_over_seeds(
        np.concatenate([a, b]), [0] * 5 + [1] * 5, [*range(5), *range(5)], against(1, ["a", "b"])
    )
    assert float(estimates.p_values[0, 0]) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert float(estimates.theta[0, 0]) == pytest.approx(a.mean() - b.mean())
    low, high = stats.ttest_rel(a, b).confidence_interval()
    ratio = effects_of(against(1, ["a", "b"]), estimates, "seeds", 5)[0].ratio
    assert (ratio.low, ratio.high) == (pytest.approx(np.exp(low)), pytest.approx(np.exp(high)))


def test_one_seed_gives_no_test_over_seeds_and_a_missing_run_removes_only_itself():
    rng = np.random.default_rng(2)
    y, cells, seeds = seed_runs(rng, num_seeds=1)
    assert estimate_over_seeds(y, cells, seeds, FAMILY) is None
    y, cells, seeds = seed_runs(rng, num_seeds=3)
    whole = estimate_over_seeds(y, cells, seeds, FAMILY)
    part = estimate_over_seeds(y[1:], cells[1:], seeds[1:], FAMILY)
    assert (whole.freedom, part.freedom) == (6, 5)
    split = [0, 0, 1, 1]  # no common seed: cells cannot be separated from seeds
    assert estimate_over_seeds(y[:4], split, [0, 1, 2, 3], against(0, ["a", "b"])) is None


def test_known_effects_are_found_over_seeds_and_over_questions():
    rng = np.random.default_rng(3)
    estimates = estimate_over_seeds(*seed_runs(rng, (0.06, 0.0, 0.0)), FAMILY)
    assert names_found(estimates) == {"loss: hass against eagle"}
    estimates = estimate_over_seeds(*seed_runs(rng, (0.0, 0.0, 0.08)), FAMILY)
    assert "loss hass × depth 3" in names_found(estimates)
    found = names_found(estimate_over_questions(question_columns(rng, (1, 1, 1.15, 1.15)), FAMILY))
    assert found == {"loss: hass against eagle"}
    found = names_found(estimate_over_questions(question_columns(rng, (1, 1, 1, 1.25)), FAMILY))
    assert "loss hass × depth 3" in found


@pytest.mark.parametrize("unit", ["seeds", "questions"])
def test_family_wise_error_rate_is_at_most_five_percent(unit):
    rng = np.random.default_rng(4)
    if unit == "seeds":
        rate = family_error(estimate_over_seeds(*seed_runs(rng, repeats=REPEATS), FAMILY))
    else:
        rate = family_error(estimate_over_questions(question_columns(rng, num_questions=40, repeats=REPEATS), FAMILY))
    assert rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / REPEATS)
    assert rate > 0.02  # otherwise the test could not fail


def test_interval_over_seeds_is_computed_on_the_log_scale():
    values = [2.3, 2.4, 2.6]
    interval = interval_over_seeds(values)
    low, high = stats.ttest_1samp(np.log(values), 0).confidence_interval()
    assert (interval.low, interval.high) == (pytest.approx(np.exp(low)), pytest.approx(np.exp(high)))
    assert np.isnan(interval_over_seeds([2.0]).low)


# --- a half fraction -------------------------------------------------------------------------------------------------

PARTS = {name: [0, 1] for name in "abcde"}
EVERY = [dict(zip(PARTS, levels, strict=True)) for levels in product((0, 1), repeat=5)]
HALF = [cell for cell in EVERY if sum(cell.values()) % 2 == 0]  # I = -ABCDE: resolution V
QUARTER = [c for c in EVERY if (c["a"] + c["b"] + c["c"]) % 2 == (c["c"] + c["d"] + c["e"]) % 2 == 0]  # resolution III


def test_strength_is_the_number_of_factors_that_are_always_crossed():
    assert strength(EVERY, PARTS) == 5
    assert (len(HALF), strength(HALF, PARTS)) == (16, 4)
    assert (len(QUARTER), strength(QUARTER, PARTS)) == (8, 2)
    assert strength(HALF[1:], PARTS) == 0  # a missing cell
    four = [cell for cell in EVERY if (cell["a"] + cell["b"] + cell["c"] + cell["d"]) % 2 == 0 and cell["e"] == 0]
    assert strength(four, {name: [0, 1] for name in "abcd"}) == 3
    nine = [{"a": a, "b": b, "c": (a + b) % 3} for a in range(3) for b in range(3)]  # a Latin square
    assert strength(nine, {name: [0, 1, 2] for name in "abc"}) == 2


@pytest.mark.parametrize("planted", [("b",), ("e",), ("a", "d"), ("c", "e")])
def test_a_half_fraction_finds_the_planted_effect_and_nothing_that_it_could_be_mistaken_for(planted):
    """Main effects and interactions of two factors are estimated apart from each other: each is an exact contrast."""
    y = np.array([0.3 * math.prod(2 * cell[name] - 1 for name in planted) for cell in HALF])
    family = [*main_effects(HALF, PARTS), *interactions(HALF, PARTS)]
    assert len(family) == 5 + 10
    # the slow form: least squares of the full model with all main effects and interactions
    columns = [(name,) for name in PARTS] + list(combinations(PARTS, 2))
    design = np.array([[1.0, *(math.prod(2 * cell[n] - 1 for n in names) for names in columns)] for cell in HALF])
    fitted = dict(zip(columns, np.linalg.lstsq(design, y, rcond=None)[0][1:], strict=True))
    for contrast, names in zip(family, columns, strict=True):
        value = float(np.dot(contrast.weights, y))
        assert value == pytest.approx(2 ** len(names) * fitted[names], abs=1e-12), contrast.name
        assert (abs(value) > 1e-9) == (names == planted), contrast.name


def test_a_quarter_fraction_mistakes_an_interaction_for_a_main_effect():
    """What `strength` guards against: in a fraction of strength 2, the effect of c is also the interaction a × b."""
    y = np.array([0.3 * (2 * cell["a"] - 1) * (2 * cell["b"] - 1) for cell in QUARTER])
    found = {effect.name: abs(float(np.dot(effect.weights, y))) for effect in main_effects(QUARTER, PARTS)}
    assert found["c: 1 against 0"] == pytest.approx(0.6)
