"""Continuous batching: when a text ends, the next waiting request takes its row.

A text depends only on its request, so any batch size and any order give the same texts, up to rounding.
Shapes: B rows of the running batch, N tokens of a prompt, V vocabulary (types.py has the legend).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice

import torch
from torch import Tensor

from hass_lightning.data.generation_requests import Request, Row, Text, sample
from hass_lightning.target_model.cache import KVCache
from hass_lightning.target_model.model import TargetModel

PREFILL_TOKENS = 2048  # in one forward over new prompts; larger activations do not fit into the caches of a CPU


class Batch:
    """The rows that are being generated. They occupy the first rows of the cache, so no step computes an empty row."""

    def __init__(self, target: TargetModel, size: int):
        self.target, self.size = target, size
        self.rows: list[Row] = []
        self.cache = target.new_cache(size, 0)
        self.shared_ids: list[int] = []  # common beginning of the prompts (a system message), computed once
        self.shared = self.cache.storage[:, :, :1]  # its keys and values [2, L, 1, H, N, d]

    def reserve(self, requests: Sequence[Request]) -> None:
        """Make room for the longest text of each request.

        Raises:
            ValueError: the texts would be longer than the target supports.
        """
        longest = max(requests, key=lambda request: request.num_tokens)
        if longest.num_tokens > self.target.max_length:
            raise ValueError(
                f"a prompt and {longest.max_new_tokens} new tokens are {longest.num_tokens} tokens, but "
                f"{self.target.name} supports {self.target.max_length}: generate fewer tokens, or remove the prompt."
            )
        if longest.num_tokens > self.cache.capacity:
            wanted = min(max(longest.num_tokens, self.cache.capacity * 5 // 4), self.target.max_length)
            larger = self.target.new_cache(self.size, wanted)
            larger.storage[..., : self.cache.capacity, :] = self.cache.storage
            self.cache = larger

    def _rows_of_cache(self, first: int, count: int) -> KVCache:
        """Return a cache of some rows that shares their memory."""
        part = copy(self.cache)
        part.storage = self.cache.storage[:, :, first : first + count]
        return part

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Prefill the prompts of new requests in one forward. Return the rows whose text ends with its first token."""
        self.reserve(requests)
        prompts = [list(request.prompt) for request in requests]
        ends = torch.tensor([len(prompt) for prompt in prompts])
        first, part = len(self.rows), self._rows_of_cache(len(self.rows), len(requests))
        part.length = min(num_common([self.shared_ids, *prompts]), int(ends.min()) - 1)
        part.storage[..., : part.length, :] = self.shared[..., : part.length, :]
        tokens = torch.zeros(len(requests), int(ends.max()) - part.length, dtype=torch.int64)  # [B, N], right-padded
        for number, prompt in enumerate(prompts):
            tokens[number, : len(prompt) - part.length] = torch.tensor(prompt[part.length :])
        features = self.target.forward(tokens.to(self.target.device), part)
        if not self.shared_ids:
            self.shared_ids = prompts[0][: num_common(prompts)]
            self.shared = part.storage[:, :, :1, :, : len(self.shared_ids)].clone()
        self.rows += [Row(request, len(request.prompt)) for request in requests]
        last = features[torch.arange(len(requests)), ends - part.length - 1]
        return self._write(list(range(first, len(self.rows))), last)

    def step(self) -> list[int]:
        """Generate one token for every row. Return the rows whose text is finished."""
        device = self.target.device
        lengths = torch.tensor([row.length for row in self.rows], device=device)  # [B]
        tokens = torch.tensor([row.next_token() for row in self.rows], device=device)
        cache = self._rows_of_cache(0, len(self.rows))
        cache.slots, cache.read_length = lengths[:, None], max(row.length for row in self.rows) + 1
        mask = torch.arange(cache.read_length, device=device) <= lengths[:, None]  # [B, keys]
        features = self.target.forward(tokens[:, None], cache, lengths[:, None], mask[:, None, None])[:, 0]
        for row in self.rows:
            row.length += 1
        writing = [number for number, row in enumerate(self.rows) if not row.forced]
        return self._write(writing, features if len(writing) == len(self.rows) else features[writing])

    def _write(self, numbers: list[int], features: Tensor) -> list[int]:
        """Append a token to the rows `numbers` from their features [B, D]. Return the rows that are finished."""
        rows, finished = [self.rows[number] for number in numbers], []
        if rows:
            for number, row, token in zip(numbers, rows, sample(self.target.head.logits(features), rows), strict=True):
                row.token_ids.append(token)
                if token in self.target.eos_token_ids or len(row.token_ids) >= row.request.max_new_tokens:
                    finished.append(number)
        return finished

    def text(self, number: int) -> Text:
        """Return the text of a finished row."""
        row = self.rows[number]
        ended = row.token_ids[-1] in self.target.eos_token_ids
        return Text(row.request, row.token_ids[: len(row.token_ids) - ended], ended)

    def go_on(self, number: int, request: Request) -> None:
        """Start another text in the row. Its cache is kept as far as the new prompt begins with the same tokens."""
        self.reserve([request])
        row = self.rows[number]
        cached = [*row.request.prompt, *row.token_ids][: row.length]
        same = min(num_common([cached, request.prompt]), len(request.prompt) - 1)
        self.rows[number] = Row(request, same, deque(request.prompt[same:]))

    def remove(self, number: int) -> None:
        """Free a row. The last row moves to its place."""
        last = self.rows.pop()
        if number < len(self.rows):
            self.rows[number] = last
            storage = self.cache.storage  # [2, L, B, H, C, d]
            storage[:, :, number, :, : last.length] = storage[:, :, len(self.rows), :, : last.length]


def num_common(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix of all sequences."""
    columns = enumerate(zip(*sequences, strict=False))
    return next((n for n, column in columns if len(set(column)) > 1), min(map(len, sequences)))


def take_chunk(waiting: deque[Request], free: int) -> list[Request]:
    """Return the next requests to prefill together: at most `free`, and `PREFILL_TOKENS` including padding."""
    chunk: list[Request] = []
    longest = 0
    while waiting and len(chunk) < free:
        longest = max(longest, len(waiting[0].prompt))
        if chunk and longest * (len(chunk) + 1) > PREFILL_TOKENS:
            break
        chunk.append(waiting.popleft())
    return chunk


@torch.inference_mode()
def write_texts(
    target: TargetModel,
    requests: Iterable[Request],
    batch_size: int,
    follow: Callable[[Text], Request | None] = lambda text: None,
) -> Iterator[Text]:
    """Generate the texts of all requests, `batch_size` at a time.

    Args:
        requests: consumed as rows become free. Neighbors of equal length are prefilled without padding.
        follow: returns the request that follows a text, or None. It is called after the caller has received the text.
            A prompt that continues the text (the next turn of a conversation) only computes its new tokens.

    Yields:
        each text when it is finished.

    Raises:
        ValueError: a prompt and its text are longer than the target supports, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"data.source.batch_size={batch_size} must be at least 1.")
    source = iter(requests)
    waiting = deque(islice(source, batch_size))
    batch = Batch(target, len(waiting))
    while True:
        free = batch.size - len(batch.rows)
        waiting.extend(islice(source, max(0, free - len(waiting))))
        if waiting and (not batch.rows or free > batch.size // 16):
            finished = batch.add(take_chunk(waiting, free))
        elif batch.rows:
            finished = batch.step()
        else:
            return
        for number in reversed(finished):  # `remove` moves the last row, which has been handled by then
            text = batch.text(number)
            yield text
            if (request := follow(text)) is not None:
                batch.go_on(number, request)
            else:
                batch.remove(number)
