"""The files of a feature set: safetensors shards, each with a JSON note. A shard is complete or absent."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hass_lightning.runs.files import write_whole
from hass_lightning.runs.lock import file_lock
from hass_lightning.target_model.source import read_only_cache, sha256_file

log = logging.getLogger(__name__)
SHARD_SIZE = 256  # sequences per shard


@lru_cache(maxsize=64)
def open_shard(path: str) -> Any:
    """Open a shard for reading. It stays open."""
    return safe_open(path, framework="pt")


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"shard-{number:05d}.safetensors"


def in_turn(folder: Path, numbers: Sequence[int]) -> Iterator[int]:
    """Yield each shard while this process holds its lock: first the free ones, then those that others were writing.

    Processes that are started together share the work, and none continues before all shards exist.

    Raises:
        ValueError: the folder cannot be written to.
    """
    if not os.access(folder, os.W_OK):
        raise read_only_cache("such features", folder, OSError(errno.EROFS, os.strerror(errno.EROFS)))
    left: list[int] = []
    for number in numbers:
        try:
            with file_lock(folder / f".lock-{number:05d}", timeout=0):
                yield number
        except Timeout:
            left.append(number)
    for number in left:
        with file_lock(folder / f".lock-{number:05d}"):
            yield number


def is_whole(folder: Path, number: int) -> bool:
    """Return whether a shard exists and matches its checksum. A damaged one is logged and computed again."""
    path = folder / shard_name(number)
    note = path.with_suffix(".json")
    if not path.exists() or not note.exists():
        return False
    state = path.stat()
    seen = [state.st_size, state.st_mtime_ns]
    try:
        expected = json.loads(note.read_text())
        if expected.get("verified") == seen:  # unchanged: do not read terabytes again at every start
            return True
        if sha256_file(path) == expected["sha256"]:
            with suppress(OSError):  # a read-only cache is verified each time
                write_whole(note, json.dumps(expected | {"verified": seen}))
            return True
        log.warning("the feature shard %s does not match its checksum: it is computed again", path)
    except (json.JSONDecodeError, KeyError, SafetensorError):
        log.warning("the note of the feature shard %s is damaged: it is computed again", path)
    return False


def check_disk(folder: Path, num_bytes: int, num_tokens: int) -> None:
    """Log the size of a feature set, and refuse one that does not fit on the disk.

    Raises:
        ValueError: naming the sizes and the keys that change them.
    """
    free = shutil.disk_usage(folder).free
    size = f"{num_bytes / 1e9:.2f} GB for {num_tokens:,} tokens"
    log.info("features take %s in %s (%.1f GB free)", size, folder, free / 1e9)
    if num_bytes * 1.05 > free:
        raise ValueError(
            f"the features need {size}, but {folder} has {free / 1e9:.2f} GB free: lower data.max_answer_tokens, or "
            "set paths.cache_dir to a larger disk."
        )


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor], more: dict[str, float]) -> None:
    """Write a shard under another name and rename it, so that an existing shard is complete.

    Args:
        more: values for its note.

    Raises:
        ValueError: the disk is full or cannot be written to.
    """
    path = folder / shard_name(number)
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
    open_shard.cache_clear()
