"""`hass-prepare`: conversations, then the target's features, before any training. It takes what `hass-train` takes.

    hass-prepare plan=true experiment=reproduce/llama2_7b_chat      # tokens, disk, hours and memory; starts nothing
    hass-prepare cache=list                     # the feature sets on disk; cache=prune removes old ones
    hass-prepare data=self_distilled            # the target writes a corpus
    hass-prepare data=jsonl data.source.path=FILE target=smollm2_135m_hub target.path=FOLDER

`hass-train` with the same words finds all of it done. Started several times at once (on several devices, or on machines
that share paths.cache_dir), the processes share the shards: `torchrun --nproc-per-node 4 -m hass_lightning.prepare …
'target.device="cuda:${oc.env:LOCAL_RANK}"'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from hass_lightning.cli import command, is_first_process
from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.data.feature_sets import list_feature_sets, prune_feature_sets
from hass_lightning.data.features import FeatureStore
from hass_lightning.planning import plan_run
from hass_lightning.target.source import cache_root


@command("prepare")
def main(config: DictConfig) -> dict[str, Any]:
    """Load the conversations (write them, if self-distilled) and extract the features; or one of the questions."""
    if config.cache is not None:
        return feature_cache(config)
    if config.plan:
        return {key: round(value, 3) for key, value in plan_run(config).items()}
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
    return result | ({} if is_first_process() else {"_silent": True})


def feature_cache(config: DictConfig) -> dict[str, Any]:
    """cache=list and cache=prune."""
    root = Path(config.paths.cache_dir or cache_root()) / "features"
    if config.cache == "list":
        return {"cache_dir": str(root), "feature_sets": list_feature_sets(root)}
    if config.cache == "prune":
        return {"cache_dir": str(root), "removed": prune_feature_sets(root, config.prune_days)}
    raise ValueError(f"cache={config.cache} is neither list nor prune.")


if __name__ == "__main__":
    main()
