"""Error rates over 10,000 simulated benchmarks with fixed seeds. Run with -s to print the figures at 20 questions."""

import numpy as np
import pytest

from hass_lightning.measure import statistics

REPEATS, CHUNK = 10_000, 1000


def population(kind: str, shape: tuple[int, int], rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens [S, n], cycles [S, n] and true τ [S, n] of questions with truncated or skewed answer lengths."""
    if kind == "cut":  # most answers reach max_new_tokens: few cycles if τ is high
        tau, length = np.exp(rng.normal(np.log(3.0), 0.25, shape)), np.full(shape, 128.0)
    else:  # lengths over two orders of magnitude, τ from 1 to 8
        tau = 1 + rng.gamma(1.2, 1.5, shape)
        length = np.minimum(rng.lognormal(np.log(120), 0.8, shape), 1024)
    tokens, cycles = answer(tau, length, rng)
    return tokens, cycles, tau


def answer(tau: np.ndarray, length: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    cycles = np.maximum(np.round(length / tau), 1)
    tokens = np.round(cycles * tau + 1.3 * np.sqrt(cycles) * rng.normal(size=tau.shape))
    return np.maximum(tokens, cycles), cycles


def coverage(kind: str, num_questions: int) -> float:
    rng = np.random.default_rng(0)
    tokens, cycles, _ = population(kind, (1, 1_000_000), rng)
    truth = np.log(tokens.sum() / cycles.sum())
    hits = 0
    for _ in range(REPEATS // CHUNK):
        tokens, cycles, _ = population(kind, (CHUNK, num_questions), rng)
        columns = np.stack([tokens, cycles])
        _, low, high = statistics.log_ratio_intervals(columns, [1, -1], num_resamples=1000)
        hits += int(((low <= truth) & (truth <= high)).sum())
    return hits / REPEATS


@pytest.mark.parametrize("kind", ["cut", "skewed"])
def test_intervals_cover_the_truth(kind):
    at_80, at_20 = coverage(kind, 80), coverage(kind, 20)
    print(f"\ncoverage of the 95 % interval of τ, {kind} answers: {at_80:.1%} at 80 questions, {at_20:.1%} at 20")
    assert 0.93 <= at_80 <= 0.97
    assert 0.92 <= at_20 <= 0.98


def test_false_positive_rate_of_two_equal_heads_is_five_percent():
    """Two heads with the same τ on each question, measured on different cycles: p-value and interval."""
    rng = np.random.default_rng(1)
    found, outside = {20: 0, 80: 0}, {20: 0, 80: 0}
    for num_questions in found:
        for _ in range(REPEATS // CHUNK):
            tokens, cycles, tau = population("skewed", (CHUNK, num_questions), rng)
            a = np.stack([tokens, cycles])
            b = np.stack(answer(tau, tokens, rng))
            found[num_questions] += int((statistics.swap_p_values(a, b, num_permutations=999) < 0.05).sum())
            columns = np.stack([a[0], b[1], a[1], b[0]])
            _, low, high = statistics.log_ratio_intervals(columns, [1, 1, -1, -1], num_resamples=500)
            outside[num_questions] += int(((low > 0) | (high < 0)).sum())
    rates = {n: count / REPEATS for n, count in found.items()}
    print(f"\nfalse positives of the permutation test: {rates[80]:.1%} at 80 questions, {rates[20]:.1%} at 20")
    print(f"paired intervals without 1: {outside[80] / REPEATS:.1%} at 80 questions, {outside[20] / REPEATS:.1%} at 20")
    assert all(0.04 <= rate <= 0.06 for rate in rates.values())
    assert 0.03 <= outside[80] / REPEATS <= 0.07


def test_power_at_the_detectable_effect_is_80_percent():
    rng = np.random.default_rng(2)
    n, sigma = 80, 0.15
    effect = np.log1p(statistics.minimum_detectable_effect(sigma / np.sqrt(n)))
    cycles = np.full((CHUNK, n), 50.0)
    found = 0
    for _ in range(2):
        b = np.stack([150 * np.exp(rng.normal(0, 0.3, (CHUNK, n))), cycles])
        a = np.stack([b[0] * np.exp(rng.normal(effect - sigma**2 / 2, sigma, (CHUNK, n))), cycles])
        found += int((statistics.swap_p_values(a, b, num_permutations=999) < 0.05).sum())
    print(f"\npower at the minimum detectable effect: {found / 2 / CHUNK:.1%}")
    assert 0.72 <= found / 2 / CHUNK <= 0.86
