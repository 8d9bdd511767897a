"""Intervals, tests and comparisons on cases with known results. Error rates: test_statistics_simulation.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
from measure_toys import make_record
from scipy import stats

from hass_lightning.measure import statistics, verdicts


def data(n=40, seed=0, effect=1.0):
    rng = np.random.default_rng(seed)
    cycles = rng.integers(20, 60, n).astype(float)
    return np.round(cycles * rng.normal(3.0, 0.4, n) * effect), cycles


def test_ratio_interval_contains_the_ratio_of_sums_and_is_reproducible():
    tokens, cycles = data()
    interval = statistics.ratio_interval(tokens, cycles)
    assert interval.value == pytest.approx(tokens.sum() / cycles.sum())
    assert interval.low < interval.value < interval.high
    assert interval == statistics.ratio_interval(tokens, cycles)
    assert interval.value * interval.value == pytest.approx(interval.low * interval.high)  # symmetric on the log scale
    assert str(interval).startswith(f"{interval.value:.2f} [")


def test_the_interval_is_about_1_96_standard_errors_wide_for_many_questions():
    tokens, cycles = data(n=800)
    interval = statistics.ratio_interval(tokens, cycles)
    residual = tokens - cycles * interval.value
    error = math.sqrt((residual**2).sum()) / tokens.sum()
    assert math.log(interval.high / interval.value) == pytest.approx(1.96 * error, rel=0.05)


def test_duplicating_every_question_narrows_the_interval_by_sqrt_two():
    tokens, cycles = data(n=300)
    one = statistics.ratio_interval(tokens, cycles)
    two = statistics.ratio_interval(np.tile(tokens, 2), np.tile(cycles, 2))
    assert math.log(one.high / one.low) / math.log(two.high / two.low) == pytest.approx(math.sqrt(2), rel=0.05)


def test_degenerate_data():
    for n in (2, 10):  # no spread at all
        same = statistics.ratio_interval([3.0] * n, [1.0] * n)
        assert (same.value, same.low, same.high) == pytest.approx((3, 3, 3))
    alone = statistics.ratio_interval([3], [1])
    assert alone.value == pytest.approx(3)
    assert math.isnan(alone.low)
    assert math.isnan(statistics.ratio_interval([0, 0], [0, 0]).value)
    few = statistics.ratio_interval([3, 5, 4], [1, 2, 1])
    assert 0 < few.low < few.value < few.high < 1000
    with pytest.raises(ValueError, match="same questions"):
        statistics.ratio_interval([1, 2], [1])
    with pytest.raises(ValueError, match="same questions"):
        statistics.ratio_interval([], [])


def test_swapping_all_labels_exactly():
    """Three questions, 8 swaps: the observed |θ| is the largest, and its mirror image reaches it: p = 2/8."""
    a = np.array([[4.0, 5.0, 6.0], [1.0, 1.0, 1.0]])[:, None, :]
    b = np.array([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]])[:, None, :]
    assert statistics.swap_p_values(a, b)[0] == pytest.approx(2 / 8)
    assert statistics.swap_p_values(a, a)[0] == 1.0


def test_random_swaps_agree_with_all_swaps():
    tokens_a, cycles_a = data(n=12, seed=1)
    tokens_b, cycles_b = data(n=12, seed=2, effect=1.05)
    a, b = np.stack([tokens_a, cycles_a])[:, None, :], np.stack([tokens_b, cycles_b])[:, None, :]
    exact = statistics.swap_p_values(a, b, num_permutations=5000)[0]
    drawn = statistics.swap_p_values(a, b, num_permutations=4000)[0]
    assert drawn == pytest.approx(exact, abs=0.03)


def test_pairing_removes_the_variance_of_questions():
    """The same 3 % on every question is detected, although questions differ by far more than 3 %."""
    tokens, cycles = data(n=80)
    noise = np.random.default_rng(3).normal(1.03, 0.03, 80)
    found = statistics.paired_log_ratio(tokens * noise, cycles, tokens, cycles)
    assert found.ratio.low > 1
    assert found.p_value < 0.001
    assert found.detectable < 0.02
    swapped = statistics.paired_log_ratio(tokens, cycles, tokens * noise, cycles)
    assert swapped.ratio.value == pytest.approx(1 / found.ratio.value)
    assert swapped.p_value == pytest.approx(found.p_value, abs=0.002)
    with pytest.raises(ValueError, match="same questions"):
        statistics.paired_log_ratio(tokens, cycles, tokens[1:], cycles[1:])


def test_detectable_effect_of_a_known_case():
    """80 questions with σ_d = 0.15 resolve 4.7 % (2.8 standard errors, on the log scale)."""
    assert math.log1p(statistics.minimum_detectable_effect(0.15 / math.sqrt(80))) == pytest.approx(0.047, abs=0.0005)


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def head(effect, n=30, seed=0, benchmark="b", temperature=0.0):
    """Return records of a head whose cycles accept two or three tokens, and `effect` more."""
    rng = np.random.default_rng(seed)
    records = []
    for question in range(n):
        accepted = [int(x) for x in rng.integers(1, 4, 20)]
        accepted = [a + 1 if rng.random() < effect else a for a in accepted]
        for turn in range(2):
            records.append(
                make_record(str(question), turn, accepted[turn::2], benchmark=benchmark, temperature=temperature)
            )
    return records


def test_comparison_is_reported_in_plain_language():
    better = verdicts.compare(head(0.5), head(0.0), name_a="HASS", name_b="EAGLE")
    assert better.significant
    assert better.num_questions == 30  # both turns of a question are one unit
    text = better.verdict
    assert text.startswith("HASS accepts ") and "more tokens per target forward than EAGLE (p = " in text
    assert "30 questions can resolve" in text and "several seeds" in text
    worse = verdicts.compare(head(0.0), head(0.5), name_a="EAGLE", name_b="HASS")
    assert "fewer tokens per target forward" in worse.verdict
    same = verdicts.compare(head(0.0, seed=5), head(0.0, seed=6))
    assert not same.significant
    assert same.verdict.startswith("no difference is shown: ")


def test_compare_uses_common_questions_only_and_needs_one():
    part = verdicts.compare(head(0.5)[:20], head(0.0))
    assert part.num_questions == 10
    with pytest.raises(ValueError, match="no question in common"):
        verdicts.compare(head(0.5), head(0.0, temperature=1.0))
    with pytest.raises(ValueError, match="must be one of"):
        verdicts.compare(head(0.5), head(0.0), metric="luck")
    alone = verdicts.compare(head(0.5, n=1), head(0.0, n=1))
    assert alone.verdict.startswith("no verdict")


def test_speed_is_compared_by_seconds():
    fast = [make_record(str(i), accepted=[1] * 9, num_tokens=20, seconds={"verify": 1 + i / 50}) for i in range(20)]
    slow = [make_record(str(i), accepted=[1] * 9, num_tokens=20, seconds={"verify": 2 + i / 50}) for i in range(20)]
    found = verdicts.compare(fast, slow, metric="speed")
    assert found.ratio.value == pytest.approx(sum(2 + i / 50 for i in range(20)) / sum(1 + i / 50 for i in range(20)))
    assert "tokens per second" in found.verdict
    interval = verdicts.speedup_interval(fast, slow)
    assert interval.value == pytest.approx(found.ratio.value)
    assert math.isnan(verdicts.speedup_interval(fast, []).value)


def test_benchmarks_are_adjusted_together():
    a = head(0.10, n=30, benchmark="x") + head(0.0, n=30, seed=7, benchmark="y")
    b = head(0.0, n=30, benchmark="x") + head(0.0, n=30, seed=8, benchmark="y")
    found = verdicts.compare_benchmarks(a, b)
    assert list(found) == ["x", "y"]
    assert found["x"].p_adjusted == pytest.approx(min(1, 2 * found["x"].p_value))
    assert "adjusted for several benchmarks" in found["x"].verdict


def test_the_sentences_on_heads_name_head_benchmark_decoder_and_temperature():
    records = [
        replace(each, draft=name)
        for name, effect in (("a", 0.0), ("b", 0.5))
        for benchmark in ("x", "y")
        for each in head(effect, n=10, benchmark=benchmark)
    ]
    starts = [sentence.split(": ")[0] for sentence in verdicts.verdicts(records, ["a", "b"])]
    assert starts == ["b against a (x, tree, T=0)", "b against a (y, tree, T=0)"]


def test_methods_need_seeds():
    one = verdicts.compare_methods({0: 3.0}, {0: 2.8}, name_a="HASS", name_b="EAGLE")
    assert not one.significant
    assert one.verdict.startswith("no verdict on HASS against EAGLE: they share 1 seed")
    a, b = {0: 3.0, 1: 3.1, 2: 3.05, 9: 1.0}, {0: 2.8, 1: 2.85, 2: 2.9}
    three = verdicts.compare_methods(a, b)
    expected = stats.ttest_rel([math.log(a[s]) for s in range(3)], [math.log(b[s]) for s in range(3)])
    assert three.num_seeds == 3
    assert three.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (three.ratio.low, three.ratio.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert "3 seeds can resolve" in three.verdict
    equal = verdicts.compare_methods({0: 2.0, 1: 2.0}, {0: 2.0, 1: 2.0})
    assert equal.p_value == 1.0
    with pytest.raises(ValueError, match="positive"):
        verdicts.compare_methods({0: 0.0, 1: 1.0}, {0: 1.0, 1: 1.0})
