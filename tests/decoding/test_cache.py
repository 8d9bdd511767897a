"""The cache decoding writes in place: kept paths, ragged rows, rows that come and go."""

import torch
from decoding_toys import greedy_text, make_target

from hass_lightning.data.generate import Request, write_texts
from hass_lightning.target import KVCache


def filled(length=4, extra=5):
    cache = KVCache(2, 3, 2, 16, 4, torch.float64)
    written = torch.randn(2, 2, 3, 2, length + extra, 4, generator=torch.Generator().manual_seed(0)).double()
    for layer in range(2):
        cache.update(written[0, layer, ..., :length, :], written[1, layer, ..., :length, :], layer)
    cache.advance(length)
    for layer in range(2):
        cache.update(written[0, layer, ..., length:, :], written[1, layer, ..., length:, :], layer)
    return cache, written


def test_keep_gathers_the_path_in_order():
    cache, written = filled()
    cache.keep(torch.tensor([0, 2, 3]))
    expected = written[..., [0, 1, 2, 3, 4, 6, 7], :]
    assert cache.length == 7
    for layer in range(2):  # the layers' views see it, too
        assert torch.equal(cache.keys[layer][..., :7, :], expected[0, layer])
        assert torch.equal(cache.values[layer][..., :7, :], expected[1, layer])


def test_rows_leave_and_new_ones_take_slots():
    cache, written = filled()
    cache.select_rows(torch.tensor([2, 0]))
    assert torch.equal(cache.keys[1][..., :9, :], written[0, 1, [2, 0]])
    fresh, other = filled()
    cache.write_rows(torch.tensor([1]), _rows(fresh, [1]), 6)
    assert torch.equal(cache.values[0][1, :, :6], other[1, 0, 1, :, :6])
    assert torch.equal(cache.values[0][0, :, :9], written[1, 0, 2])


def _rows(cache, rows):
    cache.select_rows(torch.tensor(rows))
    return cache


def test_continuous_batching_still_writes_the_target_s_texts():
    target = make_target(vocab=13, dtype=torch.float64)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [12, 0, 3, 4]]
    requests = [Request(index, prompt, 0.0) for index, prompt in enumerate(prompts)]
    for request, tokens, _ in write_texts(target, requests, 12, seed=0, batch_size=2):
        assert tokens == greedy_text(target, request.prompt, 12)
