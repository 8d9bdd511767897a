"""End of answers for all decoders, and error messages for invalid settings and models."""

from dataclasses import replace

import pytest
import torch
from decoding_toys import greedy_text, make_draft, make_target

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

DECODERS = [
    Autoregressive(), PromptLookup(), DraftModel(depth=6), Chain(depth=6), StaticTree(), DynamicTree(30, 6, 5),
    Hybrid(30, 6, 5),
]  # fmt: skip
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def models():
    target = make_target(vocab=11, dtype=torch.float64, max_length=48)
    return DecodingModels(target, make_draft(target), small=target, trace=True)  # the small model is always accepted


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
class TestEveryDecoder:
    @pytest.mark.parametrize("end", [0, 1, 2, 3, 5, 8])
    def test_ends_at_the_first_stop_token(self, decoder, end, models, monkeypatch):
        text = greedy_text(models.target, PROMPT, 20)
        monkeypatch.setattr(models.target, "eos_token_ids", frozenset({text[end]}))
        expected = greedy_text(models.target, PROMPT, 20, models.target.eos_token_ids)
        result = decoder.generate(models, PROMPT, 20)
        assert result.token_ids == expected
        assert len(result.logit_gaps) == len(expected)

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
    def test_never_exceeds_max_new_tokens(self, decoder, max_new_tokens, models):
        result = decoder.generate(models, PROMPT, max_new_tokens)
        assert result.token_ids == greedy_text(models.target, PROMPT, max_new_tokens)
        assert len(result.logit_gaps) == max_new_tokens
        if max_new_tokens == 1:
            assert result.accepted == []  # the only token comes from the prefill

    def test_stops_at_the_end_of_the_context(self, decoder, models):
        for length in (5, 40, 47):
            prompt = (PROMPT * 10)[:length]
            assert decoder.generate(models, prompt, 1000).token_ids == greedy_text(models.target, prompt, 48 - length)

    def test_refuses_invalid_prompts_and_limits(self, decoder, models):
        with pytest.raises(ValueError, match="empty"):
            decoder.generate(models, [], 5)
        with pytest.raises(ValueError, match="48 in total"):
            decoder.generate(models, [1] * 48, 5)
        with pytest.raises(ValueError, match="max_new_tokens=0"):
            decoder.generate(models, PROMPT, 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PromptLookup(max_ngram=0), r"decoding\.max_ngram=0"),
        (lambda: PromptLookup(num_tokens=0), r"decoding\.num_tokens=0"),
        (lambda: DraftModel(depth=0), r"decoding\.depth=0"),
        (lambda: Chain(depth=0), r"decoding\.depth=0"),
        (lambda: Chain(proposals="greedy"), r"decoding\.proposals=greedy"),
        (lambda: StaticTree([]), r"decoding\.paths is empty"),
        (lambda: StaticTree([[0], []]), r"decoding\.paths has \[\]"),
        (lambda: StaticTree([[0], [-1]]), r"decoding\.paths has \[-1\]"),
        (lambda: StaticTree([[0], [0]]), r"decoding\.paths names a node twice"),
        (lambda: StaticTree([[0], [1, 0]]), r"\[1, 0\] but not its parent \[1\]"),
        (lambda: DynamicTree(num_nodes=1), r"decoding\.num_nodes=1"),
        (lambda: DynamicTree(depth=0), r"decoding\.depth=0"),
        (lambda: DynamicTree(width=0), r"decoding\.width=0"),
        (lambda: DynamicTree(num_nodes=12, depth=2, width=2), r"decoding\.num_nodes=12 .* lower it to 7"),
        (lambda: Hybrid(num_nodes=12, depth=2, width=2), r"decoding\.num_nodes=12 .* lower it to 7"),
        (lambda: Hybrid(max_ngram=0), r"decoding\.max_ngram=0"),
    ],
)
def test_invalid_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_models_that_do_not_fit_are_refused(models):
    bare = replace(models, draft=None, small=None)
    for decoder, message in (
        (DynamicTree(), "decoding=dynamic_tree needs a trained"),
        (DraftModel(), "small causal LM"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.generate(bare, PROMPT, 5)
    with pytest.raises(ValueError, match="same vocabulary"):
        DraftModel().generate(replace(models, small=make_target(vocab=13)), PROMPT, 5)
    with pytest.raises(ValueError, match="hidden size 64"):
        Chain().generate(replace(models, draft=make_draft(make_target(hidden=64))), PROMPT, 5)
    with pytest.raises(ValueError, match=r"float32.*float64.*cast the head"):
        Chain().generate(replace(models, draft=make_draft(make_target())), PROMPT, 5)
    narrow = models.target.head.draft_vocabulary(torch.arange(3))
    with pytest.raises(ValueError, match="needs 4 draft tokens per node, but the draft vocabulary has 3"):
        DynamicTree().generate(replace(models, vocabulary=narrow), PROMPT, 5)
    with pytest.raises(ValueError, match="no prompts"):
        Chain().generate_batch(models, [], 5)


def test_paths_may_be_any_sequences():
    assert StaticTree([[0], (0, 1)]).paths == ((0,), (0, 1))
    assert hash(StaticTree([[0]])) == hash(StaticTree(((0,),)))
