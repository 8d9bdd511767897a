"""Split and order of the training data. Both depend only on the data, a seed and numbers."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.data import Sampler

from hass_lightning.types import Conversation

log = logging.getLogger(__name__)


def hash_of(*parts: object) -> int:
    """Return an integer below 2^56 that depends only on the parts, in every process."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")


def split_validation(
    conversations: Sequence[Conversation], num_validation: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Split into (train, validation) with no question in both.

    The data's own `split` field decides if it names a validation part, else a hash of the question. Conversations of
    its test part, and others with the same question, are in neither.

    Raises:
        ValueError: one of the parts is empty.
    """
    groups: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        groups.setdefault(" ".join(conversation.question.lower().split()), []).append(conversation)
    tested = [key for key, group in groups.items() if any(c.split == "test" for c in group)]
    num_tested = sum(len(groups.pop(key)) for key in tested)
    if num_tested:
        log.info("%d conversations of the test split, or with a question of it, are left out", num_tested)
    if any(c.split == "validation" for group in groups.values() for c in group):
        held_out = {key for key, group in groups.items() if any(c.split == "validation" for c in group)}
    else:
        held_out = set(sorted(groups, key=lambda key: hash_of("split", key))[:num_validation])
    train = [c for key, group in groups.items() if key not in held_out for c in group]
    validation = [c for key, group in groups.items() if key in held_out for c in group[:1]]
    if not train or not validation:
        raise ValueError(
            f"the data leave {len(train)} training and {len(validation)} validation conversations"
            f"{f' ({num_tested} are of their test split)' * bool(num_tested)}: lower data.num_validation, or use more "
            "data."
        )
    return train, validation[:num_validation]


def with_distinct_ids(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Number repeated ids: `7`, `7#2`, `7#3`. Records are stored by id."""
    seen: Counter[str] = Counter()
    distinct = []
    for conversation in conversations:
        seen[conversation.id] += 1
        number = seen[conversation.id]
        distinct.append(conversation if number == 1 else replace(conversation, id=f"{conversation.id}#{number}"))
    return distinct


def nested_fraction(ids: Sequence[str], fraction: float) -> list[int]:
    """Return the indices of a share of the sequences, chosen by a hash of their ids. Smaller shares are subsets."""
    ranked = sorted(range(len(ids)), key=lambda index: (hash_of("fraction", ids[index]), index))
    return sorted(ranked[: max(1, round(fraction * len(ids)))])


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """All batches of a run, by global batch number: lists of (epoch, index) for this process.

    Every epoch shuffles again, groups similar lengths, and shuffles the batches. A run over `num_batches` starts at
    `first`, so a resumed run uses the same batches as an uninterrupted one.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, num_batches: int, first: int = 0, rank: int = 0,
        world_size: int = 1,
    ):  # fmt: skip
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.num_batches, self.first, self.rank, self.world_size = num_batches, first, rank, world_size
        self._last: tuple[int, list[list[int]]] = (-1, [])  # the epoch that was used last
        if len(lengths) < self.global_batch:
            raise ValueError(
                f"{len(lengths)} training conversations do not fill one batch of {self.global_batch}: lower "
                "data.batch_size, or use more data."
            )

    @property
    def global_batch(self) -> int:
        """Sequences per step over all processes."""
        return self.batch_size * self.world_size

    @property
    def batches_per_epoch(self) -> int:
        """Complete global batches per epoch. The remaining sequences wait for another shuffle."""
        return len(self.lengths) // self.global_batch

    def __len__(self) -> int:
        return self.num_batches

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the global batches of one epoch."""
        generator = torch.Generator().manual_seed(hash_of(self.seed, "order", epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size, batches = self.global_batch, []
        order = order[: self.batches_per_epoch * size]
        for start in range(0, len(order), 16 * size):
            bucket = sorted(order[start : start + 16 * size], key=lambda index: self.lengths[index])
            batches += [bucket[first : first + size] for first in range(0, len(bucket), size)]
        return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]

    def batch(self, number: int) -> tuple[int, list[int]]:
        """Return (epoch, sequences) of a global batch."""
        epoch = number // self.batches_per_epoch
        if self._last[0] != epoch:
            self._last = epoch, self.epoch(epoch)
        return epoch, self._last[1][number % self.batches_per_epoch]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.first, self.num_batches):
            epoch, batch = self.batch(number)
            yield [(epoch, index) for index in batch[self.rank :: self.world_size]]
