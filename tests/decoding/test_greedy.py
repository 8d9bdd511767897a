"""Temperature 0: every decoder is lossless; stub heads give known accepted counts."""

import random

import pytest
import torch
from decoding_toys import (
    BigramDraft,
    KnowingDraft,
    OneHotVocabulary,
    bigram_table,
    greedy_text,
    make_draft,
    make_target,
)

from hass_lightning.decoding import (
    Autoregressive,
    Chain,
    DecodingModels,
    DraftModel,
    DynamicTree,
    Hybrid,
    PromptLookup,
    StaticTree,
)
from hass_lightning.types import Sampling

DECODERS = [
    Autoregressive(),
    PromptLookup(),
    PromptLookup(max_ngram=1, num_tokens=3),
    DraftModel(),
    DraftModel(depth=1),
    Chain(),
    Chain(depth=1),
    Chain(depth=5, proposals="deterministic"),
    StaticTree(),
    DynamicTree(),
    DynamicTree(num_nodes=2, depth=1, width=1),
    Hybrid(),
    Hybrid(num_nodes=2, depth=1, width=1, max_ngram=1),
    Hybrid(num_nodes=30, depth=2, width=5, max_ngram=6),
]
PROMPTS = [[3, 1, 4, 1, 5], [2], [7, 8, 9, 7, 8, 9, 7, 8]]


def name(decoder):
    return str(decoder)[:40]


@pytest.fixture(scope="module")
def models():
    target = make_target(vocab=11, dtype=torch.float64)
    return DecodingModels(target, make_draft(target), small=make_target(vocab=11, layers=1, dtype=torch.float64))


@pytest.fixture(scope="module")
def texts(models):
    return [greedy_text(models.target, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("decoder", DECODERS, ids=name)
def test_output_equals_autoregressive_decoding(decoder, models, texts):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        result = decoder.generate(models, prompt, 24)
        assert result.token_ids == text
        assert len(result.accepted) == len(result.drafted) == len(result.nodes) == len(result.proposals)
        # the prefill gives the first token; each cycle adds its accepted tokens and one more, truncated in the last
        added = sum(result.accepted) + len(result.accepted)
        assert added - result.accepted[-1] <= len(text) - 1 <= added
        assert set(result.seconds) == {"prefill", "draft", "verify", "bookkeeping"}


@pytest.mark.parametrize("seed", range(10))
def test_random_trees_and_pruned_vocabularies_are_lossless(seed, models, texts):
    rng = random.Random(seed)
    kept = torch.tensor(sorted(rng.sample(range(11), rng.randint(5, 11))))
    pruned = DecodingModels(models.target, models.draft, models.target.head.draft_vocabulary(kept))
    depth, width = rng.randint(1, 5), rng.randint(1, 5)
    num_nodes = rng.randint(2, 1 + width + (depth - 1) * width**2)
    paths = [[]]
    for _ in range(rng.randint(1, 12)):
        child = [*rng.choice(paths), rng.randrange(len(kept))]
        if child not in paths:
            paths.append(child)
    hybrid = Hybrid(num_nodes, depth, width, rng.randint(1, 4))
    for decoder in (DynamicTree(num_nodes, depth, width), StaticTree(paths[1:]), hybrid):
        for prompt, text in zip(PROMPTS, texts, strict=True):
            result = decoder.generate(pruned, prompt, 15)
            assert result.token_ids == text[:15], decoder
            assert set(result.nodes) == {len(paths) - 1 if isinstance(decoder, StaticTree) else num_nodes - 1}


def test_fp32(texts):
    target = make_target(vocab=31, seed=5)
    models = DecodingModels(target, make_draft(target), small=target)
    for decoder in DECODERS:
        assert decoder.generate(models, [3, 1, 4], 20).token_ids == greedy_text(target, [3, 1, 4], 20), decoder


def knowing(target, prompt, right, count=40):
    text = [*prompt, *greedy_text(target, prompt, count)]
    return DecodingModels(target, KnowingDraft(target, text, right), OneHotVocabulary(target.head.vocab_size))


@pytest.mark.parametrize("decoder", [Chain(depth=3), DynamicTree(4, 3, 1), StaticTree([[0], [0, 0], [0, 0, 0]])])
def test_accepted_counts_of_drafts_that_are_never_always_or_sometimes_right(decoder):
    target, prompt = make_target(vocab=31), [3, 1, 4, 1, 5]
    text = greedy_text(target, prompt, 17)

    never = decoder.generate(knowing(target, prompt, lambda _: False), prompt, 17)
    assert (never.token_ids, never.accepted) == (text, [0] * 16)

    always = decoder.generate(knowing(target, prompt, lambda _: True), prompt, 17)
    assert (always.token_ids, always.accepted) == (text, [3] * 4)
    assert always.drafted == [3] * 4 and always.nodes == [3] * 4

    # tokens 5, 6, … are new, 5 from the prefill; wrong at 8, 12, 16, …: 6 7 | 8, 9 10 11 | 12, …
    sometimes = decoder.generate(knowing(target, prompt, lambda at: at % 4 != 0), prompt, 17)
    assert (sometimes.token_ids, sometimes.accepted) == (text, [2, 3, 3, 3, 3][: len(sometimes.accepted)])
    assert len(sometimes.accepted) == 5


def test_accepted_count_of_the_last_cycle_is_not_truncated():
    target, prompt = make_target(vocab=31), [3, 1, 4, 1, 5]
    result = Chain(depth=3).generate(knowing(target, prompt, lambda _: True), prompt, 3)
    assert len(result.token_ids) == 3 and result.accepted == [3]


def test_tree_of_width_one_equals_the_chain(models):
    chain = Chain(depth=4, proposals="deterministic")
    for other in (DynamicTree(num_nodes=5, depth=4, width=1), StaticTree([[0] * depth for depth in range(1, 5)])):
        for sampling in (Sampling(), Sampling(1.0), Sampling(0.7, top_p=0.9)):
            results = [
                decoder.generate(models, PROMPTS[0], 20, sampling, torch.Generator().manual_seed(3))
                for decoder in (chain, other)
            ]
            assert results[0].token_ids == results[1].token_ids
            assert results[0].accepted == results[1].accepted
            assert results[0].proposals == results[1].proposals


def test_target_as_small_model_is_always_accepted():
    target = make_target(dtype=torch.float64)
    result = DraftModel(depth=4).generate(DecodingModels(target, small=target), [1, 2, 3], 26)
    assert result.accepted == [4] * 5
    sampled = DraftModel(depth=4).generate(
        DecodingModels(target, small=target), [1, 2, 3], 26, Sampling(1.0, top_k=5), torch.Generator().manual_seed(0)
    )
    assert sampled.accepted == [4] * 5  # p = q: min(1, p/q) = 1


def test_prompt_lookup_copies_the_continuation():
    target = make_target()
    prompt = [5, 6, 7, 8, 9, 5, 6]
    text = greedy_text(target, prompt, 1)
    result = PromptLookup(max_ngram=2, num_tokens=3).generate(DecodingModels(target), [*prompt, 20], 2)
    first = result.token_ids[0]
    known = [*prompt, 20, first]
    expected = []
    for n in (2, 1):
        starts = [at for at in range(len(known) - n) if known[at : at + n] == known[-n:]]
        if starts and not expected:
            expected = known[starts[-1] + n :][:3]
    assert result.proposals[0] == expected
    assert result.nodes[0] == len(expected) and text


def test_logit_gaps_of_greedy_decoding(models, texts):
    traced = DecodingModels(models.target, models.draft, trace=True)
    expected = []
    for length in range(len(texts[0])):
        ids = torch.tensor([PROMPTS[0] + texts[0][:length]])
        top = models.target.model(ids).logits[0, -1].topk(2).values
        expected.append(float(top[0] - top[1]))
    for decoder in (Autoregressive(), DynamicTree(), StaticTree()):
        gaps = decoder.generate(traced, PROMPTS[0], 24).logit_gaps
        assert gaps == pytest.approx(expected, abs=1e-6)
    assert not Autoregressive().generate(models, PROMPTS[0], 24).logit_gaps


BATCH = [[3, 1, 4, 1, 5], [2], [7, 8, 9, 10, 10, 9, 1, 2], [1, 1], [20, 3, 20]]


@pytest.fixture(scope="module")
def bigrams():
    target = make_target(vocab=23, seed=3, dtype=torch.float64, max_length=64)
    table = bigram_table(target, BATCH)
    return DecodingModels(target, BigramDraft(target, table), OneHotVocabulary(23))


@pytest.mark.parametrize("decoder", [Autoregressive(), Chain(1), Chain(3), Chain(5)], ids=name)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 30, 500])
def test_batch_decoding_equals_batch_size_one(decoder, max_new_tokens, bigrams):
    together = decoder.generate_batch(bigrams, BATCH, max_new_tokens)
    for prompt, result in zip(BATCH, together, strict=True):
        alone = decoder.generate(bigrams, prompt, max_new_tokens)
        assert result.token_ids == alone.token_ids
        assert result.accepted == alone.accepted
        assert result.proposals == alone.proposals
    if max_new_tokens == 500 and decoder == Chain(3):
        counts = {count for result in together for count in result.accepted}
        assert len(counts) > 1  # the batch is ragged
        lengths = [len(result.token_ids) for result in together]
        assert lengths == [64 - len(prompt) for prompt in BATCH]  # up to the target's context


def test_batch_with_a_real_head_in_fp32():
    target = make_target(vocab=13)
    models = DecodingModels(target, make_draft(target), target.head.draft_vocabulary(torch.arange(1, 12)))
    prompts = [[token % 13 for token in prompt] for prompt in BATCH]
    together = Chain(3).generate_batch(models, prompts, 40)
    assert [r.proposals for r in together] == [Chain(3).generate(models, p, 40).proposals for p in prompts]
    assert [r.token_ids for r in together] == [greedy_text(target, p, 40) for p in prompts]


def test_batch_stops_each_sequence_at_its_stop_token(bigrams):
    texts = [greedy_text(bigrams.target, prompt, 30) for prompt in BATCH]
    bigrams.target.eos_token_ids = frozenset({texts[0][7], texts[3][4]})
    try:
        for result, prompt in zip(Chain(3).generate_batch(bigrams, BATCH, 30), BATCH, strict=True):
            assert result.token_ids == Autoregressive().generate(bigrams, prompt, 30).token_ids
        assert len({len(r.token_ids) for r in Chain(3).generate_batch(bigrams, BATCH, 30)}) > 1
    finally:
        del bigrams.target.eos_token_ids
