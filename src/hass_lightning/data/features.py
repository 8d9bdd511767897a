"""The target's features on disk: safetensors shards, written once, content-addressed, checked, resumable.

A feature is the last hidden state after the final norm, what the LM head reads (hass.md §1.1, §4.3).
Shapes: N tokens of a shard, D hidden, T tokens of a sequence (types.py has the legend).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hass_lightning.progress import progress_bar
from hass_lightning.target.model import TargetModel
from hass_lightning.target.source import cache_root, sha256_file
from hass_lightning.types import Tokens

log = logging.getLogger(__name__)
LAYOUT = "1"  # raise it when the stored content changes


def feature_key(target: TargetModel, tokens: Sequence[Tokens], shard_size: int) -> str:
    """Content hash of what the shards depend on: target, dtype, tokens, masks, sequences a shard, layout."""
    digest = hashlib.sha256(f"{LAYOUT}:{shard_size}:{target.fingerprint}:{target.dtype}".encode())
    for sequence in tokens:
        digest.update(sequence.input_ids.numpy().tobytes())
        digest.update(sequence.loss_mask.numpy().tobytes())
    return digest.hexdigest()[:16]


def bytes_per_token(target: TargetModel) -> int:
    """Bytes one token takes on disk: the feature, its id, its argmax, its mask."""
    return target.hidden_size * torch.finfo(target.dtype).bits // 8 + 4 + 4 + 1


@dataclass(frozen=True)
class FeatureStore:
    """The finished shards of one set of sequences, in the order they were given."""

    folder: Path
    sequences: tuple[tuple[str, int, int], ...]  # (shard file, first token, number of tokens) of each sequence
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sequences)

    def length(self, index: int) -> int:
        """Tokens of a sequence."""
        return self.sequences[index][2]

    def read(self, index: int) -> dict[str, Tensor]:
        """One sequence: input_ids, target_ids [T] int64, loss_mask [T] bool, features [T, D]."""
        shard, first, count = self.sequences[index]
        file = _opened(str(self.folder / shard))
        part = {name: file.get_slice(name)[first : first + count] for name in file.keys()}  # noqa: SIM118
        return {name: value.long() if name.endswith("_ids") else value for name, value in part.items()}


@lru_cache(maxsize=64)
def _opened(path: str):
    return safe_open(path, framework="pt")


def extract_features(
    target: TargetModel,
    tokens: Sequence[Tokens],
    cache_dir: str | Path | None = None,
    shard_size: int = 256,
    batch_tokens: int = 4096,
    name: str = "features",
) -> FeatureStore:
    """The features of `tokens`, from the cache or extracted now; a killed extraction goes on at the next shard.

    Args:
        cache_dir: where all feature sets live (default: the user's cache folder). shard_size: sequences a shard.
        batch_tokens: padded tokens a forward.

    Raises:
        ValueError: not enough disk.
    """
    folder = Path(cache_dir or cache_root()) / "features" / feature_key(target, tokens, shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    shards = [tokens[start : start + shard_size] for start in range(0, len(tokens), shard_size)]
    os.utime(folder)  # when it was used last (feature_sets.py)
    missing = [number for number in range(len(shards)) if not _is_whole(folder, number)]
    if missing:
        num_tokens = sum(len(sequence) for number in missing for sequence in shards[number])
        _check_disk(folder, num_tokens * bytes_per_token(target), num_tokens)
        with progress_bar(name, num_tokens, "token") as bar:
            for number in _in_turn(folder, missing):
                if not _is_whole(folder, number):
                    for left_by_a_kill in folder.glob(f".{_shard_name(number)}.*"):
                        left_by_a_kill.unlink()
                    _write_shard(folder, number, _extract_shard(target, shards[number], batch_tokens, bar))
    else:
        log.info("%s: reusing %s", name, folder)
    sequences, ids = [], []
    for number, shard in enumerate(shards):
        first = 0
        for sequence in shard:
            sequences.append((_shard_name(number), first, len(sequence)))
            ids.append(sequence.id)
            first += len(sequence)
    return FeatureStore(folder, tuple(sequences), tuple(ids))


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _in_turn(folder: Path, numbers: Sequence[int]) -> Iterator[int]:
    """Each shard while this process holds its lock: first those that are free, then those that others were making.

    So processes started together share the work, and none goes on before all of it is done.
    """
    left: list[int] = []
    for number in numbers:
        try:
            with FileLock(folder / f".lock-{number:05d}", timeout=0):
                yield number
        except Timeout:
            left.append(number)
    for number in left:
        with FileLock(folder / f".lock-{number:05d}"):
            yield number


def _is_whole(folder: Path, number: int) -> bool:
    """Whether a shard is there and matches its checksum; a damaged one is named and made again."""
    path = folder / _shard_name(number)
    note = path.with_suffix(".json")
    if not path.exists() or not note.exists():
        return False
    try:
        expected = json.loads(note.read_text())
        if sha256_file(path) == expected["sha256"]:
            return True
        log.warning("the feature shard %s does not match its checksum: it is made again", path)
    except (json.JSONDecodeError, KeyError, SafetensorError):
        log.warning("the note of the feature shard %s is damaged: it is made again", path)
    return False


def _check_disk(folder: Path, num_bytes: int, num_tokens: int) -> None:
    free = shutil.disk_usage(folder).free
    size = f"{num_bytes / 1e9:.2f} GB for {num_tokens:,} tokens"
    log.info("features take %s in %s (%.1f GB free)", size, folder, free / 1e9)
    if num_bytes * 1.05 > free:
        raise ValueError(
            f"the features need {size}, but {folder} has {free / 1e9:.2f} GB free: lower data.max_answer_tokens, or "
            "set paths.cache_dir to a larger disk."
        )


def _extract_shard(target: TargetModel, shard: Sequence[Tokens], batch_tokens: int, bar) -> dict[str, Tensor]:
    """Length-bucketed forwards; the argmax is taken only at features that a marked row is compared with."""
    offsets = torch.tensor([0, *(len(sequence) for sequence in shard)]).cumsum(0)
    total = int(offsets[-1])
    features = torch.empty(total, target.hidden_size, dtype=target.dtype)
    target_ids = torch.full((total,), -1, dtype=torch.int32)
    order = sorted(range(len(shard)), key=lambda index: len(shard[index]))
    while order:
        longest = len(shard[order[-1]])
        batch = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // longest)))]
        input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, index in enumerate(batch):
            input_ids[row, : len(shard[index])] = shard[index].input_ids
        encoded = target.encode(input_ids)
        for row, index in enumerate(batch):
            sequence, first, last = shard[index], int(offsets[index]), int(offsets[index + 1])
            own = encoded[row, : len(sequence)]
            features[first:last] = own.cpu()
            wanted = sequence.loss_mask.roll(1)  # row t is compared with feature t+1
            wanted[0] = False
            ids = target.head.logits(own[wanted.to(own.device)]).max(-1).indices  # argmax is slow in bf16 on a CPU
            target_ids[first:last][wanted] = ids.int().cpu()
            bar.update(len(sequence))
    input_ids = torch.cat([sequence.input_ids for sequence in shard]).int()
    loss_mask = torch.cat([sequence.loss_mask for sequence in shard])
    return {"features": features, "input_ids": input_ids, "loss_mask": loss_mask, "target_ids": target_ids}


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    """Write aside, then rename: a shard that is there is whole."""
    path = folder / _shard_name(number)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, aside)
        note = {
            "sha256": sha256_file(aside),
            "num_tokens": tensors["input_ids"].shape[0],
            "bytes": aside.stat().st_size,
        }
        os.replace(aside, path)
        path.with_suffix(".json").write_text(json.dumps(note))
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise ValueError(f"the feature shard {path} could not be written ({error}): free disk space, or move "
                         "paths.cache_dir; finished shards are kept.") from error  # fmt: skip
    _opened.cache_clear()
