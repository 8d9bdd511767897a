"""Trained against served: the engines' formats, planted differences by position, and equal rates."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from measure_toys import make_record

from hass_lightning.measure.engine_counts import EngineCounts, read_engine_counts
from hass_lightning.measure.metrics import acceptance_length, vllm_position_rates
from hass_lightning.measure.served import compare_served, design_effect, likely_causes

RATES = (0.8, 0.7, 0.6, 0.6)


def chain(rates=RATES, num_questions=40, cycles=50, seed=0, spread=0.0):
    """Return chains; `spread` makes all rates of a question larger or smaller together."""
    rng = random.Random(seed)
    records = []
    for n in range(num_questions):
        shift = rng.choice((-spread, spread))
        accepted = [
            next((k for k, r in enumerate(rates) if rng.random() >= r + shift), len(rates)) for _ in range(cycles)
        ]
        records.append(
            make_record(f"q{n}", accepted=accepted, drafted=[len(rates)] * cycles, nodes=[len(rates)] * cycles)
        )
    return records


def counts_of(records, **more):
    """Return the counters that an engine would have counted."""
    cycles = [accepted for record in records for accepted in record.accepted]
    depth = max(records[0].drafted)
    accepted = tuple(sum(count >= k for count in cycles) for k in range(1, depth + 1))
    values = {"mean_drafted": depth, "reported_length": 1 + sum(cycles) / len(cycles), "tolerance": 1e-9} | more
    return EngineCounts("engine", len(cycles), accepted, **values)


def metrics_text(counts, scale=1):
    """Return the text of vLLM's /metrics, with the counts split over two engines."""
    lines = [
        "# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.",
        'vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09',
        'vllm:num_requests_running{engine="0",model_name="m"} 1.0',
    ]
    named = {"num_drafts": counts.num_drafts, "num_draft_tokens": counts.num_drafts * len(counts.accepted)}
    named["num_accepted_tokens"] = sum(counts.accepted)
    for engine in (0, 1):
        half = [(value * scale + engine) // 2 for value in (*named.values(), *counts.accepted)]
        labels = f'engine="{engine}",model_name="m"'
        lines += [
            f"vllm:spec_decode_{name}_total{{{labels}}} {value}.0" for name, value in zip(named, half, strict=False)
        ]
        lines += [
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{k}"}} {value}.0'
            for k, value in enumerate(half[3:])
        ]
    return "\n".join(lines) + "\n"


def test_vllm_metrics(tmp_path):
    records = chain()
    expected = counts_of(records)
    path, before = tmp_path / "after.txt", tmp_path / "before.txt"
    path.write_text(metrics_text(expected))
    found = read_engine_counts(path)
    assert (found.num_drafts, found.accepted, found.mean_drafted) == (expected.num_drafts, expected.accepted, 4)
    assert found.consistent and found.length == pytest.approx(acceptance_length(records))
    assert np.array(found.accepted) / found.num_drafts == pytest.approx(vllm_position_rates(records))
    before.write_text(metrics_text(expected))
    path.write_text(metrics_text(expected, scale=3))
    assert read_engine_counts(path, before).accepted == tuple(2 * count for count in expected.accepted)
    with pytest.raises(ValueError, match="restarted"):
        read_engine_counts(before, path)


def test_vllm_log(tmp_path):
    path = tmp_path / "log.txt"
    windows = [chain(seed=n) for n in range(3)]
    lines = []
    for records in windows:
        counts = counts_of(records)
        rates = ", ".join(f"{count / counts.num_drafts:.3f}" for count in counts.accepted)
        lines.append(
            f"(APIServer) INFO [metrics.py:101] SpecDecoding metrics: Mean acceptance length: {counts.length:.2f}, "
            f"Accepted throughput: 3.87 tokens/s, Drafted throughput: 5.72 tokens/s, Accepted: {sum(counts.accepted)} "
            f"tokens, Drafted: {4 * counts.num_drafts} tokens, Per-position acceptance rate: {rates}, "
            "Avg Draft acceptance rate: 67.7%"
        )
    path.write_text("\n".join(["other line", *lines]))
    found, expected = read_engine_counts(path), counts_of([r for window in windows for r in window])
    assert found.num_drafts == expected.num_drafts and found.consistent
    assert np.abs(np.array(found.accepted) - expected.accepted).max() <= 3  # three decimals of 2,000 drafts, 3 windows
    with pytest.raises(ValueError, match="served_before"):
        read_engine_counts(path, path)


def test_sglang_responses(tmp_path):
    """One response per question; the answer has the token of the prefill, and its last cycle may be cut."""
    records = chain(cycles=20)
    responses = []
    for record in records:
        histogram = [record.accepted.count(n) for n in range(5)]
        tokens = 1 + sum(record.accepted) + len(record.accepted)
        meta = {
            "completion_tokens": tokens - record.accepted[-1],
            "spec_verify_ct": 20,
            "spec_accept_histogram": histogram,
        }
        responses.append({"text": "x", "meta_info": meta})
    expected = counts_of(records)
    for text in (json.dumps(responses), "\n".join(map(json.dumps, responses))):
        path = tmp_path / "answers.jsonl"
        path.write_text(text)
        found = read_engine_counts(path)
        assert (found.num_drafts, found.accepted) == (expected.num_drafts, expected.accepted)
        assert found.consistent


def test_other_files_are_refused_with_the_formats(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text('{"meta_info": {"completion_tokens": 3}}\nDecode batch. accept len: 2.91')
    for given in (path, tmp_path / "none.txt"):
        with pytest.raises(ValueError, match="SpecDecoding metrics"):
            read_engine_counts(given)
    path.write_text('vllm:spec_decode_num_drafts_total{engine="0"} 0.0\n')
    with pytest.raises(ValueError, match="contains no drafts"):
        read_engine_counts(path)


def test_equal_counts_have_p_value_one():
    records = chain()
    found = compare_served(records, counts_of(records))
    assert [each.p_value for each in found.positions] == pytest.approx([1] * 4)
    assert not likely_causes(found)
    assert found.our_length == pytest.approx(found.served_length) == pytest.approx(acceptance_length(records))


def test_equal_rates_are_rarely_called_different():
    """Other cycles of the same rates, and questions whose cycles resemble each other (as real ones do)."""
    sides = [[chain(cycles=20, seed=seed, spread=0.15) for seed in (n, 1000 + n)] for n in range(60)]
    shown = [compare_served(ours, counts_of(theirs)).differs for ours, theirs in sides]
    assert np.mean(shown) <= 0.1  # 5 % nominal


def test_design_effect_against_resampling():
    records = chain(spread=0.2, seed=3)
    passed = [sum(a >= 1 for a in record.accepted) for record in records]
    reached = [len(record.accepted) for record in records]
    rng = np.random.default_rng(0)
    draws = rng.integers(0, 40, (4000, 40))
    resampled = np.array(passed)[draws].sum(1) / np.array(reached)[draws].sum(1)
    rate = sum(passed) / sum(reached)
    assert design_effect(passed, reached) == pytest.approx(resampled.var() / (rate * (1 - rate) / 2000), rel=0.1)
    assert design_effect([5, 5], [10, 10]) == design_effect([0, 0], [10, 10]) == 1


@pytest.mark.parametrize(
    ("rates", "positions", "cause"),
    [
        ((0.8, 0.7, 0.4, 0.6), {3}, "draft steps after the first"),
        ((0.75, 0.4, 0.3, 0.3), {1, 2, 3, 4}, "draft steps after the first"),
        ((0.68, 0.6, 0.52, 0.52), {1, 2, 3}, "template or prompts"),
        ((0.05, 0.1, 0.1, 0.1), {1}, "wrong weights"),
        ((0.77, 0.672, 0.58, 0.58), {1, 2}, "precision"),
        ((0.9, 0.8, 0.7, 0.7), {1, 2, 3}, "other prompts or sampling"),
    ],
)
def test_planted_difference_is_found_and_named(rates, positions, cause):
    ours, served = chain(num_questions=200, cycles=60), chain(rates, num_questions=200, cycles=60, seed=1)
    found = compare_served(ours, counts_of(served))
    assert positions <= {each.position for each in found.positions if each.significant}
    assert [each.name for each in likely_causes(found)] == [cause]
    if positions == {3}:
        assert [each.significant for each in found.positions] == [False, False, True, False]


def test_setting_causes():
    records = chain()
    full = counts_of(records)
    shorter = replace(
        full, accepted=full.accepted[:2], mean_drafted=2, reported_length=1 + sum(full.accepted[:2]) / 2000
    )
    assert [each.name for each in likely_causes(compare_served(records, shorter))] == ["draft length"]
    mixed = counts_of(records, reported_length=3.0)
    assert [each.name for each in likely_causes(compare_served(records, mixed))] == ["mixed counters"]
    adaptive = counts_of(records, mean_drafted=3.1)
    assert [each.name for each in likely_causes(compare_served(records, adaptive))] == ["shorter drafts"]
    for record in records:
        record.nodes = [10] * len(record.nodes)
    assert [each.name for each in likely_causes(compare_served(records, counts_of(records)))] == ["draft shape"]
