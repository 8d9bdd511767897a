"""`hass-prepare`: load conversations and compute target features. Accepts the overrides of `hass-train`.

    hass-prepare plan=true experiment=reproduce/llama2_7b_chat      # only print tokens, disk, hours and memory
    hass-prepare cache=list                     # list feature sets on disk; cache=prune deletes old ones
    hass-prepare data=self_distilled            # generate a corpus with the target
    hass-prepare data=jsonl data.source.path=FILE target=smollm2_135m_hub target.path=FOLDER

`hass-train` with the same overrides uses the result. Several processes at a time (on several devices, or on machines
that share paths.cache_dir) split the shards:

    torchrun --nproc-per-node 4 -m hass_lightning.commands.prepare … 'target.device="cuda:${oc.env:LOCAL_RANK}"'
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from hass_lightning.commands.command import command
from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.data.feature_sets import list_feature_sets, prune_feature_sets
from hass_lightning.data.features import FeatureStore
from hass_lightning.runs.ranks import is_first_process
from hass_lightning.runs.screen import stage
from hass_lightning.target_model.source import cache_root
from hass_lightning.training.from_config import feature_layers
from hass_lightning.training.plan import plan_run


@command("prepare")
def main(config: DictConfig) -> dict[str, Any]:
    """Load the conversations (or generate them) and extract the features; or answer `plan` or `cache`."""
    if config.cache is not None:
        return feature_cache(config)
    if config.plan:
        return {key: round(value, 3) for key, value in plan_run(config).items()}
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with stage("target") as loading:
        target = instantiate(config.target)
        loading.detail = target.name
    data: FeatureDataModule = instantiate(config.data)(target=target)
    data.read_layers(feature_layers(config, data))
    result: dict[str, Any] = {}
    for part, sequences, store in zip(("train", "validation"), data.tokens(), data.stores(), strict=True):
        result |= {
            f"num_{part}_conversations": len(sequences),
            f"num_{part}_tokens": sum(len(sequence) for sequence in sequences),
            f"num_{part}_rows": sum(int(sequence.loss_mask.sum()) for sequence in sequences),
            f"{part}_features": str(store.folder) if isinstance(store, FeatureStore) else "online: nothing is stored",
        }
    return result | ({} if is_first_process() else {"_silent": True})


def feature_cache(config: DictConfig) -> dict[str, Any]:
    """List or prune the feature sets (cache=list, cache=prune)."""
    root = Path(config.paths.cache_dir or cache_root()) / "features"
    if config.cache == "list":
        return {"cache_dir": str(root), "feature_sets": list_feature_sets(root)}
    if config.cache == "prune":
        return {"cache_dir": str(root), "removed": prune_feature_sets(root, config.prune_days)}
    raise ValueError(f"cache={config.cache} must be list or prune.")


if __name__ == "__main__":
    main()
