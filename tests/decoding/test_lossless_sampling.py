"""Temperature > 0, whole answers: the distribution over texts of every decoder equals the target's.

Once exactly, by walking through all outcomes of the random events; once as sampled, over many seeds.
"""

from functools import cache

import pytest
import torch
from decoding_toys import Enumerator, make_draft, make_target, total_variation
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

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
from hass_lightning.decoding import verify as rules
from hass_lightning.types import Sampling

PROMPT = [1, 2, 3, 2, 0, 1]
DECODERS = [
    Autoregressive(),
    PromptLookup(max_ngram=1, num_tokens=2),
    DraftModel(depth=2),
    Chain(depth=2),
    Chain(depth=2, proposals="deterministic"),
    StaticTree([[0], [1], [0, 0]]),
    DynamicTree(num_nodes=4, depth=2, width=2),
    Hybrid(num_nodes=4, depth=2, width=2, max_ngram=2),
]


SAMPLINGS = [(Sampling(1.0), 2), (Sampling(1.5, top_p=0.9, top_k=2), 3)]


@cache
def toy():
    target = make_target(4, layers=1, hidden=16, dtype=torch.float64, seed=2, sharp=6.0)
    small = make_target(4, layers=1, hidden=16, dtype=torch.float64, seed=8, sharp=6.0)
    kept = torch.tensor([0, 1, 3])  # the draft head cannot propose token 2
    return DecodingModels(target, make_draft(target), target.head.draft_vocabulary(kept), small)


@cache
def analytic(sampling, length):
    """Return {text: probability}, computed from the model's logits and the processors of transformers."""

    def grow(text, weight):
        if len(text) == length:
            return {text: weight}
        scores = toy().target.model(torch.tensor([[*PROMPT, *text]])).logits[:, -1]
        scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
        if sampling.top_k is not None:
            scores = TopKLogitsWarper(sampling.top_k)(None, scores)
        if sampling.top_p < 1:
            scores = TopPLogitsWarper(sampling.top_p)(None, scores)
        found = {}
        for token, p in enumerate(scores.softmax(-1)[0].tolist()):
            if p > 0:
                found |= grow((*text, token), weight * p)
        return found

    return grow((), 1.0)


@pytest.mark.parametrize(("sampling", "length"), SAMPLINGS, ids=["plain", "processed"])
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: f"{decoder.name}-{decoder.acceptance}")
def test_exact_distribution_of_texts(decoder, sampling, length, monkeypatch):
    enumerator = Enumerator(monkeypatch)
    found = enumerator.distribution(lambda: tuple(decoder.generate(toy(), PROMPT, length, sampling).token_ids))
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert total_variation(found, analytic(sampling, length)) < 1e-9


def test_planted_fault_is_caught(monkeypatch):
    """The test above fails if the rejected token stays in the residual."""
    monkeypatch.setattr(rules, "residual", lambda tree, p, last: p[last][0])
    decoder, (sampling, length) = Chain(depth=1), SAMPLINGS[0]
    found = Enumerator(monkeypatch).distribution(
        lambda: tuple(decoder.generate(toy(), PROMPT, length, sampling).token_ids)
    )
    assert total_variation(found, analytic(sampling, length)) > 1e-3


@pytest.mark.parametrize(
    "decoder",
    [Chain(depth=2), DynamicTree(num_nodes=6, depth=2, width=3), Hybrid(6, 2, 3)],
    ids=["chain", "tree", "hybrid"],
)
def test_sampled_texts_pass_chi_square_over_seeds(decoder):
    """20 seeds of 24 texts: each seed gives one p-value of a chi-square test, and these must be uniform."""
    sampling, length, count = Sampling(1.0), 2, 24
    expected = analytic(sampling, length)
    # rare texts share one cell, so that the expected count of each cell is large enough
    common = sorted(expected, key=expected.get)[-6:]
    masses = [expected[text] for text in common]
    masses.append(1 - sum(masses))
    assert min(masses) * count > 0.5
    p_values, total = [], [0] * len(masses)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        counts = [0] * len(masses)
        for _ in range(count):
            text = tuple(decoder.generate(toy(), PROMPT, length, sampling, generator).token_ids)
            counts[common.index(text) if text in common else -1] += 1
        p_values.append(stats.chisquare(counts, [count * p for p in masses]).pvalue)
        total = [a + b for a, b in zip(total, counts, strict=True)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert stats.chisquare(total, [20 * count * p for p in masses]).pvalue > 1e-3


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: f"{decoder.name}-{decoder.acceptance}")
def test_generator_is_the_only_source_of_randomness(decoder):
    texts, _ = [], toy()  # built once, which uses the global generator
    for seed in (1, 1, 2):
        torch.manual_seed(len(texts))  # the global generator must not matter
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        texts.append(decoder.generate(toy(), PROMPT, 20, Sampling(1.0), generator).token_ids)
        assert torch.equal(state, torch.get_rng_state())
    assert texts[0] == texts[1] != texts[2]


def test_processors_apply_to_every_token():
    """Top-k 1 is greedy at any temperature, which shows that every token is processed."""
    for decoder in DECODERS:
        greedy = decoder.generate(toy(), PROMPT, 30)
        sampled = decoder.generate(toy(), PROMPT, 30, Sampling(5.0, top_k=1), torch.Generator().manual_seed(0))
        assert sampled.token_ids == greedy.token_ids
