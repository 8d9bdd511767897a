"""Where τ comes from: every figure of the page against a slow or analytic form."""

import json
import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from measure_toys import make_record, question
from scipy import stats

from hass_lightning.decoding import Autoregressive, Chain, DecodingModels
from hass_lightning.draft import EagleDraft
from hass_lightning.measure.acceptance_factors import FACTORS, REPETITION, Cycle, cycles_of, groups_of, repetitions
from hass_lightning.measure.benchmark import run_benchmark
from hass_lightning.measure.calibration import auroc, auroc_interval, calibration_error, reliability
from hass_lightning.measure.draft_trace import entropies, trace_drafts
from hass_lightning.measure.explain import explain
from hass_lightning.measure.metrics import acceptance_length
from hass_lightning.measure.statistics import ratio_interval
from hass_lightning.report.explain import explain_report, factor_figure


@pytest.fixture(scope="module")
def models(tiny):
    torch.manual_seed(3)
    draft = EagleDraft.from_target(tiny.config).eval().requires_grad_(False)
    return DecodingModels(tiny, draft, tiny.head.draft_vocabulary())


def random_cycles(seed=0, count=400):
    rng = random.Random(seed)
    return [
        Cycle(
            ("b", str(rng.randrange(12))), rng.choice("xyz"), rng.randint(1, 5), rng.randint(1, 200),
            rng.randint(20, 900), rng.choice(REPETITION), rng.expovariate(1),
        )
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("factor", FACTORS)
def test_groups_equal_a_loop_over_cycles(factor):
    cycles = random_cycles()
    groups = groups_of(cycles, factor)
    assert sum(group.num_cycles for group in groups) == len(cycles)
    sums = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for cycle in cycles:
        place = sums[FACTORS[factor](cycle)[1]][cycle.question]
        place[0] += cycle.num_tokens
        place[1] += 1
    for group in groups:
        counted = sums.pop(group.label)
        tokens, counts = ([pair[k] for pair in counted.values()] for k in (0, 1))
        assert group.acceptance_length.value == pytest.approx(sum(tokens) / sum(counts))
        assert (group.num_cycles, group.num_questions) == (sum(counts), len(counted))
    assert not sums


def test_interval_of_a_group_is_that_of_its_ratio_over_its_questions():
    cycles = random_cycles(1)
    for group in groups_of(cycles, "category"):
        kept = [cycle for cycle in cycles if cycle.category == group.label]
        order = list(dict.fromkeys(cycle.question for cycle in kept))
        tokens = [sum(c.num_tokens for c in kept if c.question == q) for q in order]
        counts = [sum(c.question == q for c in kept) for q in order]
        assert group.acceptance_length == ratio_interval(tokens, counts)


def test_interval_of_a_group_of_few_of_the_questions_is_finite():
    """Resamples of all questions would often have no cycle of the group."""
    cycles = [Cycle(("b", str(n)), "rare" if n < 3 else "common", 2 + n % 2 + k % 2, 1, 1, REPETITION[0], 0.0)
              for n in range(20) for k in range(5)]  # fmt: skip
    for group in groups_of(cycles, "category"):
        assert 1 < group.acceptance_length.low < group.acceptance_length.value < group.acceptance_length.high < 6


def test_planted_cause_is_found():
    """Cycles of high entropy accept two tokens less; position is unrelated to it."""
    rng = random.Random(0)
    cycles = []
    for cycle in random_cycles(2, 2000):
        entropy = rng.choice((0.01, 3.0))
        tokens = rng.randint(3, 5) if entropy < 1 else rng.randint(1, 3)
        cycles.append(Cycle(cycle.question, "", tokens, cycle.position, cycle.context, REPETITION[0], entropy))
    low, high = groups_of(cycles, "entropy")
    assert low.acceptance_length.low > high.acceptance_length.high
    values = [group.acceptance_length for group in groups_of(cycles, "position")]
    assert max(each.low for each in values) < min(each.high for each in values)


def test_labels_of_positions_and_entropies():
    def label(factor, **values):
        fields = {"position": 1, "context": 1, "entropy": 0.0} | values
        return FACTORS[factor](Cycle(("b", "1"), "", 1, repetition=REPETITION[0], **fields))[1]

    assert [label("position", position=n) for n in (1, 16, 17, 32, 33, 64)] == [
        "1–16", "1–16", "17–32", "17–32", "33–64", "33–64",
    ]  # fmt: skip
    assert [label("entropy", entropy=h) for h in (0.0, 0.05, 0.6, 9.0)] == ["0–0.05", "0.05–0.25", "0.5–1", "≥ 2"]


def test_cycles_start_after_the_tokens_of_those_before():
    record = make_record("1", accepted=[2, 0, 1], category="math", num_prompt_tokens=10)
    found = cycles_of(record, [REPETITION[0]] * 7, [float(n) for n in range(7)])
    assert [(c.position, c.context, c.num_tokens, c.entropy) for c in found] == [
        (1, 11, 3, 1.0), (4, 14, 1, 4.0), (5, 15, 2, 5.0),
    ]  # fmt: skip
    assert {c.category for c in found} == {"math"}


@pytest.mark.parametrize("length", [1, 2, 3])
def test_repetitions_equal_a_search_of_the_text(length):
    rng = random.Random(length)
    prompt, answer = ([rng.randrange(3) for _ in range(n)] for n in (12, 60))
    slow = []
    for place, token in enumerate(answer):
        text = [*prompt, *answer[:place]]
        starts = [s for s in range(len(text) - length) if text[s : s + length] == text[-length:]]
        slow.append(REPETITION[0] if not starts else REPETITION[2 if text[starts[-1] + length] == token else 1])
    assert repetitions(prompt, answer, length) == slow
    assert set(slow) >= set(REPETITION[1:])


def test_auroc_equals_the_count_of_pairs():
    rng = np.random.default_rng(0)
    confidence, correct = rng.integers(0, 20, 200) / 20, rng.random(200) < 0.6  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a in confidence[correct] for b in confidence[~correct]]
    assert auroc(confidence, correct) == pytest.approx(np.mean(pairs))
    assert auroc([0.2, 0.9], [False, True]) == 1 and auroc([0.5, 0.5], [False, True]) == 0.5
    assert np.isnan(auroc([0.3], [True]))
    interval = auroc_interval(confidence, correct, rng.integers(0, 10, 200).tolist())
    assert interval.value == auroc(confidence, correct) and interval.low < interval.value < interval.high


def test_auroc_interval_of_independent_tokens_is_that_of_hanley_and_mcneil():
    """Each token its own question: the standard error of normal scores is known in closed form."""
    rng = np.random.default_rng(1)
    correct = np.arange(300) % 2 == 0
    confidence = stats.norm.cdf(rng.normal(correct * 1.0))
    interval = auroc_interval(confidence, correct, range(300))
    a = interval.value
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    error = np.sqrt((a * (1 - a) + 149 * (q1 - a**2) + 149 * (q2 - a**2)) / 150**2)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_calibration_error_in_closed_form():
    assert calibration_error([0.9] * 10, [True] * 5 + [False] * 5) == pytest.approx(0.4)
    confidence = np.repeat([0.25, 0.75], 40)
    correct = np.concatenate([np.arange(40) < 10, np.arange(40) < 30])
    assert calibration_error(confidence, correct) == pytest.approx(0)  # calibrated
    correct[:40] = False
    assert calibration_error(confidence, correct) == pytest.approx(0.25 / 2)
    assert calibration_error([1.0, 0.0], [True, False]) == 0  # the last bin includes 1


def test_reliability_equals_a_loop_over_tokens():
    rng = np.random.default_rng(2)
    confidence = rng.random(500)
    correct, questions = rng.random(500) < confidence, rng.integers(0, 15, 500).tolist()
    bins = reliability(confidence, correct, questions)
    assert sum(each.num_tokens for each in bins) == 500
    for each in bins:
        kept = [n for n in range(500) if each.low <= confidence[n] < each.high]
        assert each.num_tokens == len(kept)
        assert each.confidence == pytest.approx(np.mean(confidence[kept]))
        assert each.accuracy.value == pytest.approx(np.mean(correct[kept]))
        assert each.accuracy.low <= each.accuracy.value <= each.accuracy.high
    error = sum(each.num_tokens * abs(each.accuracy.value - each.confidence) for each in bins) / 500
    assert calibration_error(confidence, correct) == pytest.approx(error)


def test_entropies_equal_scipy(tiny, models):
    features = tiny.encode(torch.tensor([[1, 2, 3, 4, 5]]))[0]
    probs = tiny.head.logits(features).double().softmax(-1).numpy()
    assert entropies(models, features).tolist() == pytest.approx(stats.entropy(probs, axis=-1).tolist(), rel=1e-4)


def test_trace_equals_drafting_one_token_at_a_time(tiny, models):
    """The slow form runs the head on each prefix with the predicted features put in place of the target's."""
    prompt, answer, depth = [5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16], 3
    tokens = torch.tensor([*prompt, *answer])
    features = tiny.encode(tokens[None])[0]
    answer[2:5] = _greedy(models, tokens, features, 5)  # so that some drafts reach depth 2
    tokens = torch.tensor([*prompt, *answer])
    features = tiny.encode(tokens[None])[0]
    traces = trace_drafts(models, prompt, answer, features, depth)
    attention = models.draft.layer.self_attn
    for start in range(len(prompt) - 1, len(tokens) - 2):
        mixed, reached = features.clone(), True
        for step in range(min(depth, len(tokens) - 2 - start)):
            row = start + step
            embeddings = tiny.head.embed(tokens[1 : row + 2])[None]
            own = models.draft(embeddings, mixed[None, : row + 1])[0, -1]
            u, _ = models.draft.inputs(embeddings, mixed[None, : row + 1])
            rotary = models.draft.rotary(torch.arange(row + 1)[None])
            queries, (keys, _) = attention.queries(u, rotary), attention.keys_values(u, rotary)
            keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
            weights = (queries[0, :, -1:] @ keys[0].transpose(-1, -2) / keys.shape[-1] ** 0.5).softmax(-1)
            probs = models.draft_vocabulary.logits(own).softmax(-1)
            found, place = traces[step], start - (len(prompt) - 1)
            wanted = features[row + 1]
            assert float(found.norm[place]) == pytest.approx(float(own.norm() / wanted.norm()), rel=1e-4)
            cosine = float(own @ wanted / own.norm() / wanted.norm())
            assert float(found.cosine[place]) == pytest.approx(cosine, abs=1e-5)
            share = float(weights[:, 0, row + 1 - step :].sum(-1).mean())
            assert float(found.own[place]) == pytest.approx(share, abs=1e-5)
            assert float(found.confidence[place]) == pytest.approx(float(probs.max()), rel=1e-4)
            assert bool(found.hit[place]) == (int(probs.argmax()) == int(tokens[row + 2]))
            assert bool(found.reached[place]) == reached
            reached = reached and bool(found.hit[place])
            mixed[row + 1] = own
    assert sum(bool(trace.reached.any()) for trace in traces) > 1


def _greedy(models, tokens, features, start):
    """The three tokens that the head drafts from a row, each read as if it were the answer's."""
    drafted, mixed = [], features.clone()
    for row in range(start - 1, start + 2):
        read = torch.cat([tokens[1 : start + 1], torch.tensor(drafted, dtype=torch.int64)])[: row + 1]
        own = models.draft(models.target.head.embed(read)[None], mixed[None, : row + 1])[0, -1]
        drafted.append(int(models.draft_vocabulary.logits(own).argmax()))
        mixed[row + 1] = own
    return drafted


@pytest.fixture(scope="module")
def measured(models):
    prompts = [question(n, f"count to {n}", *(["go on"] if n % 2 else []), category=f"c{n % 2}") for n in range(6)]
    decoders = {"autoregressive": Autoregressive(), "chain": Chain(depth=3)}
    return prompts, run_benchmark({"h": models}, decoders, prompts, max_new_tokens=24, benchmark="b", replay=True)


def test_explanation_covers_every_cycle_of_the_records(models, measured):
    prompts, records = measured
    (found,) = explain({"h": models}, {"b": prompts}, records)
    chain = [record for record in records if record.decoder == "chain"]
    assert found.acceptance_length.value == acceptance_length(chain)
    for groups in found.factors.values():
        assert sum(group.num_cycles for group in groups) == sum(len(record.accepted) for record in chain)
    starts = sum(len(record.token_ids) - 1 for record in chain)
    assert found.drift[0].num_positions == found.calibration[1].num_tokens == starts
    assert found.drift[0].own.value == 0
    total = found.calibration[0]
    assert total.num_tokens == sum(each.num_tokens for each in found.calibration[1:])
    assert {group.label for group in found.factors["category"]} == {"c0", "c1"}


def test_page_and_file(models, measured, tmp_path):
    prompts, records = measured
    explanations = explain({"h": models}, {"b": prompts}, records)
    page = explain_report(tmp_path, explanations).read_text()
    assert "Where τ comes from" in page and page.count('class="figure"') >= 5
    (content,) = json.loads((tmp_path / "explain.json").read_text())
    assert content["factors"]["category"][0]["label"] == "c0"
    (bars,) = factor_figure(explanations, "position").data
    assert list(bars.y) == [group.acceptance_length.value for group in explanations[0].factors["position"]]


def test_errors(models, measured):
    prompts, records = measured
    with pytest.raises(ValueError, match="explain=true needs a head"):
        explain({"h": models}, {"b": prompts}, [record for record in records if not record.draft])
    changed = [question(prompt.id, "another question") for prompt in prompts]
    with pytest.raises(ValueError, match="another version"):
        explain({"h": models}, {"b": changed}, records)
