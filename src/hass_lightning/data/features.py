"""The target's features on disk (safetensors shards, written once, content-addressed, checked, resumable) or online.

A feature is the last hidden state after the final norm, what the LM head reads (hass.md §1.1, §4.3).
Shapes: N tokens of a shard, D hidden, T tokens of a sequence (types.py has the legend).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hass_lightning.data.eight_bit import dequantize, fidelity, quantize
from hass_lightning.files import write_whole
from hass_lightning.progress import progress_bar
from hass_lightning.target.model import TargetModel
from hass_lightning.target.source import cache_root, sha256_file
from hass_lightning.types import Tokens

log = logging.getLogger(__name__)
LAYOUT = "1"  # raise it when the stored content changes
SHARD_SIZE = 256  # sequences a shard


def feature_key(target: TargetModel, tokens: Sequence[Tokens], shard_size: int, eight_bit: bool = False) -> str:
    """Content hash of what the shards depend on: target, dtype, tokens, masks, sequences a shard, layout."""
    stored = f"{target.dtype}:int8" if eight_bit else f"{target.dtype}"
    digest = hashlib.sha256(f"{LAYOUT}:{shard_size}:{target.fingerprint}:{stored}".encode())
    for sequence in tokens:
        digest.update(sequence.input_ids.numpy().tobytes())
        digest.update(sequence.loss_mask.numpy().tobytes())
    return digest.hexdigest()[:16]


def bytes_per_token(target: TargetModel, eight_bit: bool = False) -> int:
    """Bytes one token takes on disk: the feature (and its scale), its id, its argmax, its mask."""
    feature = target.hidden_size + 4 if eight_bit else target.hidden_size * torch.finfo(target.dtype).bits // 8
    return feature + 4 + 4 + 1


@dataclass(frozen=True)
class FeatureStore:
    """The finished shards of one set of sequences, in the order they were given."""

    folder: Path
    sequences: tuple[tuple[str, int, int], ...]  # (shard file, first token, number of tokens) of each sequence
    ids: tuple[str, ...]
    dtype: torch.dtype = torch.float32  # of the features that are read

    def __len__(self) -> int:
        return len(self.sequences)

    def length(self, index: int) -> int:
        """Tokens of a sequence."""
        return self.sequences[index][2]

    def subset(self, indices: Sequence[int]) -> FeatureStore:
        """These sequences alone, in this order, of the same files."""
        sequences, ids = ([values[index] for index in indices] for values in (self.sequences, self.ids))
        return replace(self, sequences=tuple(sequences), ids=tuple(ids))  # type: ignore[arg-type]

    def prepare(self, indices: Sequence[int]) -> None:
        """Nothing: what is on disk is read one by one."""

    def read(self, index: int) -> dict[str, Tensor]:
        """One sequence: input_ids, target_ids [T] int64, loss_mask [T] bool, features [T, D]."""
        shard, first, count = self.sequences[index]
        file = _opened(str(self.folder / shard))
        part = {name: file.get_slice(name)[first : first + count] for name in file.keys()}  # noqa: SIM118
        if "scales" in part:
            part["features"] = dequantize(part["features"], part.pop("scales")).to(self.dtype)
        return _with_long_ids(part)


@dataclass
class OnlineFeatures:
    """The same as a `FeatureStore`, computed by the target in this process when it is asked for; nothing is stored."""

    target: TargetModel
    tokens: Sequence[Tokens]
    batch_tokens: int = 4096
    _prepared: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ids(self) -> tuple[str, ...]:
        """The sequences' names."""
        return tuple(sequence.id for sequence in self.tokens)

    def length(self, index: int) -> int:
        """Tokens of a sequence."""
        return len(self.tokens[index])

    def prepare(self, indices: Sequence[int]) -> None:
        """Run the target over the sequences of the next batch together."""
        part = _extract_shard(self.target, [self.tokens[index] for index in indices], self.batch_tokens)
        pieces = {name: value.split([self.length(index) for index in indices]) for name, value in part.items()}
        self._prepared = {
            index: {name: piece[number] for name, piece in pieces.items()} for number, index in enumerate(indices)
        }

    def read(self, index: int) -> dict[str, Tensor]:
        """One sequence, as `FeatureStore.read` gives it."""
        if index not in self._prepared:
            self.prepare([index])
        return _with_long_ids(self._prepared[index])


def _with_long_ids(part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.long() if name.endswith("_ids") else value for name, value in part.items()}


@lru_cache(maxsize=64)
def _opened(path: str):
    return safe_open(path, framework="pt")


def extract_features(
    target: TargetModel,
    tokens: Sequence[Tokens],
    cache_dir: str | Path | None = None,
    shard_size: int = SHARD_SIZE,
    batch_tokens: int = 4096,
    name: str = "features",
    eight_bit: bool = False,
) -> FeatureStore:
    """The features of `tokens`, from the cache or extracted now; a killed extraction goes on at the next shard.

    Args:
        cache_dir: where all feature sets live (default: the user's cache folder). shard_size: sequences a shard.
        batch_tokens: padded tokens a forward. eight_bit: store int8 and a scale a row (eight_bit.py).

    Raises:
        ValueError: not enough disk.
    """
    folder = _folder(target, tokens, cache_dir, shard_size, eight_bit)
    folder.mkdir(parents=True, exist_ok=True)
    shards = [tokens[start : start + shard_size] for start in range(0, len(tokens), shard_size)]
    os.utime(folder)  # when it was used last (feature_sets.py)
    missing = [number for number in range(len(shards)) if not _is_whole(folder, number)]
    if missing:
        num_tokens = sum(len(sequence) for number in missing for sequence in shards[number])
        _check_disk(folder, num_tokens * bytes_per_token(target, eight_bit), num_tokens)
        with progress_bar(name, num_tokens, "token") as bar:
            for number in _in_turn(folder, missing):
                if not _is_whole(folder, number):
                    for left_by_a_kill in folder.glob(f".{_shard_name(number)}.*"):
                        left_by_a_kill.unlink()
                    tensors, note = _extract_shard(target, shards[number], batch_tokens, bar.update), {}
                    if eight_bit:
                        features, marked = tensors["features"], tensors["target_ids"] >= 0
                        tensors["features"], tensors["scales"] = quantize(features)
                        restored = dequantize(tensors["features"], tensors["scales"])
                        note = fidelity(target.head, features[marked], restored[marked])
                        log.info("%s in 8 bits, shard %d: %s", name, number, note)
                    _write_shard(folder, number, tensors, note)
    else:
        log.info("%s: reusing %s", name, folder)
    return _stored(folder, shards, target.dtype)


def first_cached_shard(
    target: TargetModel, tokens: Sequence[Tokens], cache_dir: str | Path | None = None, eight_bit: bool = False
) -> FeatureStore | None:
    """The sequences of the first shard that `extract_features` left of these tokens; None where it left none."""
    folder = _folder(target, tokens, cache_dir, SHARD_SIZE, eight_bit)
    if not (folder / _shard_name(0)).exists():
        return None
    return _stored(folder, [tokens[:SHARD_SIZE]], target.dtype)


def _folder(
    target: TargetModel, tokens: Sequence[Tokens], cache_dir: str | Path | None, shard_size: int, eight_bit: bool
) -> Path:
    return Path(cache_dir or cache_root()) / "features" / feature_key(target, tokens, shard_size, eight_bit)


def _stored(folder: Path, shards: Sequence[Sequence[Tokens]], dtype: torch.dtype) -> FeatureStore:
    """Where each sequence of the shards begins."""
    sequences, ids = [], []
    for number, shard in enumerate(shards):
        first = 0
        for sequence in shard:
            sequences.append((_shard_name(number), first, len(sequence)))
            ids.append(sequence.id)
            first += len(sequence)
    return FeatureStore(folder, tuple(sequences), tuple(ids), dtype)


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
    state = path.stat()
    seen = [state.st_size, state.st_mtime_ns]
    try:
        expected = json.loads(note.read_text())
        if expected.get("verified") == seen:  # unchanged since: terabytes are not read again at every start
            return True
        if sha256_file(path) == expected["sha256"]:
            with suppress(OSError):  # a cache that may only be read is verified each time
                write_whole(note, json.dumps(expected | {"verified": seen}))
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


def _extract_shard(
    target: TargetModel,
    shard: Sequence[Tokens],
    batch_tokens: int,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, Tensor]:
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
            done(len(sequence))
    input_ids = torch.cat([sequence.input_ids for sequence in shard]).int()
    loss_mask = torch.cat([sequence.loss_mask for sequence in shard])
    return {"features": features, "input_ids": input_ids, "loss_mask": loss_mask, "target_ids": target_ids}


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor], more: dict[str, float]) -> None:
    """Write aside, then rename: a shard that is there is whole. `more` goes into its note."""
    path = folder / _shard_name(number)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, aside)
        note = {
            "sha256": sha256_file(aside),
            "num_tokens": tensors["input_ids"].shape[0],
            "bytes": aside.stat().st_size,
            **more,
        }
        os.replace(aside, path)
        write_whole(path.with_suffix(".json"), json.dumps(note))
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise ValueError(f"the feature shard {path} could not be written ({error}): free disk space, or move "
                         "paths.cache_dir; finished shards are kept.") from error  # fmt: skip
    _opened.cache_clear()
