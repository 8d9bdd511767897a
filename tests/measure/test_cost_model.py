"""The cost model recovers known costs, and the replay equals decoding, cycle by cycle."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from measure_toys import make_record

from hass_lightning.decoding import Autoregressive, DecodingModels, DynamicTree, Hybrid
from hass_lightning.decoding.drafting import HeadRows
from hass_lightning.draft import EagleDraft, draft_config
from hass_lightning.measure import cost_model, tree_replay, tuning
from hass_lightning.measure.cost_model import CostModel, CycleSeconds
from hass_lightning.measure.metrics import acceptance_length
from hass_lightning.measure.predictions import drafting_share, predicted_rows
from hass_lightning.types import DecodeResult, Sampling


def planted(tree):
    """Return the seconds of a machine: a level costs 2 ms + 0.1 ms per row, verification 10 ms + 0.2 ms per node."""
    num_nodes, depth, width = tree
    draft = 0.003 + (depth - 1) * (0.002 + 0.0001 * width)
    return CycleSeconds(draft, 0.010 + 0.0002 * num_nodes, 0.0005)


BASELINE = CycleSeconds(0.0, 0.0102, 0.0001)
TREES = cost_model.TIMED_TREES


@pytest.fixture(scope="module")
def cost():
    return CostModel.fit(BASELINE, {tree: planted(tree) for tree in TREES})


@pytest.mark.parametrize("tree", [(6, 3, 2), (24, 5, 6), (12, 1, 12), (100, 6, 10)])
def test_known_costs_are_recovered(cost, tree):
    seconds = planted(tree)
    assert cost.draft_cost(tree[1], tree[2]) == pytest.approx(seconds.draft, rel=0.02)
    assert cost.verify_cost(tree[0]) == pytest.approx(seconds.verify, rel=0.001)  # 100 nodes: extrapolated
    total = seconds.draft + seconds.verify + seconds.overhead
    assert cost.speedup(3.0, tree) == pytest.approx(3.0 * 0.0103 / total, rel=0.02)


def test_speedup_decreases_with_batch_size(cost):
    speedups = [cost.speedup(3.0, (16, 4, 4), batch_size) for batch_size in (1, 4, 16)]
    assert speedups == sorted(speedups, reverse=True)
    # at batch 4: a level drafts 16 rows and 64 nodes are verified; the baseline verifies 4 tokens
    expected = 3.0 * (0.0103 + 3 * 0.0002) / (0.003 + 3 * (0.002 + 0.0016) + 0.010 + 64 * 0.0002 + 0.0005)
    assert speedups[1] == pytest.approx(expected, rel=0.05)


def test_costs_are_never_negative_with_noise():
    rng = np.random.default_rng(0)
    noisy = {
        tree: CycleSeconds(*(np.array(list(vars(planted(tree)).values())) * rng.uniform(0.5, 2, 3))) for tree in TREES
    }
    cost = CostModel.fit(BASELINE, noisy)
    assert min(cost.draft) >= 0
    assert list(cost.verify_seconds) == sorted(cost.verify_seconds)
    with pytest.raises(ValueError, match="at least one"):
        CostModel.fit(BASELINE, {})


def test_seconds_of_a_cycle():
    result = DecodeResult([1, 2, 3], [0, 0], [1, 1], [1, 1], {"draft": 2.0, "verify": 4.0, "bookkeeping": 1.0})
    assert CycleSeconds.of(result) == CycleSeconds(1.0, 2.0, 0.5)
    with pytest.raises(ValueError, match="one token"):
        CycleSeconds.of(DecodeResult([1], [], [], [], {"prefill": 1.0}))


class TokenDraft(EagleDraft):
    """Drafts the token that most often followed the last token in a text, which is sometimes right."""

    def __init__(self, target, text):
        super().__init__(draft_config(target.config))
        self.embed_tokens, size = target.head.embed_tokens, target.head.vocab_size
        counts = torch.zeros(size, size)
        for first, second in pairwise(text):
            counts[first, second] += 1
        # the highest score of a token is that of its own row
        rows = target.head.lm_head / target.head.lm_head.norm(dim=1, keepdim=True)
        generator = torch.Generator().manual_seed(0)
        self.features = counts @ rows + 1.0 * torch.randn(rows.shape, generator=generator)

    def forward(self, embeddings, features, cache=None, positions=None, mask=None):
        return self.features[torch.cdist(embeddings, self.embed_tokens[None]).argmin(-1)]


@pytest.fixture(scope="module")
def answers(tiny):
    """Return models with a head that is sometimes right, and three greedy answers with their prompts."""
    prompts = [list(range(3, 3 + length)) for length in (5, 9, 14)]
    plain = DecodingModels(tiny)
    greedy = [Autoregressive().generate(plain, prompt, 60).token_ids for prompt in prompts]
    models = DecodingModels(tiny, TokenDraft(tiny, [token for answer in greedy for token in answer]).eval())
    return models, prompts, greedy


@pytest.fixture(scope="module")
def recorded(answers):
    models, prompts, greedy = answers
    return [tree_replay.record_trees(models, p, a, depth=4, width=6) for p, a in zip(prompts, greedy, strict=True)]


@pytest.mark.parametrize(
    "tree", [(125, 4, 6), (16, 4, 6), (6, 4, 6), (8, 2, 6), (5, 1, 6), (8, 3, 3), (4, 3, 1), (3, 2, 2)]
)
def test_a_replayed_tree_equals_the_decoded_one(answers, recorded, tree):
    models, prompts, greedy = answers
    num_nodes, depth, width = tree
    num_nodes = min(num_nodes, tuning.num_candidates(depth, width) + 1)
    compared = 0
    for prompt, answer, trees in zip(prompts, greedy, recorded, strict=True):
        decoded = DynamicTree(num_nodes, depth, width).generate(models, prompt, 60, Sampling())
        assert decoded.token_ids == answer
        accepted = (tree_replay.needed_nodes(trees, depth, width) <= num_nodes).sum(axis=1).tolist()
        replayed = [accepted[start] for start in tree_replay.walk(accepted)]
        # the last positions are not recorded, because the end of the answer would truncate the path
        assert decoded.accepted[: len(replayed)] == replayed
        compared += len(replayed)
    assert compared > 30


def test_the_head_of_the_test_is_sometimes_right(answers, recorded):
    tokens, forwards = tree_replay.replay(recorded, 16, 4, 6)
    assert 1.2 < tokens / forwards < 4.5


def test_larger_trees_accept_no_less_at_any_position(recorded):
    for trees in recorded:
        for small, large in (((4, 6), (4, 6)), ((3, 6), (4, 6)), ((4, 3), (4, 6))):
            a, b = tree_replay.needed_nodes(trees, *small), tree_replay.needed_nodes(trees, *large)
            assert ((a <= 8).sum(1) <= (b <= 30).sum(1)).all()
        with pytest.raises(ValueError, match="exceeds the recorded"):
            tree_replay.needed_nodes(trees, 5, 6)


def test_walk():
    assert tree_replay.walk([2, 9, 9, 0, 1, 9]) == [0, 3, 4]
    assert tree_replay.walk([]) == []


def test_the_fastest_tree_is_recommended(cost, recorded):
    grid = tuning.tree_grid(depth=4, width=6)
    assert (5, 4, 1) in grid and all(size <= tuning.num_candidates(d, w) + 1 for size, d, w in grid)
    predictions = tuning.predict(cost, recorded, grid)
    assert len(predictions) == len(grid)
    assert predictions[0].speedup == max(each.speedup for each in predictions)
    best = predictions[0]
    assert best.speedup == pytest.approx(cost.speedup(best.tau, (best.num_nodes, best.depth, best.width)))
    written = yaml.safe_load(best.decoding_yaml())
    assert written.pop("_target_") == "hass_lightning.decoding.DynamicTree"
    assert DynamicTree(**written) == DynamicTree(best.num_nodes, best.depth, best.width)
    # if drafting is free, the largest trees are fastest; if verification costs by the node, small ones are
    free = CostModel(0.01, (1, 100), (0.01, 0.01), (0.0, 0.0, 0.0, 0.0), 0.0)
    dear = CostModel(0.01, (1, 100), (0.01, 1.0), (0.0, 0.0, 0.0, 0.0), 0.0)
    assert tuning.predict(free, recorded, grid)[0].num_nodes > tuning.predict(dear, recorded, grid)[0].num_nodes
    with pytest.raises(ValueError, match="no position"):
        tuning.predict(cost, [], grid)


def test_rows_of_predicted_and_measured_speedup(cost, recorded):
    (row,) = tuning.compare_with_measured(cost, recorded, {(16, 4, 6): 2.0})
    assert row["measured_speedup"] == 2.0
    assert row["relative_error"] == pytest.approx(row["predicted_speedup"] / 2 - 1)


def test_cycles_are_timed_on_real_decoders(answers):
    models, prompts, _ = answers
    baseline, timed = cost_model.time_cycles(models, prompts, [(2, 1, 1), (6, 2, 3), (12, 3, 3)], max_new_tokens=12)
    assert baseline.verify > 0 and set(timed) == {(2, 1, 1), (6, 2, 3), (12, 3, 3)}
    cost = CostModel.fit(baseline, timed)
    assert all(cost.cycle_cost(tree) > 0 for tree in timed)
    with pytest.raises(ValueError, match="there are none"):
        cost_model.time_cycles(models, [])


def test_tune_finds_a_tree(answers):
    models, prompts, _ = answers
    cost, recorded, predictions = tuning.tune(models, prompts, max_new_tokens=16, timed_prompts=1, depth=2, width=3)
    assert len(recorded) == 3
    assert {(each.num_nodes, each.depth, each.width) for each in predictions} == set(tuning.tree_grid(2, 3))
    assert predictions[0].speedup == pytest.approx(
        cost.speedup(predictions[0].tau, (predictions[0].num_nodes, predictions[0].depth, predictions[0].width))
    )


def test_cost_of_a_hybrid_counts_the_head_only_in_its_cycles(cost, answers, monkeypatch, tmp_path):
    models, prompts, greedy = answers
    decoder, reads, records = Hybrid(8, 3, 3), [], []
    accept = HeadRows.accept
    monkeypatch.setattr(HeadRows, "accept", lambda rows, *given: reads.append(1) or accept(rows, *given))
    for number, (prompt, answer) in enumerate(zip(prompts, greedy, strict=True)):
        result = decoder.generate(models, prompt, 60)
        assert result.token_ids == answer
        trace = {key: getattr(result, key) for key in ("accepted", "drafted", "nodes")}
        records.append(make_record(str(number), decoder="hybrid", seconds={"verify": 1.0}, **trace))
        plain = {"draft": "", "decoder": "autoregressive", "seconds": {"verify": 2.0}}
        records.append(make_record(str(number), accepted=[0] * 59, drafted=[0] * 59, nodes=[0] * 59, **plain))
    ours = [record for record in records if record.decoder == "hybrid"]
    share = drafting_share(decoder, ours)
    assert share == len(reads) / sum(len(record.accepted) for record in ours)
    assert 0 < share < 1 and drafting_share(DynamicTree(8, 3, 3), ours) == 1
    path = tmp_path / "cost_model.json"
    path.write_text(json.dumps(vars(cost)))
    (row,) = predicted_rows(models, {"autoregressive": Autoregressive(), "hybrid": decoder}, prompts, records, path)
    cycle = share * cost.draft_cost(3, 3) + cost.verify_cost(8) + cost.overhead
    assert row["predicted_speedup"] == pytest.approx(acceptance_length(ours) * cost.baseline / cycle)
    assert row["predicted_speedup"] > cost.speedup(acceptance_length(ours), (8, 3, 3))
