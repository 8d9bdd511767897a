"""Every decoder with an EAGLE-3 head: lossless, drafting as it was trained, and beside an EAGLE head."""

import pytest
import torch
from decoding_toys import greedy_text, make_draft, make_eagle3, make_target

from hass_lightning.decoding import Autoregressive, Chain, DecodingModels, DynamicTree, Hybrid, StaticTree
from hass_lightning.decoding.batch import decode_batch
from hass_lightning.decoding.drafting import HeadRows
from hass_lightning.draft import Alignment, unroll
from hass_lightning.draft.checkpoint import SavedDraft
from hass_lightning.measure.tree_replay import record_trees, replay
from hass_lightning.types import Sampling

PROMPTS = [[3, 1, 4, 1, 5], [2], [6, 5, 4, 6, 5, 4, 6, 5]]
DECODERS = [Chain(depth=4), StaticTree(), DynamicTree(12, 4, 3), Hybrid(12, 4, 3)]


@pytest.fixture(scope="module", params=[None, [0, 2, 3, 4, 5, 6]], ids=["full vocabulary", "pruned"])
def models(request):
    target = make_target(vocab=7, dtype=torch.float64, seed=4)
    token_ids = None if request.param is None else torch.tensor(request.param)
    draft = make_eagle3(target, seed=6, vocab_size=None if token_ids is None else len(token_ids))
    saved = SavedDraft(draft, token_ids, {})
    head = saved.for_decoding(target.dtype, "cpu")
    return DecodingModels(target, head, target.head.draft_vocabulary(token_ids))


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: d.name)
def test_greedy_decoding_is_lossless(models, decoder):
    results = [decoder.generate(models, prompt, 20) for prompt in PROMPTS]
    assert [result.token_ids for result in results] == [greedy_text(models.target, prompt, 20) for prompt in PROMPTS]
    assert sum(sum(result.accepted) for result in results) > 0


def test_batches_decode_the_same(models):
    results = decode_batch(models, PROMPTS, 20, 3)
    alone = [Chain(depth=3).generate(models, prompt, 20) for prompt in PROMPTS]
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]
    assert [r.accepted[:3] for r in results] == [r.accepted[:3] for r in alone]


def test_sampled_chains_draft_from_the_heads_own_distribution(models):
    generator = torch.Generator().manual_seed(0)
    result = Chain(depth=3).generate(models, PROMPTS[0], 20, Sampling(1.0), generator)
    assert sum(result.accepted) > 0


def test_drafting_matches_the_alignment_steps(models, monkeypatch):
    """Each drafted row of a chain equals f^j of `unroll` with target features to the root, for seven steps."""
    seen, accept, draft_rows = [], HeadRows.accept, HeadRows.draft_rows

    def recorded_accept(rows, token_ids, features):
        known = [*(seen[-1]["known"] if seen else [PROMPTS[0][0]]), *token_ids]
        output = accept(rows, token_ids, features)
        seen.append({"known": known, "drafted": [], "outputs": [output[0]]})
        return output

    def recorded_rows(rows, token_ids, features, mask, level):
        output = draft_rows(rows, token_ids, features, mask, level)
        seen[-1]["drafted"].append(int(token_ids[0]))
        seen[-1]["outputs"].append(output[0])
        return output

    monkeypatch.setattr(HeadRows, "accept", recorded_accept)
    monkeypatch.setattr(HeadRows, "draft_rows", recorded_rows)
    Chain(depth=7).generate(models, PROMPTS[0], 14)
    embed, draft = models.target.head.embed, models.draft
    for cycle in seen:
        tokens = torch.tensor([[*cycle["known"], *cycle["drafted"]]])
        features = models.target.encode(tokens)[:, :-1].clone()
        count = len(cycle["known"]) - 1
        features[:, count:] = 7.0  # unknown when they are drafted, so that nothing may depend on them
        steps = unroll(draft, embed(tokens[:, 1:]), features, Alignment(7))
        for number, (aligned, output) in enumerate(zip(steps, cycle["outputs"], strict=True)):
            torch.testing.assert_close(output, aligned[0, count - 1 + number].detach(), atol=1e-10, rtol=0)


def test_replay_of_recorded_trees_equals_decoding(models):
    decoder = DynamicTree(9, 3, 2)
    results = [decoder.generate(models, prompt, 30) for prompt in PROMPTS]
    recorded = [record_trees(models, p, r.token_ids, 3, 2) for p, r in zip(PROMPTS, results, strict=True)]
    tokens, forwards = replay(recorded, 9, 3, 2)
    accepted = [count for result in results for count in result.accepted[:-3]]  # a replay ends before the last cycles
    assert tokens / forwards == pytest.approx((sum(accepted) + len(accepted)) / len(accepted), rel=0.2)


def test_the_baseline_reads_no_layers(models, monkeypatch):
    """Nothing but the last hidden state is collected for autoregressive decoding, with whatever head it is measured."""
    widths, logits = [], type(models.target.head).logits

    def recorded(head, features):
        widths.append(features.shape[-1])
        return logits(head, features)

    monkeypatch.setattr(type(models.target.head), "logits", recorded)
    Autoregressive().generate(models, PROMPTS[0], 5)
    assert set(widths) == {models.target.hidden_size}
    Chain().generate(models, PROMPTS[0], 5)
    assert set(widths) == {models.target.hidden_size, 3 * models.target.hidden_size}


def test_each_head_gets_the_features_it_reads():
    target = make_target(vocab=7)
    one, two = DecodingModels(target, make_draft(target)), DecodingModels(target, make_eagle3(target))
    assert (one.target.feature_layers, two.target.feature_layers, target.feature_layers) == ((), (0, 1), ())
    wide, narrow = (models.target.encode(torch.tensor([PROMPTS[0]])) for models in (two, one))
    assert torch.equal(wide[..., -target.hidden_size :], narrow)
    assert torch.equal(wide[..., : target.hidden_size], target.head.embed(torch.tensor([PROMPTS[0]])))
    with pytest.raises(ValueError, match=r"layers \[2\] of target toy must ascend from 0 to 1"):
        target.reading([2])
