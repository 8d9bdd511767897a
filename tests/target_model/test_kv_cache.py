"""KVCache: writing and keeping columns."""

import pytest
import torch

from hass_lightning.target_model import KVCache


def numbers(batch, count, start=0):
    """Return a tensor [B, 2, N, 3] of distinct values."""
    return torch.arange(start, start + batch * 2 * count * 3, dtype=torch.float32).reshape(batch, 2, count, 3)


@pytest.fixture
def cache():
    return KVCache(num_layers=2, batch_size=2, num_heads=2, capacity=8, head_dim=3, dtype=torch.float32)


def write(cache, count, start=0):
    keys, values = numbers(2, count, start), numbers(2, count, start + 1000)
    return keys, values, [cache.update(keys + layer, values + layer, layer) for layer in range(2)]


def test_update_writes_after_length_and_returns_all_columns(cache):
    keys, values, seen = write(cache, 3)
    for layer in range(2):
        assert torch.equal(seen[layer][0], keys + layer)
        assert torch.equal(seen[layer][1], values + layer)
    cache.advance(3)
    more, _, seen = write(cache, 2, 500)
    assert torch.equal(seen[0][0], torch.cat([keys, more], dim=2))
    assert cache.get_seq_length() == 3


def test_without_advance_the_next_update_overwrites(cache):
    write(cache, 3)
    keys, _, seen = write(cache, 2, 500)
    assert torch.equal(seen[0][0], keys)


def test_keep_moves_the_accepted_path_to_the_front(cache):
    first, _, _ = write(cache, 2)
    cache.advance(2)
    tree, values, _ = write(cache, 5, 300)
    cache.keep(torch.tensor([0, 2, 4]))
    assert cache.length == 5
    _, _, seen = write(cache, 1, 900)
    for layer in range(2):
        expected = torch.cat([first + layer, tree[:, :, [0, 2, 4]] + layer], dim=2)
        assert torch.equal(seen[layer][0][:, :, :5], expected)
        assert torch.equal(seen[layer][1][:, :, 2:5], values[:, :, [0, 2, 4]] + layer)


def test_keep_nothing_keeps_nothing(cache):
    write(cache, 3)
    cache.keep(torch.tensor([], dtype=torch.int64))
    assert cache.length == 0


def test_full_cache_raises_assertion_error(cache):
    write(cache, 8)
    cache.advance(8)
    with pytest.raises(AssertionError, match="cache of 8 tokens is full"):
        write(cache, 1)


def test_slots_give_each_sequence_its_columns(cache):
    write(cache, 8)
    before = cache.keys[0].clone()
    cache.slots, cache.read_length = torch.tensor([[1, 2], [4, 5]]), 6
    keys, values, seen = write(cache, 2, 700)
    assert seen[0][0].shape[2] == 6
    assert torch.equal(cache.keys[0][0, :, 1:3], keys[0])
    assert torch.equal(cache.keys[0][1, :, 4:6], keys[1])
    assert torch.equal(cache.values[0][1, :, 4:6], values[1])
    for row, columns in ((0, [0, 3, 4, 5, 6, 7]), (1, [0, 1, 2, 3, 6, 7])):
        assert torch.equal(cache.keys[0][row][:, columns], before[row][:, columns])


def test_select_rows(cache):
    write(cache, 8)
    kept = cache.keys[1][1].clone()
    cache.select_rows(torch.tensor([1]))
    assert cache.keys[1].shape[0] == 1
    assert torch.equal(cache.keys[1][0], kept)
    cache.keys[1].zero_()
    assert not cache.storage[0, 1].any()  # the layers are views of one tensor
