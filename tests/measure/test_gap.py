"""The gap explainer: a planted cause gets the whole gap, and the parts add up."""

import random
from dataclasses import replace
from statistics import mean, stdev

import pytest
from measure_toys import make_record

from hass_lightning.measure.gap import FACTORS, difference, explain_gap, matches, measurements_of, truncated
from hass_lightning.measure.metrics import CONVENTIONS, acceptance_length

CONDITIONS = {
    "tree": {"decoder": "chain", "depth": 3},
    "temperature": 0.0,
    "prompts": "a",
    "template": "own",
    "precision": "float32",
    "answer_length": 100,
    "training_rows": 1000,
}
# how records show a factor that differs, and the reference's statement of it
CHANGED = {
    "tree": ({"decoder": "tree", "settings": {"num_nodes": 60}}, {"decoder": "tree", "num_nodes": 60}),
    "temperature": ({"temperature": 1.0, "rule": "deterministic"}, {"temperature": 1.0, "rule": "deterministic"}),
    "prompts": ({"benchmark": "b"}, "b"),
    "precision": ({"target": "t/bfloat16"}, "bfloat16"),
    "answer_length": ({"max_new_tokens": 200}, 200),
}


def records(seed=0, lowest=0, num_questions=12, **fields):
    """Return chains with at least `lowest` accepted tokens per cycle, in answers of different lengths."""
    rng = random.Random(seed)
    values = {"decoder": "chain", "settings": {"depth": 3}, "benchmark": "a", "target": "t/float32", "rule": "greedy",
              "max_new_tokens": 100}  # fmt: skip
    answers = [[rng.randint(lowest, 3) for _ in range(rng.randint(5, 40))] for _ in range(num_questions)]
    return [make_record(f"q{n}", accepted=accepted, **(values | fields)) for n, accepted in enumerate(answers)]


def measured(found, template="own", training_rows=1000):
    (measurement,) = measurements_of(found, template, training_rows)
    return measurement


def adds_up(gap):
    parts = sum(step.change.value for step in gap.steps) + gap.remainder.value
    return gap.mine.value + parts == pytest.approx(gap.reference)


@pytest.mark.parametrize("factor", CHANGED)
def test_planted_cause_gets_the_gap(factor):
    """The published number was measured with one other condition, under which all else has no effect."""
    fields, statement = CHANGED[factor]
    mine, better = measured(records()), measured(records(seed=1, lowest=1, **fields))
    others = [
        measured(records(**{**CHANGED[name][0], **fields})) for name in CHANGED if name != factor
    ]  # two changes at once: not one factor at a time
    published = acceptance_length(better.records)
    reference = CONDITIONS | {"acceptance_length": published, factor: statement}
    gap = explain_gap(reference, mine, [*others, better])
    assert [step.factor for step in gap.steps] == [factor]
    assert gap.steps[0].change.value == pytest.approx(published - acceptance_length(mine.records))
    assert gap.steps[0].change.low > 0
    assert gap.remainder.value == pytest.approx(0, abs=1e-12)
    assert not gap.not_evaluated and not gap.not_stated and adds_up(gap)


def test_planted_convention():
    mine = measured(records())
    for name in ("hass_eagle", "tau_micro_without_bonus", "sglang_request"):
        published = CONVENTIONS[name](mine.records)
        gap = explain_gap(CONDITIONS | {"acceptance_length": published, "convention": name}, mine)
        assert [step.factor for step in gap.steps] == ["convention"]
        assert gap.steps[0].change.value == pytest.approx(published - acceptance_length(mine.records))
        assert gap.remainder.value == pytest.approx(0, abs=1e-12) and adds_up(gap)


def test_planted_answer_length_is_cut_from_the_records():
    """Acceptance falls along the answer; the published answers are shorter."""
    long = [make_record(f"q{n}", accepted=[3] * 10 + [0] * 40, decoder="chain", settings={"depth": 3}, benchmark="a",
                        target="t/float32", rule="greedy", max_new_tokens=100) for n in range(4)]  # fmt: skip
    mine = measured(long)
    gap = explain_gap(CONDITIONS | {"acceptance_length": 4.0, "answer_length": 41}, mine)
    assert [step.factor for step in gap.steps] == ["answer_length"]
    assert gap.remainder.value == 0
    (cut, *_) = truncated(mine, 43).records  # 1 + 10 · 4 = 41 tokens, then one by one
    assert cut.accepted == [3] * 10 + [0, 0] and cut.num_tokens == 43


def test_planted_template_is_named_and_not_evaluated():
    mine = measured(records())
    gap = explain_gap(CONDITIONS | {"acceptance_length": 3.9, "template": "vicuna", "precision": "float16"}, mine)
    assert not gap.steps and gap.not_evaluated == ("template", "precision")
    assert gap.remainder.value == pytest.approx(3.9 - acceptance_length(mine.records))
    assert gap.remainder.low < gap.remainder.value < gap.remainder.high
    given = measured(records(seed=1, lowest=1), template="vicuna")
    gap = explain_gap(
        CONDITIONS | {"acceptance_length": 3.9, "template": "vicuna", "precision": "float16"}, mine, [given]
    )
    assert [step.factor for step in gap.steps] == ["template"] and gap.not_evaluated == ("precision",) and adds_up(gap)


def test_steps_follow_one_another_and_joint_changes_stay_joint():
    mine = measured(records())
    tree = {"decoder": "tree", "settings": {"num_nodes": 60}}
    first = measured(records(seed=1, lowest=1, **tree))
    second = measured(records(seed=2, lowest=2, **tree, benchmark="b"))
    reference = CONDITIONS | {"acceptance_length": 3.8, "tree": CHANGED["tree"][1], "prompts": "b"}
    gap = explain_gap(reference, mine, [second, first])
    assert [step.factor for step in gap.steps] == ["tree", "prompts"] and adds_up(gap)
    gap = explain_gap(reference, mine, [second])
    assert [step.factor for step in gap.steps] == ["tree + prompts"] and adds_up(gap)


def test_another_head_counts_only_for_its_training_rows():
    mine, other = measured(records()), records(seed=1, lowest=1, draft="big")
    reference = CONDITIONS | {"acceptance_length": 3.5, "training_rows": 68000}
    assert not explain_gap(reference, mine, [measured(other)]).steps
    gap = explain_gap(reference, mine, [measured(other, training_rows=68000)])
    assert [step.factor for step in gap.steps] == ["training_rows"] and adds_up(gap)


def test_what_is_not_stated_is_listed():
    mine = measured(records(), template=None)
    gap = explain_gap({"acceptance_length": 3.0, "prompts": "a", "template": "vicuna"}, mine)
    assert set(gap.not_stated) == set(FACTORS) - {"prompts"} and not gap.not_evaluated


def test_interval_against_the_formula_for_a_mean():
    """With answers of one cycle τ is a mean over questions, whose jackknife interval is Student's."""
    sides = ((0, 1, 2, 3), (3, 1, 3, 3))
    one, two = ([make_record(f"q{n}", accepted=[value]) for n, value in enumerate(side)] for side in sides)
    found = difference((one, acceptance_length), (two, acceptance_length))
    changes = [3, 0, 1, 0]
    assert found.value == pytest.approx(mean(changes))
    assert found.high - found.value == pytest.approx(3.182446 * stdev(changes) / 2, rel=1e-5)
    other = [replace(record, prompt_id=f"other {record.prompt_id}") for record in two]
    unpaired = difference((one, acceptance_length), (other, acceptance_length))
    spread = (stdev((0, 1, 2, 3)) ** 2 / 4 + stdev((3, 1, 3, 3)) ** 2 / 4) ** 0.5
    assert unpaired.high - unpaired.value == pytest.approx(3.182446 * spread, rel=1e-5)


def test_bad_references():
    mine = measured(records())
    with pytest.raises(ValueError, match="acceptance_length=None"):
        explain_gap({}, mine)
    with pytest.raises(ValueError, match="convention=paper must be one of tau_micro"):
        explain_gap({"acceptance_length": 3, "convention": "paper"}, mine)
    with pytest.raises(ValueError, match=r"reference\.colour is not a condition"):
        explain_gap({"acceptance_length": 3, "colour": 1}, mine)
    assert matches({"decoder": "chain", "depth": 3}, "chain") and not matches({"decoder": "chain"}, {"depth": 3})
