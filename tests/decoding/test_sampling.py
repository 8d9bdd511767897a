"""Processed distributions against transformers, and the two random functions against their probabilities."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hass_lightning.decoding import sampling as draws
from hass_lightning.types import Sampling


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.8])
@pytest.mark.parametrize("top_k", [None, 1, 4, 50])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_processors_match_transformers(temperature, top_k, top_p):
    logits = torch.randn(6, 23, generator=torch.Generator().manual_seed(0)).double()
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = draws.probabilities(logits, Sampling(temperature, top_p, top_k))
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-12, rtol=0)


def test_top_k_with_ties_keeps_k_tokens():
    assert (draws.probabilities(torch.zeros(7), Sampling(1.0, top_k=3)) > 0).sum() == 3


def test_bf16_logits_are_processed_in_fp32():
    assert draws.probabilities(torch.zeros(3, dtype=torch.bfloat16), Sampling(1.0)).dtype == torch.float32


def test_categorical_frequencies_match_the_weights(monkeypatch):
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 4.0, 0.0])  # unnormalised, with zeros at both ends
    grid = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    monkeypatch.setattr(torch, "rand", lambda *_, **__: grid)
    drawn = draws.categorical(weights.expand(8000, -1), None)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 3000, 0, 1000, 4000, 0]


def test_categorical_stays_in_the_support_at_extreme_uniforms(monkeypatch):
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.1, 0.0]])
    for uniform, token in ((0.0, 1), (1 - 2**-53, 3)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=uniform, **__: torch.tensor([u], dtype=torch.float64))
        assert draws.categorical(weights, None).tolist() == [token]


def test_bernoulli_at_the_edges():
    thresholds = torch.tensor([0.0, 1.0]).expand(1000, 2)
    drawn = draws.bernoulli(thresholds, torch.Generator().manual_seed(0))
    assert not drawn[:, 0].any() and drawn[:, 1].all()


def test_best_returns_the_first_of_equals():
    logits = torch.zeros(3, 50_000, dtype=torch.bfloat16)
    logits[1, [7, 40_000]] = 1
    assert draws.best(logits).tolist() == [0, 7, 0]
