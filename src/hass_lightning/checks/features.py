"""Check of stored features: a few sequences are computed again and compared.

Shapes: T tokens, D hidden (see the legend in types.py).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hass_lightning.checks.finding import Finding, error, ok
from hass_lightning.data.features import FeatureStore, extract_features, first_cached_shard
from hass_lightning.target_model.model import TargetModel
from hass_lightning.types import Tokens

TOLERANCE = 0.05  # relative; differences between batched and single bf16, or between 8 bits and bf16, are below 0.02


def check_features(
    target: TargetModel,
    tokens: Sequence[Tokens],
    cache_dir: str | Path | None,
    eight_bit: bool = False,
    num_sequences: int = 4,
) -> tuple[Finding, float]:
    """Compare stored features with the target's, one sequence at a time, and time the target.

    Without a cached shard, a few sequences are extracted into a temporary folder, so that batching, padding and the
    file format are checked in any case.

    Args:
        target: the target.
        tokens: the training sequences.
        cache_dir: folder of the feature cache.
        eight_bit: whether features are stored in 8 bits.
        num_sequences: number of sequences to compare.

    Returns:
        (the finding, the target's tokens per second).
    """
    store = first_cached_shard(target, tokens, cache_dir, eight_bit)
    if store is not None:
        chosen = torch.linspace(0, len(store) - 1, min(num_sequences, len(store))).long().tolist()
        return _compare(
            target, store, [tokens[index] for index in chosen], chosen, f"the cached shard in {store.folder}"
        )
    with tempfile.TemporaryDirectory() as folder:
        sample = list(tokens[:num_sequences])
        store = extract_features(target, sample, folder, name="sample features")
        return _compare(target, store, sample, list(range(len(sample))), "a fresh sample (nothing is cached yet)")


def _compare(
    target: TargetModel, store: FeatureStore, sample: Sequence[Tokens], indices: Sequence[int], where: str
) -> tuple[Finding, float]:
    worst, wrong_ids, asked, seconds = 0.0, 0, 0, 0.0
    for sequence, index in zip(sample, indices, strict=True):
        stored = store.read(index)
        started = time.perf_counter()
        fresh = target.encode(sequence.input_ids[None])[0]  # [T, D]
        wanted = target.head.logits(fresh).argmax(-1).cpu()
        seconds += time.perf_counter() - started
        fresh = fresh.cpu().float()
        gap = (stored["features"].float() - fresh).norm(dim=-1) / fresh.norm(dim=-1).clamp(min=1e-6)  # [T]
        worst = max(worst, float(gap.max()))
        known = stored["target_ids"] >= 0
        asked += int(known.sum())
        wrong_ids += int((stored["target_ids"] != wanted)[known].sum())
    speed = sum(len(sequence) for sequence in sample) / max(seconds, 1e-9)
    message = f"{where}: features differ by up to {worst:.1e} (relative), {wrong_ids} of {asked} argmax tokens differ"
    if not worst <= TOLERANCE or wrong_ids > 0.05 * asked:
        cure = (
            f"remove {store.folder}: its features are damaged or those of another target; they will be extracted again."
        )
        return error("features", message, cure), speed
    return ok("features", message), speed
