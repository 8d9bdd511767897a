"""A data loader with a thread that prefetches batches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class PrefetchingLoader(DataLoader[Any]):
    """A DataLoader that prefetches `ahead` batches in a thread (0: none).

    Attributes:
        waited_seconds: time that iterations have waited for batches so far.
    """

    def __init__(self, dataset: Any, ahead: int = 0, **kwargs: Any):
        self.ahead, self.waited_seconds = ahead, 0.0
        super().__init__(dataset, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = self._read_ahead() if self.ahead else super().__iter__()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)  # a batch is never None
            self.waited_seconds += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def _read_ahead(self) -> Iterator[Any]:
        batches = super().__iter__()
        ready: queue.Queue[Any] = queue.Queue(self.ahead)
        stopped, end = threading.Event(), object()

        def put(item: Any) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def fill() -> None:
            try:
                for batch in batches:
                    put(batch)
                    if stopped.is_set():
                        return
                put(end)
            except Exception as error:  # raised again in the consumer
                put(error)

        thread = threading.Thread(target=fill, name="prefetch", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not end:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()
