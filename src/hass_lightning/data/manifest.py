"""Manifest of the features that a head was trained on: keys, counts and checksums. It is stored with every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hass_lightning.data.features import feature_key
from hass_lightning.data.shards import SHARD_SIZE
from hass_lightning.target_model.model import TargetModel
from hass_lightning.types import Tokens


def write_feature_manifest(
    path: Path, target: TargetModel, tokens: Sequence[Sequence[Tokens]], stores: Sequence[Any]
) -> dict[str, str]:
    """Write the manifest of the training and the validation features.

    Args:
        tokens: (training, validation) sequences. stores: their features. A store on disk has a `folder` with its notes.

    Returns:
        the content key of each split. Equal keys mean equal target, tokens, masks, dtype and layout (8 bits or not).
    """
    manifest: dict[str, Any] = {"target": target.name, "target_fingerprint": target.fingerprint}
    for split, sequences, store in zip(("train", "validation"), tokens, stores, strict=True):
        folder = getattr(store, "folder", None)
        notes = sorted(folder.glob("shard-*.json")) if folder is not None else []
        manifest[split] = {
            "key": feature_key(target, sequences, SHARD_SIZE) if folder is None else folder.name,
            "num_sequences": len(sequences),
            "num_tokens": sum(len(sequence) for sequence in sequences),
            "num_marked_tokens": sum(int(sequence.loss_mask.sum()) for sequence in sequences),
            "shards": {note.stem: json.loads(note.read_text()) for note in notes},
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    return {split: manifest[split]["key"] for split in ("train", "validation")}
