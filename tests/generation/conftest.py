"""A run folder with a head for the tiny target, as hass-train leaves it."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hass_lightning.decoding import DecodingModels, DynamicTree
from hass_lightning.draft import EagleDraft, load_draft, save_draft
from hass_lightning.generation import ChatModel
from hass_lightning.runs.config import config_folder


@pytest.fixture(scope="session")
def run_dir(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft = EagleDraft.from_target(tiny.config)
    save_draft(folder / "draft", draft, None, {"target": "tiny", "target_fingerprint": tiny.fingerprint})
    with initialize_config_dir(config_folder(), version_base="1.3"):
        words = ["experiment=smoke", "decoding.num_nodes=12", "decoding.depth=2", "decoding.width=5"]
        config = compose("train", overrides=words)
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    return folder


@pytest.fixture(scope="session")
def chat(tiny, run_dir):
    return ChatModel(DecodingModels.of(tiny, load_draft(run_dir)), DynamicTree(num_nodes=12, depth=2, width=5))
