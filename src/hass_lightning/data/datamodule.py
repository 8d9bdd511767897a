"""Batches of features for Lightning. Order and noise are functions of (seed, epoch, index): resuming needs no state.

Shapes: B batch, T tokens, D hidden (types.py has the legend).
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from typing import Any, Literal, Protocol

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hass_lightning.data.features import FeatureStore, OnlineFeatures, extract_features
from hass_lightning.data.order import BatchOrder, hash_of, nested_fraction, split_validation
from hass_lightning.data.prefetch import PrefetchingLoader
from hass_lightning.data.tokens import encode_all
from hass_lightning.target.model import TargetModel
from hass_lightning.types import Conversation, FeatureBatch, Tokens

log = logging.getLogger(__name__)


class ConversationSource(Protocol):
    """Anything that gives conversations: JSON lines, a hub data set, self-distillation."""

    def load(self, target: TargetModel) -> list[Conversation]: ...  # noqa: D102


class FeatureDataset(Dataset):
    """Sequences of a store by (epoch, index), with uniform noise on the features (EAGLE's data augmentation)."""

    def __init__(self, store: FeatureStore | OnlineFeatures, noise: float = 0.0, seed: int = 0):
        self.store, self.noise, self.seed = store, noise, seed

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, keys: list[tuple[int, int] | int]) -> list[dict[str, Tensor | str]]:
        """One batch (what a DataLoader asks for)."""
        self.store.prepare([key[1] if isinstance(key, tuple) else key for key in keys])
        return [self[key] for key in keys]

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Tensor | str]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        row: dict[str, Tensor | str] = dict(self.store.read(index))
        features = row["features"]
        assert isinstance(features, Tensor)
        row["inputs"] = features
        if self.noise:
            generator = torch.Generator().manual_seed(hash_of(self.seed, "noise", epoch, index))
            noise = torch.rand(features.shape, generator=generator).sub_(0.5).mul_(2 * self.noise)
            row["inputs"] = features + noise.to(features.dtype)
        if epoch < 0:  # filling, see `FeatureDataModule.val_dataloader`
            row["loss_mask"] = torch.zeros_like(row["loss_mask"])  # type: ignore[arg-type]
        row["id"] = self.store.ids[index]
        return row


def collate(rows: list[dict]) -> tuple[FeatureBatch, Tensor | None]:
    """Right-pad to the longest: (batch with the true features, noisy ones [B, T, D] for the head's input).

    Without noise the second is None, so that nothing is pinned and sent to a GPU twice.
    """
    lengths = torch.tensor([row["input_ids"].shape[0] for row in rows])
    longest = int(lengths.max())

    def padded(name: str, value: float | int | bool = 0) -> Tensor:
        first = rows[0][name]
        stacked = first.new_full((len(rows), longest, *first.shape[1:]), value)
        for number, row in enumerate(rows):
            stacked[number, : row[name].shape[0]] = row[name]
        return stacked

    features = padded("features")
    inputs = None if all(row["inputs"] is row["features"] for row in rows) else padded("inputs")
    batch = FeatureBatch(
        padded("input_ids"), padded("loss_mask"), lengths, features, padded("target_ids", -1),
        [row["id"] for row in rows],
    )  # fmt: skip
    return batch, inputs


class FeatureDataModule(L.LightningDataModule):
    """Conversations → tokens → features → batches.

    Args:
        source: where conversations come from. target: the frozen LLM whose features are learned.
        max_length: longest sequence in tokens. last_turn_only: learn from the last answer alone (data/tokens.py).
        max_answer_tokens: training rows to use (None: all).
        fraction: of the training sequences to use; a smaller fraction is a part of a larger one. The features of all
            of them are extracted, so that every fraction reads the same cache.
        num_validation: validation conversations. batch_size: sequences a process and step.
        noise: half-width of the uniform noise on the input features (0 = none; EAGLE: 0.1).
        features: `cached` on disk, or `online`: the target runs in this process for each batch.
        cache_dir: where features are stored. eight_bit_cache: store them in 8 bits (eight_bit.py).
        num_workers: loader processes. prefetch: batches that a thread reads ahead.
    """

    def __init__(
        self,
        source: ConversationSource,
        target: TargetModel,
        max_length: int = 2048,
        max_answer_tokens: int | None = None,
        fraction: float = 1.0,
        num_validation: int = 200,
        batch_size: int = 8,
        noise: float = 0.0,
        seed: int = 0,
        features: Literal["cached", "online"] = "cached",
        cache_dir: str | None = None,
        eight_bit_cache: bool = False,
        num_workers: int = 0,
        last_turn_only: bool = False,
        prefetch: int = 2,
    ):
        super().__init__()
        if features not in ("cached", "online"):
            raise ValueError(f"data.features={features} is neither cached nor online.")
        if features == "online" and (num_workers or eight_bit_cache):
            raise ValueError(
                "data.features=online runs the target in the training process, without a disk: set data.num_workers=0 "
                f"(it is {num_workers}) and data.eight_bit_cache=false (it is {str(eight_bit_cache).lower()})."
            )
        if batch_size < 1 or max_length < 2 or num_validation < 1 or noise < 0:
            raise ValueError(
                f"data.batch_size={batch_size}, data.max_length={max_length}, data.num_validation={num_validation}, "
                f"data.noise={noise}: sizes must be positive, noise not negative."
            )
        if not 0 < fraction <= 1:
            raise ValueError(f"data.fraction={fraction} must lie in (0, 1].")
        self.source, self.target, self.fraction = source, target, fraction
        self.max_length = min(max_length, target.max_length)
        self.max_answer_tokens, self.num_validation = max_answer_tokens, num_validation
        self.batch_size, self.noise, self.seed = batch_size, noise, seed
        self.features, self.cache_dir, self.eight_bit_cache = features, cache_dir, eight_bit_cache
        self.num_workers, self.prefetch = num_workers, prefetch
        self.last_turn_only = last_turn_only
        self.num_batches: int | None = None  # of the whole run; set by the command
        self._order: BatchOrder | None = None  # a second one: loaders read ahead
        self._tokens: tuple[list[Tokens], list[Tokens]] | None = None
        self._every: list[Tokens] = []  # the training sequences of fraction 1
        self._kept: list[int] = []  # those of this fraction among them
        self._stores: tuple[FeatureStore | OnlineFeatures, FeatureStore | OnlineFeatures] | None = None
        self.validation_conversations: list[Conversation] = []

    def tokens(self) -> tuple[list[Tokens], list[Tokens]]:
        """(train, validation) sequences."""
        if self._tokens is None:
            train, validation = split_validation(self.source.load(self.target), self.num_validation)
            encode = (self.target.tokenizer, self.max_length, self.target.eos_token_ids)
            last = self.last_turn_only
            self._every = encode_all(encode[0], train, *encode[1:], self.max_answer_tokens, last)
            self._kept = nested_fraction([sequence.id for sequence in self._every], self.fraction)
            kept_tokens = [self._every[index] for index in self._kept]
            self._tokens = kept_tokens, encode_all(encode[0], validation, *encode[1:], None, last)
            kept = {sequence.id for sequence in self._tokens[1]}
            self.validation_conversations = [c for c in validation if c.id in kept]
        return self._tokens

    def stores(self) -> tuple[FeatureStore | OnlineFeatures, FeatureStore | OnlineFeatures]:
        """(train, validation) features, extracted if the cache has none; one process does it, the others wait."""
        if self._stores is None:
            train, validation = self.tokens()
            training: FeatureStore | OnlineFeatures
            if self.features == "online":
                training = OnlineFeatures(self.target, train)
            else:
                training = self._store(self._every, "training features").subset(self._kept)  # type: ignore[union-attr]
            self._stores = training, self._store(validation, "validation features")
        return self._stores

    def _store(self, tokens: list[Tokens], name: str) -> FeatureStore | OnlineFeatures:
        if self.features == "online":
            return OnlineFeatures(self.target, tokens)
        return extract_features(self.target, tokens, self.cache_dir, name=name, eight_bit=self.eight_bit_cache)

    def data_hash(self) -> str:
        """Names the training and validation sequences: their ids and masks."""
        digest = hashlib.sha256()
        for sequence in [*self.tokens()[0], *self.tokens()[1]]:
            digest.update(sequence.input_ids.numpy().tobytes())
            digest.update(sequence.loss_mask.numpy().tobytes())
        return digest.hexdigest()[:12]

    def most_frequent_tokens(self, size: int) -> tuple[Tensor, float]:
        """The `size` most frequent training answer tokens (ties by id), sorted, and the share of answers they cover."""
        counts: Counter[int] = Counter()
        for sequence in self.tokens()[0]:
            answer = sequence.loss_mask.roll(1)
            counts.update(sequence.input_ids[answer].tolist())
        for token in self.target.eos_token_ids:
            counts[token] += 1  # the end of turn stands outside the marked rows, but is drafted
        vocab_size = self.target.head.vocab_size
        if not 0 < size <= vocab_size:
            raise ValueError(f"model.draft.vocab_size={size} must lie in 1 … {vocab_size} (the target's), or be null.")
        ranked = sorted(range(vocab_size), key=lambda token: (-counts[token], token))[:size]
        coverage = sum(counts[token] for token in ranked) / max(1, counts.total())
        return torch.tensor(sorted(ranked)), coverage

    @property
    def batches_per_epoch(self) -> int:
        """Steps an epoch takes before accumulation."""
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return max(1, len(self.tokens()[0]) // (self.batch_size * world_size))

    def prepare_data(self) -> None:
        """Extract the features (one process a node)."""
        self.stores()

    def train_dataloader(self) -> DataLoader:
        """All batches of the run, from the first that the resumed step has not seen."""
        store, trainer = self.stores()[0], self.trainer
        assert trainer is not None
        first = trainer.global_step * trainer.accumulate_grad_batches
        lengths = [store.length(index) for index in range(len(store))]
        num_batches = self.num_batches or self.batches_per_epoch
        where = (trainer.global_rank, trainer.world_size)
        order = BatchOrder(lengths, self.batch_size, self.seed, num_batches, first, *where)
        self._order = BatchOrder(lengths, self.batch_size, self.seed, num_batches, first, *where)
        return self._loader(FeatureDataset(store, self.noise, self.seed), batch_sampler=order)

    def rows_of_step(self, step: int) -> int:
        """Marked rows of an optimizer step: of all processes, and of all batches that it accumulates.

        The batches of a run are numbered (BatchOrder), so no process needs to ask another, or to look ahead.
        """
        assert self.trainer is not None and self._order is not None
        accumulated = self.trainer.accumulate_grad_batches
        batches = (self._order.batch(step * accumulated + number)[1] for number in range(accumulated))
        train = self.tokens()[0]
        return sum(int(train[index].loss_mask[:-1].sum()) for batch in batches for index in batch)

    def val_dataloader(self) -> DataLoader:
        """Validation sequences, each read by one process; one without a marked row fills where they do not divide."""
        store, trainer = self.stores()[1], self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        mine = [(0, index) for index in range(rank, len(store), world_size)]
        mine.sort(key=lambda key: store.length(key[1]))
        if len(mine) * world_size < len(store):  # as many batches for each: ZeRO-3 gathers the weights in every forward
            mine.append((-1, 0))
        batches = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        return self._loader(FeatureDataset(store), batch_sampler=batches)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move what `collate` made."""
        features, noisy = batch
        return features.to(device, non_blocking=True), noisy if noisy is None else noisy.to(device, non_blocking=True)

    def _loader(self, dataset: FeatureDataset, batch_sampler) -> DataLoader:
        return PrefetchingLoader(
            dataset,
            ahead=self.prefetch,
            batch_sampler=batch_sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
