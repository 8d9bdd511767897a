"""Which conversations are trained on, and in which order: functions of the data, a seed and numbers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from hass_lightning.types import Conversation


def hash_of(*parts: object) -> int:
    """An integer below 2^56 that depends on the parts alone, in every process."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")


def split_validation(
    conversations: Sequence[Conversation], num_validation: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, validation) with no question in both: by the data's own `split` field, else by a hash of the question."""
    groups: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        groups.setdefault(" ".join(conversation.question.lower().split()), []).append(conversation)
    labelled = any(conversation.split for conversation in conversations)
    if labelled:
        held_out = {key for key, group in groups.items() if any(c.split == "validation" for c in group)}
    else:
        held_out = set(sorted(groups, key=lambda key: hash_of("split", key))[:num_validation])
    train = [c for key, group in groups.items() if key not in held_out for c in group]
    validation = [c for key, group in groups.items() if key in held_out for c in group[:1]]
    if not train or not validation:
        raise ValueError(
            f"the data leave {len(train)} training and {len(validation)} validation conversations: lower "
            "data.num_validation, or give more data."
        )
    return train, validation[:num_validation]


def nested_fraction(ids: Sequence[str], fraction: float) -> list[int]:
    """Indices, in order, of a share of sequences that holds every smaller share: the first by a hash of their ids."""
    ranked = sorted(range(len(ids)), key=lambda index: (hash_of("fraction", ids[index]), index))
    return sorted(ranked[: max(1, round(fraction * len(ids)))])


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """All batches of a run, by global batch number: lists of (epoch, index) for this process.

    Every epoch shuffles anew, gathers similar lengths, and shuffles the batches; a run over `num_batches` starts at
    `first`, so that a resumed run sees exactly what the uninterrupted one would have seen.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, num_batches: int, first: int = 0, rank: int = 0,
        world_size: int = 1,
    ):  # fmt: skip
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.num_batches, self.first, self.rank, self.world_size = num_batches, first, rank, world_size
        self._last: tuple[int, list[list[int]]] = (-1, [])  # the epoch that was asked for last
        if len(lengths) < self.global_batch:
            raise ValueError(
                f"{len(lengths)} training conversations do not fill one batch of {self.global_batch}: lower "
                "data.batch_size, or give more data."
            )

    @property
    def global_batch(self) -> int:
        """Sequences a step over all processes."""
        return self.batch_size * self.world_size

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches an epoch; what is left over waits for another shuffle."""
        return len(self.lengths) // self.global_batch

    def __len__(self) -> int:
        return self.num_batches

    def epoch(self, epoch: int) -> list[list[int]]:
        """The global batches of one epoch."""
        generator = torch.Generator().manual_seed(hash_of(self.seed, "order", epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size, batches = self.global_batch, []
        order = order[: self.batches_per_epoch * size]
        for start in range(0, len(order), 16 * size):
            bucket = sorted(order[start : start + 16 * size], key=lambda index: self.lengths[index])
            batches += [bucket[first : first + size] for first in range(0, len(bucket), size)]
        return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]

    def batch(self, number: int) -> tuple[int, list[int]]:
        """(epoch, sequences) of a global batch."""
        epoch = number // self.batches_per_epoch
        if self._last[0] != epoch:
            self._last = epoch, self.epoch(epoch)
        return epoch, self._last[1][number % self.batches_per_epoch]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.first, self.num_batches):
            epoch, batch = self.batch(number)
            yield [(epoch, index) for index in batch[self.rank :: self.world_size]]
