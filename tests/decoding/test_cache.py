"""The cache in decoding: kept paths, ragged batches, sequences that leave."""

import torch
from decoding_toys import greedy_text, make_target

from hass_lightning.data.continuous_batching import write_texts
from hass_lightning.data.generation_requests import Request
from hass_lightning.target_model import KVCache


def filled(length=4, extra=5):
    cache = KVCache(2, 3, 2, 16, 4, torch.float64)
    written = torch.randn(2, 2, 3, 2, length + extra, 4, generator=torch.Generator().manual_seed(0)).double()
    for layer in range(2):
        cache.update(written[0, layer, ..., :length, :], written[1, layer, ..., :length, :], layer)
    cache.advance(length)
    for layer in range(2):
        cache.update(written[0, layer, ..., length:, :], written[1, layer, ..., length:, :], layer)
    return cache, written


def test_keep_gathers_the_accepted_path_in_order():
    cache, written = filled()
    cache.keep(torch.tensor([0, 2, 3]))
    expected = written[..., [0, 1, 2, 3, 4, 6, 7], :]
    assert cache.length == 7
    for layer in range(2):  # the views of the layers change as well
        assert torch.equal(cache.keys[layer][..., :7, :], expected[0, layer])
        assert torch.equal(cache.values[layer][..., :7, :], expected[1, layer])


def test_sequences_leave_the_batch():
    cache, written = filled()
    cache.select_rows(torch.tensor([2, 0]))
    assert torch.equal(cache.keys[1][..., :9, :], written[0, 1, [2, 0]])


def test_continuous_batching_is_lossless():
    target = make_target(vocab=13, dtype=torch.float64)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [12, 0, 3, 4]]
    requests = [Request(index, prompt, 12) for index, prompt in enumerate(prompts)]
    texts = list(write_texts(target, requests, batch_size=2))
    assert len(texts) == len(prompts)
    for text in texts:
        assert text.token_ids == greedy_text(target, text.request.prompt, 12)
