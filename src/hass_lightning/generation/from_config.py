"""Build a `ChatModel` from a run folder or from a composed config."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from hass_lightning.decoding import DecodingModels
from hass_lightning.draft import load_draft
from hass_lightning.draft.checkpoint import packaged_head
from hass_lightning.generation.chat_model import ChatModel
from hass_lightning.runs.config import config_folder
from hass_lightning.runs.from_config import follow_run
from hass_lightning.target_model import TargetModel


def load(draft: str | Path = "packaged", *overrides: str) -> ChatModel:
    """Load a draft head with the target it was trained for.

    Args:
        draft: a run folder, whose target and decoding settings are used; a head folder; or `packaged`, the head for
            SmolLM2-135M-Instruct that ships with this package.
        overrides: overrides as for `hass-generate`: `target=llama3_8b_instruct`, `decoding.depth=5`, …

    Raises:
        ValueError: if there is no head, or it does not fit the target.
    """
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose("generate", overrides=[f"draft='{draft}'", *overrides])
    return build(follow_run(config, overrides))


def build(config: DictConfig) -> ChatModel:
    """Build the target, head and decoder of a composed `conf/generate.yaml`.

    Raises:
        ValueError: as in `load`.
    """
    path = packaged_head(config.target.name) if config.draft == "packaged" else config.draft
    if path is None:
        raise ValueError(
            f"draft=packaged, but no head ships for target={config.target.name}: set draft to a run folder, or "
            "target=smollm2_135m."
        )
    saved, decoder = load_draft(path), instantiate(config.decoding)
    target: TargetModel = instantiate(config.target)
    if config.draft == "packaged":
        saved.check_sizes(path, target)  # the target is pinned by a hash already; computing it again takes a second
    else:
        saved.check_fit(str(path), target)
    models = DecodingModels.of(target, saved)
    decoder.check(models)
    return ChatModel(models, decoder)
