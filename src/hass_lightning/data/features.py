"""The target's features, on disk (content-addressed safetensors shards with checksums) or computed online.

A feature is the last hidden state after the final norm, the input of the LM head (docs/method.md, Notation), preceded
by the inputs of the layers in `TargetModel.feature_layers`.
Shapes: N tokens of a shard, D hidden, W width of the features, T tokens of a sequence (types.py has the legend).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from hass_lightning.data.eight_bit import dequantize, fidelity, quantize
from hass_lightning.data.shards import SHARD_SIZE, check_disk, in_turn, is_whole, open_shard, shard_name, write_shard
from hass_lightning.runs.progress import progress_bar
from hass_lightning.target_model.model import TargetModel
from hass_lightning.target_model.source import cache_root, read_only_cache
from hass_lightning.types import Tokens

log = logging.getLogger(__name__)
LAYOUT = "1"  # increase when the stored content changes


def feature_key(target: TargetModel, tokens: Sequence[Tokens], shard_size: int, eight_bit: bool = False) -> str:
    """Return a hash of all that the shards depend on: target, dtype, layers, tokens, masks, shard size, layout."""
    stored = f"{target.dtype}:int8" if eight_bit else f"{target.dtype}"
    stored += f":layers={','.join(map(str, target.feature_layers))}" if target.feature_layers else ""
    digest = hashlib.sha256(f"{LAYOUT}:{shard_size}:{target.weights_fingerprint}:{stored}".encode())
    for sequence in tokens:
        digest.update(sequence.input_ids.numpy().tobytes())
        digest.update(sequence.loss_mask.numpy().tobytes())
    return digest.hexdigest()[:16]


def bytes_per_token(target: TargetModel, eight_bit: bool = False) -> int:
    """Return the bytes per token on disk: feature (and its scales), token id, argmax and mask."""
    scales = 4 * (len(target.feature_layers) + 1)
    feature = target.feature_size + scales if eight_bit else target.feature_size * torch.finfo(target.dtype).bits // 8
    return feature + 4 + 4 + 1


@dataclass(frozen=True)
class FeatureStore:
    """The finished shards of one set of sequences, in the order of the sequences."""

    folder: Path
    sequences: tuple[tuple[str, int, int], ...]  # (shard file, first token, number of tokens) of each sequence
    ids: tuple[str, ...]
    dtype: torch.dtype = torch.float32  # dtype of the features that are returned

    def __len__(self) -> int:
        return len(self.sequences)

    def length(self, index: int) -> int:
        """Return the number of tokens of a sequence."""
        return self.sequences[index][2]

    def subset(self, indices: Sequence[int]) -> FeatureStore:
        """Return a store of these sequences in this order, on the same files."""
        sequences, ids = ([values[index] for index in indices] for values in (self.sequences, self.ids))
        return replace(self, sequences=tuple(sequences), ids=tuple(ids))  # type: ignore[arg-type]

    def prepare(self, indices: Sequence[int]) -> None:
        """Do nothing: sequences on disk are read one by one."""

    def read(self, index: int) -> dict[str, Tensor]:
        """Return one sequence: input_ids and target_ids [T] int64, loss_mask [T] bool, features [T, W]."""
        shard, first, count = self.sequences[index]
        file = open_shard(str(self.folder / shard))
        part = {name: file.get_slice(name)[first : first + count] for name in file.keys()}  # noqa: SIM118
        if "scales" in part:
            part["features"] = dequantize(part["features"], part.pop("scales")).to(self.dtype)
        return _with_long_ids(part)


@dataclass
class OnlineFeatures:
    """Like `FeatureStore`, but the target computes the features in this process on demand. Nothing is stored."""

    target: TargetModel
    tokens: Sequence[Tokens]
    batch_tokens: int = 4096
    _prepared: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the sequences."""
        return tuple(sequence.id for sequence in self.tokens)

    def length(self, index: int) -> int:
        """Return the number of tokens of a sequence."""
        return len(self.tokens[index])

    def prepare(self, indices: Sequence[int]) -> None:
        """Compute the features of the sequences of the next batch together."""
        part = _extract_shard(self.target, [self.tokens[index] for index in indices], self.batch_tokens)
        pieces = {name: value.split([self.length(index) for index in indices]) for name, value in part.items()}
        self._prepared = {
            index: {name: piece[number] for name, piece in pieces.items()} for number, index in enumerate(indices)
        }

    def read(self, index: int) -> dict[str, Tensor]:
        """Return one sequence in the format of `FeatureStore.read`."""
        if index not in self._prepared:
            self.prepare([index])
        return _with_long_ids(self._prepared[index])


def _with_long_ids(part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.long() if name.endswith("_ids") else value for name, value in part.items()}


def extract_features(
    target: TargetModel,
    tokens: Sequence[Tokens],
    cache_dir: str | Path | None = None,
    shard_size: int = SHARD_SIZE,
    batch_tokens: int = 4096,
    name: str = "features",
    eight_bit: bool = False,
) -> FeatureStore:
    """Return the features of `tokens` from the cache, or extract them. An interrupted extraction resumes.

    Args:
        cache_dir: folder of all feature sets (default: the user's cache folder). shard_size: sequences per shard.
        batch_tokens: padded tokens per forward. eight_bit: store int8 and one scale per feature (eight_bit.py).

    Raises:
        ValueError: the disk is too small or cannot be written to.
    """
    folder = _folder(target, tokens, cache_dir, shard_size, eight_bit)
    _mark_as_used(folder)
    shards = [tokens[start : start + shard_size] for start in range(0, len(tokens), shard_size)]
    missing = [number for number in range(len(shards)) if not is_whole(folder, number)]
    if not missing:
        log.info("%s: reusing %s", name, folder)
        return _stored(folder, shards, target.dtype)
    num_tokens = sum(len(sequence) for number in missing for sequence in shards[number])
    check_disk(folder, num_tokens * bytes_per_token(target, eight_bit), num_tokens)
    with progress_bar(name, num_tokens, "token") as bar:
        for number in in_turn(folder, missing):
            if is_whole(folder, number):
                continue  # another process has written it
            for left_by_a_kill in folder.glob(f".{shard_name(number)}.*"):
                left_by_a_kill.unlink()
            tensors, note = _extract_shard(target, shards[number], batch_tokens, bar.update), {}
            if eight_bit:
                note = _to_eight_bit(target, tensors)
                log.info("%s in 8 bits, shard %d: %s", name, number, note)
            write_shard(folder, number, tensors, note)
    return _stored(folder, shards, target.dtype)


def _mark_as_used(folder: Path) -> None:
    """Create the folder of a feature set, or update its time of last use (feature_sets.py).

    Raises:
        ValueError: it does not exist and cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError as error:
        if not folder.is_dir():
            raise read_only_cache("such features", folder, error) from error


def _to_eight_bit(target: TargetModel, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Replace the features of a shard by int8 and scales. Return how well the target's distributions are preserved."""
    features, marked = tensors["features"], tensors["target_ids"] >= 0
    tensors["features"], tensors["scales"] = quantize(features, len(target.feature_layers) + 1)
    restored = dequantize(tensors["features"], tensors["scales"])
    return fidelity(target.head, features[marked], restored[marked])


def first_cached_shard(
    target: TargetModel, tokens: Sequence[Tokens], cache_dir: str | Path | None = None, eight_bit: bool = False
) -> FeatureStore | None:
    """Return the sequences of the first shard that `extract_features` stored for these tokens, or None."""
    folder = _folder(target, tokens, cache_dir, SHARD_SIZE, eight_bit)
    if not (folder / shard_name(0)).exists():
        return None
    return _stored(folder, [tokens[:SHARD_SIZE]], target.dtype)


def _folder(
    target: TargetModel, tokens: Sequence[Tokens], cache_dir: str | Path | None, shard_size: int, eight_bit: bool
) -> Path:
    return Path(cache_dir or cache_root()) / "features" / feature_key(target, tokens, shard_size, eight_bit)


def _stored(folder: Path, shards: Sequence[Sequence[Tokens]], dtype: torch.dtype) -> FeatureStore:
    """Return a store with the position of each sequence in the shards."""
    sequences, ids = [], []
    for number, shard in enumerate(shards):
        first = 0
        for sequence in shard:
            sequences.append((shard_name(number), first, len(sequence)))
            ids.append(sequence.id)
            first += len(sequence)
    return FeatureStore(folder, tuple(sequences), tuple(ids), dtype)


def _extract_shard(
    target: TargetModel, shard: Sequence[Tokens], batch_tokens: int, done: Callable[[int], object] = lambda count: None
) -> dict[str, Tensor]:
    """Compute features in length buckets, and the argmax only where a loss position needs it."""
    offsets = torch.tensor([0, *(len(sequence) for sequence in shard)]).cumsum(0)
    total = int(offsets[-1])
    features = torch.empty(total, target.feature_size, dtype=target.dtype)
    target_ids = torch.full((total,), -1, dtype=torch.int32)
    for batch in _length_buckets(shard, batch_tokens):
        encoded = target.encode(_padded_ids([shard[index] for index in batch]))
        for row, index in enumerate(batch):
            sequence, first, last = shard[index], int(offsets[index]), int(offsets[index + 1])
            own = encoded[row, : len(sequence)]
            features[first:last] = own.cpu()
            wanted = sequence.loss_mask.roll(1)  # position t is compared with feature t+1
            wanted[0] = False
            ids = target.head.logits(own[wanted.to(own.device)]).max(-1).indices  # argmax is slow in bf16 on a CPU
            target_ids[first:last][wanted] = ids.int().cpu()
            done(len(sequence))
    input_ids = torch.cat([sequence.input_ids for sequence in shard]).int()
    loss_mask = torch.cat([sequence.loss_mask for sequence in shard])
    return {"features": features, "input_ids": input_ids, "loss_mask": loss_mask, "target_ids": target_ids}


def _length_buckets(shard: Sequence[Tokens], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of sequences of similar length, longest first, up to `batch_tokens` padded tokens at a time."""
    order = sorted(range(len(shard)), key=lambda index: len(shard[index]))
    while order:
        longest = len(shard[order[-1]])
        yield [order.pop() for _ in range(min(len(order), max(1, batch_tokens // longest)))]


def _padded_ids(sequences: Sequence[Tokens]) -> Tensor:
    """Return token ids [B, T], right-padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence([sequence.input_ids for sequence in sequences], batch_first=True)
