"""Feature shards: their content, when they are reused, and what happens if something fails."""

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import threading
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError

from hass_lightning.data import features as module
from hass_lightning.data import shards
from hass_lightning.data.features import bytes_per_token, extract_features, feature_key
from hass_lightning.types import Tokens

LENGTHS = [5, 17, 3, 30, 9, 9, 24]


def sequence(number, length):
    generator = torch.Generator().manual_seed(number)
    mask = torch.rand(length, generator=generator) < 0.5
    mask[0], mask[-1] = True, False
    return Tokens(f"s{number}", torch.randint(3, 200, (length,), generator=generator), mask)


@pytest.fixture
def tokens():
    return [sequence(number, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture
def extract(tiny, tokens, tmp_path):
    """Extraction in small shards to a folder of the test. Counts the shards that are computed."""

    def run(**options):
        return extract_features(tiny, tokens, tmp_path, **{"shard_size": 2, "batch_tokens": 40} | options)

    return run


@pytest.fixture
def computed(monkeypatch):
    """The sizes of the shards that were computed and not found."""
    sizes, original = [], module._extract_shard

    def counting(target, shard, *rest):
        sizes.append(len(shard))
        return original(target, shard, *rest)

    monkeypatch.setattr(module, "_extract_shard", counting)
    return sizes


def test_content_equals_each_sequence_encoded_alone(extract, tokens, tiny):
    store = extract()
    assert len(store) == len(tokens)
    assert store.ids == tuple(each.id for each in tokens)
    for index, each in enumerate(tokens):
        row = store.read(index)
        expected = tiny.encode(each.input_ids[None])[0]
        assert store.length(index) == len(each)
        assert torch.equal(row["input_ids"], each.input_ids)
        assert torch.equal(row["loss_mask"], each.loss_mask)
        torch.testing.assert_close(row["features"], expected, atol=1e-5, rtol=1e-5)


def test_target_ids_are_the_argmax_where_a_row_asks_and_minus_one_elsewhere(extract, tokens, tiny):
    store = extract()
    for index, each in enumerate(tokens):
        row = store.read(index)
        best = tiny.head.logits(row["features"]).argmax(-1)
        for t in range(len(each)):
            wanted = t > 0 and bool(each.loss_mask[t - 1])  # position t-1 is compared with feature t
            assert row["target_ids"][t] == (best[t] if wanted else -1)


@pytest.mark.parametrize(("shard_size", "batch_tokens"), [(1, 1), (3, 1000), (100, 30)])
def test_shards_and_batches_change_nothing(extract, tokens, shard_size, batch_tokens):
    first, second = extract(), extract(shard_size=shard_size, batch_tokens=batch_tokens)
    for index in range(len(tokens)):
        one, other = first.read(index), second.read(index)
        torch.testing.assert_close(one["features"], other["features"], atol=1e-5, rtol=1e-5)
        assert torch.equal(one["target_ids"], other["target_ids"])
        assert torch.equal(other["input_ids"], tokens[index].input_ids)


def test_it_is_not_computed_twice(extract, computed):
    first = extract()
    assert computed == [2, 2, 2, 1]
    assert extract() == first
    assert computed == [2, 2, 2, 1]


def test_the_key_follows_target_tokens_masks_and_order(tiny, tokens):
    key = feature_key(tiny, tokens, 2)
    assert key == feature_key(tiny, [sequence(number, length) for number, length in enumerate(LENGTHS)], 2)
    other_mask = Tokens(tokens[0].id, tokens[0].input_ids, ~tokens[0].loss_mask)
    other_ids = Tokens(tokens[0].id, tokens[0].input_ids + 1, tokens[0].loss_mask)
    keys = {
        key,
        feature_key(tiny, [other_mask, *tokens[1:]], 2),
        feature_key(tiny, [other_ids, *tokens[1:]], 2),
        feature_key(tiny, tokens[:-1], 2),
        feature_key(tiny, tokens[::-1], 2),
        feature_key(tiny, tokens, 3),
        feature_key(tiny.in_dtype(torch.bfloat16), tokens, 2),
    }
    assert len(keys) == 7
    changed = tiny.in_dtype(torch.float32)
    changed.weights_fingerprint = "another target"
    assert feature_key(changed, tokens, 2) not in keys


def damage_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "one byte changed": damage_bytes,
    "note missing": lambda path: path.with_suffix(".json").unlink(),
    "note cut": lambda path: path.with_suffix(".json").write_text('{"sha'),
    "note empty": lambda path: path.with_suffix(".json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_only_the_damaged_shard_is_made_again_and_named(extract, computed, caplog, damage):
    before = extract()
    rows = [before.read(index)["features"].clone() for index in range(len(before))]
    shards.open_shard.cache_clear()  # a mapped file that shrinks would end this process
    path = before.folder / "shard-00003.safetensors"
    good = path.read_bytes()
    DAMAGES[damage](path)
    computed.clear()
    with caplog.at_level(logging.WARNING):
        after = extract()
    assert computed == [1]
    assert path.read_bytes() == good
    named = [message for message in caplog.messages if "shard-00003" in message]
    assert bool(named) == ("missing" not in damage)
    for index, row in enumerate(rows):
        assert torch.equal(row, after.read(index)["features"])


def test_an_unchanged_shard_is_read_once_for_its_checksum(extract, monkeypatch):
    extract()
    hashed = []
    original = shards.sha256_file
    monkeypatch.setattr(shards, "sha256_file", lambda path: hashed.append(path.name) or original(path))
    extract()
    extract()
    assert len(hashed) == len(set(hashed)) > 1
    os.utime(extract().folder / hashed[0])
    extract()
    assert hashed[-1] == hashed[0] and len(hashed) == len(set(hashed)) + 1


def test_a_killed_extraction_goes_on_at_the_next_shard(extract, computed, tmp_path, monkeypatch):
    original, written = module.write_shard, []

    def killed(folder, number, tensors, note):
        if number == 2:
            (folder / ".shard-00002.safetensors.123").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        original(folder, number, tensors, note)
        written.append(number)

    monkeypatch.setattr(module, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        extract()
    monkeypatch.setattr(module, "write_shard", original)
    computed.clear()
    store = extract()
    assert written == [0, 1]
    assert computed == [2, 1]
    assert not list(store.folder.glob(".shard-*")), "what the killed process left half written is still there"


def test_a_full_disk_is_noticed_before_the_start(extract, computed, tiny, monkeypatch):
    num_bytes = sum(LENGTHS) * bytes_per_token(tiny)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, num_bytes))  # less than the margin
    with pytest.raises(ValueError, match=r"need 0\.00 GB for 97 tokens.*data\.max_answer_tokens.*paths\.cache_dir"):
        extract()
    assert computed == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 2 * num_bytes))
    extract()


def test_the_bytes_it_announces_are_those_on_disk(extract, tiny):
    store = extract(shard_size=100)
    (path,) = store.folder.glob("*.safetensors")
    announced = sum(LENGTHS) * bytes_per_token(tiny)
    assert announced <= path.stat().st_size <= announced + 1000
    assert json.loads(path.with_suffix(".json").read_text())["bytes"] == path.stat().st_size


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("IoError: no space")]
)
def test_a_disk_that_fills_up_is_one_sentence_and_finished_shards_stay(extract, computed, monkeypatch, error):
    original = shards.save_file

    def full(tensors, path):
        if "shard-00002" in str(path):
            path.write_bytes(b"partly")
            raise error
        original(tensors, path)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(ValueError, match=r"shard-00002.*could not be written.*paths\.cache_dir"):
        extract()
    monkeypatch.setattr(shards, "save_file", original)
    computed.clear()
    store = extract()
    assert computed == [2, 1]
    assert {path.name for path in store.folder.iterdir() if path.suffix == ".safetensors"} == {
        f"shard-{number:05d}.safetensors" for number in range(4)
    }


def test_two_at_once_make_each_shard_once(extract, computed):
    stores = []
    threads = [threading.Thread(target=lambda: stores.append(extract())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 3
    assert sorted(computed) == [1, 2, 2, 2]


def _extract_in_a_process(folder, cache, queue):
    import os

    os.environ["HASS_LIGHTNING_CACHE"] = cache
    from hass_lightning.target_model import TargetModel
    from hass_lightning.target_model.tiny import tiny_llama

    torch.set_num_threads(1)
    target = TargetModel.load(tiny_llama(), "tiny", dtype="float32")
    made, original = [], module.write_shard
    module.write_shard = lambda folder, number, *rest: (made.append(number), original(folder, number, *rest))
    tokens = [sequence(number, length) for number, length in enumerate(LENGTHS)]
    extract_features(target, tokens, folder, shard_size=1)
    queue.put(made)


@pytest.mark.slow
def test_two_processes_at_once_make_each_shard_once(tmp_path, cache_dir, tiny):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (str(tmp_path), str(cache_dir), queue)
    processes = [context.Process(target=_extract_in_a_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    made = [number for _ in processes for number in queue.get(timeout=300)]
    for process in processes:
        process.join()
    assert sorted(made) == list(range(len(LENGTHS)))


def test_sequences_of_any_lengths_come_back_as_they_were(tiny, tmp_path):
    draw = random.Random(0)
    for trial in range(5):
        many = [sequence(100 * trial + n, draw.randint(2, 40)) for n in range(draw.randint(1, 12))]
        store = extract_features(tiny, many, tmp_path, shard_size=draw.randint(1, 5), batch_tokens=draw.randint(1, 100))
        for index, each in enumerate(many):
            assert torch.equal(store.read(index)["input_ids"], each.input_ids)
            assert torch.equal(store.read(index)["loss_mask"], each.loss_mask)
