"""Batches of features for Lightning. Order and noise depend only on (seed, epoch, index), so resuming needs no state.

Shapes: B batch, T tokens, D hidden (types.py has the legend).
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hass_lightning.data.batches import FeatureDataset, collate
from hass_lightning.data.features import FeatureStore, OnlineFeatures, extract_features
from hass_lightning.data.order import BatchOrder, nested_fraction, split_validation, with_distinct_ids
from hass_lightning.data.prefetch import PrefetchingLoader
from hass_lightning.data.tokens import encode_all
from hass_lightning.data.values import check_flag, check_number, check_whole
from hass_lightning.runs.screen import stage
from hass_lightning.target_model.model import TargetModel
from hass_lightning.types import Conversation, Tokens

log = logging.getLogger(__name__)


class ConversationSource(Protocol):
    """A source of conversations: JSON lines, a hub data set, self-distillation."""

    def load(self, target: TargetModel) -> list[Conversation]: ...  # noqa: D102


class FeatureDataModule(L.LightningDataModule):
    """Conversations → tokens → features → batches.

    Args:
        source: of the conversations. target: the frozen LLM whose features are the training data.
        max_length: longest sequence in tokens. last_turn_only: train only on the last answer (data/tokens.py).
        max_answer_tokens: number of loss positions to train on (None: all).
        fraction: share of the training sequences to use. Smaller fractions are subsets of larger ones. The features of
            all sequences are extracted, so every fraction reads the same cache.
        num_validation: validation conversations. batch_size: sequences per process and step.
        noise: half-width of the uniform noise on the input features (0 = none; EAGLE: 0.1).
        features: `cached` on disk, or `online`: the target computes them in this process for each batch.
        feature_layers: layers of the target whose inputs precede the last hidden state in the features (None: those
            that the head reads, see `read_layers`). A head that reads only the last hidden state can use any set.
        cache_dir: folder of the features. eight_bit_cache: store them in 8 bits (eight_bit.py).
        num_workers: loader processes. prefetch: batches that a thread prefetches.

    Raises:
        ValueError: a value is out of range.
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
        feature_layers: Sequence[int] | None = None,
    ):
        super().__init__()
        sizes = {"batch_size": (batch_size, 1), "max_length": (max_length, 2), "num_validation": (num_validation, 1),
                 "num_workers": (num_workers, 0), "prefetch": (prefetch, 0), "seed": (seed, 0)}  # fmt: skip
        for key, (value, least) in sizes.items():
            check_whole(f"data.{key}", value, least)
        check_whole("data.max_answer_tokens", max_answer_tokens, 1, null="all")
        check_number("data.noise", noise)
        check_number("data.fraction", fraction, 0, 1, above=True)
        check_flag("data.last_turn_only", last_turn_only)
        check_flag("data.eight_bit_cache", eight_bit_cache)
        _check_features(features, num_workers, eight_bit_cache)
        self.source, self.fraction = source, fraction
        self.feature_layers = None if feature_layers is None else tuple(feature_layers)
        self.target = target.reading(self.feature_layers or ())
        self.max_length = min(max_length, target.max_length)
        self.max_answer_tokens, self.num_validation = max_answer_tokens, num_validation
        self.batch_size, self.noise, self.seed = batch_size, noise, seed
        self.features, self.cache_dir, self.eight_bit_cache = features, cache_dir, eight_bit_cache
        self.num_workers, self.prefetch = num_workers, prefetch
        self.last_turn_only = last_turn_only
        self.num_batches: int | None = None  # of the whole run, set by the command
        self._order: BatchOrder | None = None  # a second one, because loaders prefetch
        self._tokens: tuple[list[Tokens], list[Tokens]] | None = None
        self._every: list[Tokens] = []  # the training sequences of fraction 1
        self._kept: list[int] = []  # indices of this fraction among them
        self._stores: tuple[FeatureStore | OnlineFeatures, FeatureStore | OnlineFeatures] | None = None
        self.validation_conversations: list[Conversation] = []

    def read_layers(self, layers: tuple[int, ...]) -> None:
        """Extract features with the `layers` that a head reads, unless the config names its own.

        Raises:
            ValueError: if the config names others.
        """
        if self.feature_layers is None:
            self.target = self.target.reading(layers)
        elif layers not in ((), self.feature_layers):
            raise ValueError(
                f"data.feature_layers={list(self.feature_layers)}, but the head reads the layers {list(layers)}: name "
                "these, or set it to null."
            )

    def tokens(self) -> tuple[list[Tokens], list[Tokens]]:
        """Return the training and validation sequences."""
        if self._tokens is None:
            with stage("answers") as answers:
                self._tokens = self._load()
                answers.detail = f"{len(self._tokens[0]):,} conversations, {len(self._tokens[1]):,} for validation"
        return self._tokens

    def _load(self) -> tuple[list[Tokens], list[Tokens]]:
        train, validation, held_out = self._split()
        self._every = self._encode(train, self.max_answer_tokens)
        self._kept = nested_fraction([sequence.id for sequence in self._every], self.fraction)
        kept = {sequence.id for sequence in held_out}
        self.validation_conversations = [c for c in validation if c.id in kept]
        return [self._every[index] for index in self._kept], held_out

    def _split(self) -> tuple[list[Conversation], list[Conversation], list[Tokens]]:
        """Return (train, validation, tokens of validation). If no held-out conversation is usable, hold out others."""
        conversations = with_distinct_ids(self.source.load(self.target))
        train, validation = split_validation(conversations, self.num_validation)
        while True:
            try:
                return train, validation, self._encode(validation)
            except ValueError as error:
                unusable = {conversation.id for conversation in validation}
                conversations = [each for each in conversations if each.id not in unusable]
                try:
                    train, validation = split_validation(conversations, self.num_validation)
                except ValueError:
                    raise error from None
                log.warning("none of %d validation conversations can be used: others are held out", len(unusable))

    def _encode(self, conversations: list[Conversation], max_answer_tokens: int | None = None) -> list[Tokens]:
        target = self.target
        options = (target.eos_token_ids, max_answer_tokens, self.last_turn_only)
        return encode_all(target.tokenizer, conversations, self.max_length, *options)

    def stores(self) -> tuple[FeatureStore | OnlineFeatures, FeatureStore | OnlineFeatures]:
        """Return the training and validation features. If they are not cached, one process extracts them."""
        if self._stores is None:
            train, validation = self.tokens()
            training: FeatureStore | OnlineFeatures
            with stage("features"):
                if self.features == "online":
                    training = OnlineFeatures(self.target, train)
                else:
                    every = self._store(self._every, "training features")
                    training = every.subset(self._kept)  # type: ignore[union-attr]
                self._stores = training, self._store(validation, "validation features")
        return self._stores

    def _store(self, tokens: list[Tokens], name: str) -> FeatureStore | OnlineFeatures:
        if self.features == "online":
            return OnlineFeatures(self.target, tokens)
        return extract_features(self.target, tokens, self.cache_dir, name=name, eight_bit=self.eight_bit_cache)

    def data_hash(self) -> str:
        """Return a hash of the token ids and masks of all sequences."""
        digest = hashlib.sha256()
        for sequence in [*self.tokens()[0], *self.tokens()[1]]:
            digest.update(sequence.input_ids.numpy().tobytes())
            digest.update(sequence.loss_mask.numpy().tobytes())
        return digest.hexdigest()[:12]

    def most_frequent_tokens(self, size: int, kept: Tensor | None = None) -> tuple[Tensor, float]:
        """Return the `size` most frequent answer tokens of the training data, sorted by id, and the share they cover.

        Args:
            size: number of tokens.
            kept: tokens that come before more frequent ones, if all of them fit into `size`.

        Raises:
            ValueError: `size` is not in the range of the vocabulary.
        """
        counts: Counter[int] = Counter()
        for sequence in self.tokens()[0]:
            answer = sequence.loss_mask.roll(1)
            counts.update(sequence.input_ids[answer].tolist())
        for token in self.target.eos_token_ids:
            counts[token] += 1  # the end of turn is outside the loss mask, but is drafted
        vocab_size = self.target.head.vocab_size
        if not 0 < size <= vocab_size:
            raise ValueError(
                f"model.draft.vocab_size={size} must be in 1 … {vocab_size} (the target's vocabulary), or null."
            )
        first = set(kept.tolist()) if kept is not None and len(kept) <= size else set()
        ranked = sorted(range(vocab_size), key=lambda token: (token not in first, -counts[token], token))[:size]
        coverage = sum(counts[token] for token in ranked) / max(1, counts.total())
        return torch.tensor(sorted(ranked)), coverage

    @property
    def batches_per_epoch(self) -> int:
        """Batches per epoch, before gradient accumulation."""
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return max(1, len(self.tokens()[0]) // (self.batch_size * world_size))

    def prepare_data(self) -> None:
        """Extract the features. Lightning calls this in one process per node."""
        self.stores()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return all batches of the run, from the first that a resumed run has not used."""
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
        """Return the loss positions of an optimizer step, over all processes and accumulated batches.

        The batches of a run are numbered (BatchOrder), so this needs no communication and no prefetching.
        """
        assert self.trainer is not None and self._order is not None
        accumulated = self.trainer.accumulate_grad_batches
        batches = (self._order.batch(step * accumulated + number)[1] for number in range(accumulated))
        train = self.tokens()[0]
        return sum(int(train[index].loss_mask[:-1].sum()) for batch in batches for index in batch)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation sequences, each in one process. One without loss positions fills the last batch."""
        store, trainer = self.stores()[1], self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        mine = [(0, index) for index in range(rank, len(store), world_size)]
        mine.sort(key=lambda key: store.length(key[1]))
        if len(mine) * world_size < len(store):  # equal numbers of batches: ZeRO-3 gathers the weights in every forward
            mine.append((-1, 0))
        batches = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        return self._loader(FeatureDataset(store), batch_sampler=batches)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the output of `collate` to a device."""
        features, noisy = batch
        return features.to(device, non_blocking=True), noisy if noisy is None else noisy.to(device, non_blocking=True)

    def _loader(self, dataset: FeatureDataset, batch_sampler: Any) -> DataLoader[Any]:
        return PrefetchingLoader(
            dataset,
            ahead=self.prefetch,
            batch_sampler=batch_sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _check_features(features: str, num_workers: int, eight_bit_cache: bool) -> None:
    if features not in ("cached", "online"):
        raise ValueError(f"data.features={features} cannot be used: it is cached or online.")
    if features == "online" and (num_workers or eight_bit_cache):
        raise ValueError(
            "data.features=online runs the target in the training process and stores nothing: set data.num_workers=0 "
            f"(it is {num_workers}) and data.eight_bit_cache=false (it is {str(eight_bit_cache).lower()})."
        )
