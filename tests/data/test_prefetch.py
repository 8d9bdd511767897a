"""Prefetching: the same batches, ahead of time. Errors and early ends leave no thread behind."""

import threading
import time

import pytest

from hass_lightning.data.prefetch import PrefetchingLoader


class Source:
    """Numbers. `read` counts those that were read."""

    def __init__(self, broken_at=None):
        self.read, self.broken_at, self.reached = [], broken_at, threading.Event()

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == self.broken_at:
            raise ValueError("the shard is damaged")
        self.read.append(index)
        if index == 5:
            self.reached.set()
        return index


def loader(source, ahead):
    return PrefetchingLoader(source, batch_size=2, ahead=ahead)


def running():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_batches_and_their_order_are_the_same(ahead):
    assert [batch.tolist() for batch in loader(Source(), ahead)] == [[n, n + 1] for n in range(0, 12, 2)]
    assert not running()


def test_the_next_batches_are_read_while_the_first_is_used():
    source = Source()
    batches = iter(loader(source, 2))
    assert next(batches).tolist() == [0, 1]
    assert source.reached.wait(10)  # 2 more batches than requested
    batches.close()
    assert not running()


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_the_reader_waits_for_is_counted(ahead, monkeypatch):
    source, original = Source(), Source.__getitem__
    monkeypatch.setattr(Source, "__getitem__", lambda self, index: time.sleep(0.005) or original(self, index))
    batches = loader(source, ahead)
    assert batches.waited_seconds == 0
    assert len(list(batches)) == 6
    assert batches.waited_seconds >= 0.05  # a consumer without work waits for nearly all of 12 reads


def test_an_error_reaches_the_reader():
    batches = iter(loader(Source(broken_at=4), 3))
    assert [next(batches).tolist(), next(batches).tolist()] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="the shard is damaged"):
        next(batches)
    assert not running()
