"""One batch: sequences of a feature store by (epoch, index), with noise and padding.

Shapes: B batch, T tokens, D hidden (types.py has the legend).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hass_lightning.data.features import FeatureStore, OnlineFeatures
from hass_lightning.data.order import hash_of
from hass_lightning.types import FeatureBatch


class FeatureDataset(Dataset[Any]):
    """Sequences of a store by (epoch, index), with uniform noise on the features (EAGLE's data augmentation)."""

    def __init__(self, store: FeatureStore | OnlineFeatures, noise: float = 0.0, seed: int = 0):
        self.store, self.noise, self.seed = store, noise, seed

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, keys: list[tuple[int, int] | int]) -> list[dict[str, Tensor | str]]:
        """Return one batch. The DataLoader calls this."""
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
        if epoch < 0:  # padding, see `FeatureDataModule.val_dataloader`
            row["loss_mask"] = torch.zeros_like(row["loss_mask"])  # type: ignore[arg-type]
        row["id"] = self.store.ids[index]
        return row


def collate(rows: list[dict[str, Any]]) -> tuple[FeatureBatch, Tensor | None]:
    """Right-pad to the longest sequence.

    Returns:
        (batch with the target features, noisy features [B, T, D] as input of the head). Without noise the second is
        None, so that nothing is pinned and copied to a GPU twice.
    """
    lengths = torch.tensor([row["input_ids"].shape[0] for row in rows])
    longest = int(lengths.max())

    def padded(name: str, value: float | int | bool = 0) -> Tensor:
        first = rows[0][name]
        stacked: Tensor = first.new_full((len(rows), longest, *first.shape[1:]), value)
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
