"""Acceptance profiles: against hand counts, and against the engines' own rules run as slow simulations."""

import json
import random

import numpy as np
import pytest
from measure_toys import make_record

from hass_lightning.measure.acceptance_profile import (
    acceptance_profiles,
    survival_intervals,
    write_acceptance_profile,
)
from hass_lightning.measure.metrics import acceptance_histogram, acceptance_length, survival
from hass_lightning.measure.statistics import ratio_interval

RATES = (0.8, 0.7, 0.9, 0.4)  # conditional


def chain_records(rates=RATES, num_questions=40, cycles=50, seed=0, **fields):
    """Return chains of independent cycles, in which depth k is accepted at `rates[k]`."""
    rng = random.Random(seed)

    def accepted():
        return next((k for k, rate in enumerate(rates) if rng.random() >= rate), len(rates))

    return [
        make_record(
            f"q{n}", accepted=[accepted() for _ in range(cycles)], drafted=[len(rates)] * cycles, decoder="chain",
            **fields,
        )
        for n in range(num_questions)
    ]  # fmt: skip


def test_hand_counted():
    records = [make_record("1", accepted=[2, 0, 3], drafted=[3, 3, 3]), make_record("2", accepted=[1], drafted=[1])]
    (profile,) = acceptance_profiles(records)
    # reached and accepted by depth: 4 and 3; 2 and 2 (the draft of one token is censored); 2 and 1
    assert [each.value for each in profile.survival] == pytest.approx([3 / 4, 3 / 4, 3 / 8])
    assert profile.vllm() == {
        "num_speculative_tokens": 3,
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": [0.75, 0.75, 0.375],
    }
    assert profile.sglang()["SGLANG_SIMULATE_ACC_LEN"] == "2.8750"
    assert (profile.num_questions, profile.num_cycles) == (2, 4)
    assert profile.acceptance_length.value == acceptance_length(records) == 10 / 4


def test_interval_of_the_first_depth_is_that_of_a_ratio():
    records = chain_records()
    accepted = [sum(count >= 1 for count in record.accepted) for record in records]
    first, *deeper = survival_intervals(records)
    assert first == ratio_interval(accepted, [50] * len(records))
    assert all(each.low < each.value < each.high for each in deeper)
    assert [each.value for each in (first, *deeper)] == survival(records)


def test_intervals_cover_the_true_survival():
    truth = np.cumprod(RATES)
    covered = [
        [
            each.low <= s <= each.high
            for each, s in zip(survival_intervals(chain_records(num_questions=15, seed=n)), truth, strict=True)
        ]
        for n in range(15)
    ]
    assert 0.8 < np.mean(covered) <= 1  # 95 % nominal; 60 intervals, of 15 independent sets


def test_vllm_rule_reproduces_the_accepted_lengths():
    """vLLM accepts position i if u < rates[i] / rates[i-1], and stops at the first rejection."""
    records = chain_records()
    (profile,) = acceptance_profiles(records)
    rates = profile.vllm()["synthetic_acceptance_rates"]
    conditional = [p / q if q > 0 else 0.0 for p, q in zip(rates, [1.0, *rates[:-1]], strict=True)]
    simulated = chain_records(conditional, num_questions=100, cycles=200, seed=1)
    assert acceptance_length(simulated) == pytest.approx(acceptance_length(records), abs=0.04)
    shares = [np.array(acceptance_histogram(side)) for side in (simulated, records)]
    assert shares[0] / shares[0].sum() == pytest.approx(shares[1] / shares[1].sum(), abs=0.015)


def test_sglang_rule_reproduces_the_mean():
    """SGLang's `match-expected` draws between the two integers next to the given length."""
    records = chain_records()
    (profile,) = acceptance_profiles(records)
    length, rng = float(profile.sglang()["SGLANG_SIMULATE_ACC_LEN"]), random.Random(0)
    drawn = [int(length) + (rng.random() < length - int(length)) for _ in range(20_000)]
    assert np.mean(drawn) == pytest.approx(acceptance_length(records), abs=0.02)


def test_groups_and_depths_that_were_never_reached():
    records = [
        *chain_records((0.5, 0.5), 6, temperature=0.0, benchmark="a"),
        *chain_records((0.5, 0.5), 6, temperature=1.0, benchmark="a"),
        *chain_records((0.5, 0.0, 0.5, 0.5), 6, temperature=1.0, benchmark="b"),
        make_record("q0", accepted=[0, 0], drafted=[0, 0], draft="", decoder="autoregressive"),
        make_record("q0", accepted=[2, 0], drafted=[2, 0], draft="", decoder="prompt_lookup"),
    ]
    profiles = {(each.temperature, each.benchmark): each for each in acceptance_profiles(records)}
    assert list(profiles) == [(0.0, "a"), (1.0, "all"), (1.0, "a"), (1.0, "b")]
    assert profiles[1.0, "b"].rates[1:] == [0, 0, 0]
    both = profiles[1.0, "all"]
    assert both.rates == sorted(both.rates, reverse=True)


def test_file(tmp_path):
    path = tmp_path / "acceptance_profile.json"
    write_acceptance_profile(path, [make_record("1", accepted=[0, 0], drafted=[2, 2])])  # one question, no interval
    (profile,) = json.loads(path.read_text())["profiles"]
    assert profile["survival"] == [[0.0, None, None]] * 2
    assert profile["vllm"]["synthetic_acceptance_rates"] == [0.0, 0.0]
    assert profile["acceptance_length"] == [1.0, None, None]
    with pytest.raises(ValueError, match="decoders="):
        write_acceptance_profile(path, [make_record("1", accepted=[0], drafted=[0], decoder="autoregressive")])
