"""Every convention on one hand-made trace, and the file of records."""

import math

import pytest
import torch
from measure_toys import make_record

from hass_lightning.measure import metrics as metrics
from hass_lightning.measure.record import Record, read_records, select
from hass_lightning.types import DecodeResult

# Two questions, three answers, six cycles. The last cycle of 1/0 was truncated: 1 + 3 + 1 + 4 = 9 tokens, the limit is
# 8.
#   question 1, turn 0: accepted 2 0 3, depth offered 3 3 3, nodes 6 6 6, 8 tokens, 1.0 s (0.2 prefill)
#   question 1, turn 1: accepted 1,     depth offered 3,     nodes 6,     3 tokens, 0.5 s (0.2 prefill)
#   question 2, turn 0: accepted 0 0,   depth offered 0 2,   nodes 0 4,   3 tokens, 1.0 s (0.5 prefill)
TRACE = [
    make_record(
        "1", 0, [2, 0, 3], num_tokens=8, seconds={"prefill": 0.2, "draft": 0.3, "verify": 0.5}, category="math"
    ),
    make_record("1", 1, [1], num_tokens=3, seconds={"prefill": 0.2, "draft": 0.1, "verify": 0.2}, category="math"),
    make_record("2", 0, [0, 0], [0, 2], [0, 4], num_tokens=3, seconds={"prefill": 0.5, "verify": 0.5}, category="qa"),
]
BASE = [
    make_record("1", 0, [0] * 7, [0] * 7, [0] * 7, num_tokens=8, seconds={"prefill": 0.2, "verify": 4.0}),
    make_record("1", 1, [0] * 2, [0] * 2, [0] * 2, num_tokens=3, seconds={"prefill": 0.2, "verify": 1.0}),
    make_record("2", 0, [0] * 2, [0] * 2, [0] * 2, num_tokens=3, seconds={"prefill": 0.5, "verify": 1.0}),
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tau_micro", 12 / 6),  # Σ(accepted + 1) = 3+1+4 + 2 + 1+1 = 12 tokens, 6 forwards
        ("tau_micro_without_bonus", 6 / 6),  # Σ accepted = 2+0+3+1+0+0
        ("tau_macro", (10 / 4 + 2 / 2) / 2),  # question 1: 10 tokens in 4 forwards; question 2: 2 in 2
        ("hass_eagle", ((6 / 4 + 1) + (0 / 2 + 1)) / 2),  # mean over questions of mean accepted + 1
        ("vllm", 1 + 6 / 5),  # the cycle without a draft is not counted
        ("vllm_acceptance_rate", 6 / 28),  # 4 · 6 + 0 + 4 draft tokens
        ("sglang_server", 12 / 6),
        ("sglang_request", 14 / 6),  # 8+3+3 completion tokens: with that of the prefill, without truncated ones
        ("spec_bench", 12 / 6),  # mean of 3 1 4 2 1 1
        # a_1 = 3/5 (five cycles offered depth 1), a_2 = 2/3, a_3 = 1/2: 0.6 + 0.4 + 0.2
        ("specforge_simulated", 0.6 + 0.6 * 2 / 3 + 0.6 * 2 / 3 / 2),
    ],
)
def test_golden_conventions(name, expected):
    assert metrics.conventions(TRACE)[name] == pytest.approx(expected, abs=1e-12)


def test_golden_test_covers_every_convention():
    assert len(metrics.conventions(TRACE)) == 10


def test_rates_by_depth():
    assert metrics.conditional_rates(TRACE) == pytest.approx([3 / 5, 2 / 3, 1 / 2])
    assert metrics.survival(TRACE) == pytest.approx([0.6, 0.4, 0.2])
    assert metrics.vllm_position_rates(TRACE) == pytest.approx([3 / 5, 2 / 5, 1 / 5])  # unconditional, micro
    assert metrics.acceptance_histogram(TRACE) == [3, 1, 1, 1]
    assert metrics.acceptance_histogram([]) == []


def test_survival_is_not_biased_by_short_drafts():
    """Half of the drafts end at depth 1, and everything offered is accepted: survival is 1, vLLM's rate is not."""
    trace = [make_record(accepted=[1, 2], drafted=[1, 2])]
    assert metrics.survival(trace) == [1.0, 1.0]
    assert metrics.vllm_position_rates(trace) == [1.0, 0.5]


def test_speed():
    # 14 tokens in 2.5 s; without prefill (7+2+2) tokens in 1.6 s
    assert metrics.tokens_per_second(TRACE) == pytest.approx(14 / 2.5)
    assert metrics.tokens_per_second(TRACE, prefill=False) == pytest.approx(11 / 1.6)
    # baseline: 14 tokens in 6.9 s; without prefill 11 tokens in 6.0 s
    assert metrics.speedup(TRACE, BASE) == pytest.approx((14 / 2.5) / (14 / 6.9))
    assert metrics.speedup(TRACE, BASE, prefill=False) == pytest.approx((11 / 1.6) / (11 / 6.0))
    # per question: 11 tokens in 1.5 s and 3 in 1.0 s; baseline 11 in 5.4 s and 3 in 1.5 s
    assert metrics.hass_speedup(TRACE, BASE) == pytest.approx((11 / 1.5 + 3 / 1.0) / (11 / 5.4 + 3 / 1.5))
    assert metrics.phase_seconds(TRACE) == pytest.approx({"prefill": 0.9, "draft": 0.4, "verify": 1.2})


def test_speedup_uses_turns_that_both_answered():
    assert metrics.speedup(TRACE, BASE[:1]) == pytest.approx(4.2 / 1.0)
    sampled = [make_record("1", 0, [0], temperature=1.0)]
    assert math.isnan(metrics.speedup(TRACE, sampled))


def test_by_category():
    groups = metrics.by_category(TRACE)
    assert {name: metrics.acceptance_length(group) for name, group in groups.items()} == {"math": 2.5, "qa": 1.0}


def test_division_by_zero_gives_nan():
    assert math.isnan(metrics.acceptance_length([]))
    assert math.isnan(metrics.tokens_per_second([]))
    with pytest.raises(ValueError, match="micro"):
        metrics.acceptance_length(TRACE, average="mean")


def test_autoregressive_decoding_has_length_one():
    assert metrics.acceptance_length(BASE) == 1.0


def test_expected_acceptance():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(metrics.expected_acceptance(p, q), torch.tensor([0.5, 1.0]))


def test_record_contains_a_decoded_answer():
    result = DecodeResult([5, 6, 7], [1], [2], [3], {"prefill": 1.0, "verify": 2.0}, [[6, 9, 9]], [0.1])
    record = make_record().add_result(result)
    assert (record.num_tokens, record.accepted, record.proposals) == (3, [1], [[6, 9, 9]])
    assert (record.total_seconds, record.decode_seconds) == (3.0, 2.0)
    assert make_record().add_result(result, keep_proposals=False).proposals == []


def test_file_round_trip(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [*TRACE, make_record("é", difference={"position": 3, "gap": 0.1}, identical=False, top_k=5)]
    path.write_text("".join(record.to_json() + "\n" for record in records))
    assert read_records(path) == records
    assert select(records, turn=1) == [TRACE[1]]


def test_incomplete_last_line_is_dropped_and_damaged_line_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    lines = [record.to_json() for record in TRACE]
    path.write_text("\n".join(lines)[:-20])
    assert read_records(path) == TRACE[:2]
    path.write_text("\n".join([lines[0], lines[1][:-20], lines[2]]) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)
    path.write_text(lines[0] + "\n[1, 2]\n")
    with pytest.raises(ValueError, match="not a record"):
        read_records(path)
    with pytest.raises(ValueError, match="no records"):
        read_records(tmp_path / "none.jsonl")


def test_unknown_keys_of_a_newer_version_are_ignored():
    line = TRACE[0].to_json()[:-1] + ', "from_the_future": 1}'
    assert Record.from_json(line) == TRACE[0]
