"""List and delete the feature sets on disk (`hass-prepare cache=list|prune`)."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from filelock import Timeout

from hass_lightning.runs.lock import file_lock

DAY_SECONDS = 86_400.0


def list_feature_sets(root: Path) -> list[dict[str, Any]]:
    """Name, shards, bytes and days since the last use of every feature set below `root`, the oldest first."""
    folders = sorted((path for path in root.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    return [
        {
            "name": folder.name,
            "num_shards": len(shards := list(folder.glob("shard-*.safetensors"))),
            "bytes": sum(shard.stat().st_size for shard in shards),
            "days_unused": round((time.time() - folder.stat().st_mtime) / DAY_SECONDS, 2),
        }
        for folder in folders
    ]


def prune_feature_sets(root: Path, days: float) -> list[dict[str, Any]]:
    """Remove the feature sets that no command used for `days`, and say which; one that is being written stays."""
    removed = []
    for each in list_feature_sets(root):
        folder = root / each["name"]
        if each["days_unused"] >= days and not _is_being_written(folder):
            shutil.rmtree(folder)
            removed.append(each)
    return removed


def _is_being_written(folder: Path) -> bool:
    for file in folder.glob(".lock*"):
        try:
            with file_lock(str(file).removesuffix(".lease"), timeout=0):
                pass
        except Timeout:
            return True
    return False
