"""`hass-prepare`: conversations, then the target's features, before any training. It takes what `hass-train` takes.

    hass-prepare data=self_distilled            # the target writes a corpus
    hass-prepare data=jsonl data.source.path=FILE target=smollm2_135m_hub target.path=FOLDER

`hass-train` with the same words finds all of it done.
"""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from hass_lightning.cli import command
from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.data.features import FeatureStore


@command("prepare")
def main(config: DictConfig) -> dict[str, Any]:
    """Load the conversations (write them, if self-distilled) and extract the features."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    data: FeatureDataModule = instantiate(config.data)(target=instantiate(config.target))
    result: dict[str, Any] = {}
    for part, sequences, store in zip(("train", "validation"), data.tokens(), data.stores(), strict=True):
        result |= {
            f"num_{part}_conversations": len(sequences),
            f"num_{part}_tokens": sum(len(sequence) for sequence in sequences),
            f"num_{part}_rows": sum(int(sequence.loss_mask.sum()) for sequence in sequences),
            f"{part}_features": str(store.folder) if isinstance(store, FeatureStore) else "online: nothing is stored",
        }
    return result


if __name__ == "__main__":
    main()
