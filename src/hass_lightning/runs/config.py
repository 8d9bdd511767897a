"""Resolvers of the configs, and composition of single config groups.

Importing this module registers the resolvers, so code that composes a config must import it.
"""

from __future__ import annotations

from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hass_lightning.runs.config_folder import config_folder
from hass_lightning.runs.names import run_label, run_name


def by_machine(fast: Any, slow: Any) -> Any:
    """Return `fast` on a machine with fast bf16 (a GPU, AMX, AVX-512 BF16), else `slow`. To be used only for sizes."""
    import torch

    from hass_lightning.runs.machine import working_dtype

    dtype = working_dtype("cuda" if torch.cuda.is_available() else "cpu")
    return slow if dtype == torch.float32 else fast


__all__ = ["by_machine", "config_folder", "config_node", "load_node"]

OmegaConf.register_new_resolver("hass.run_name", run_name, replace=True)
OmegaConf.register_new_resolver("hass.run_label", run_label, replace=True)
OmegaConf.register_new_resolver("hass.by_machine", by_machine, replace=True)


def load_node(group: str, name: str) -> Any:
    """Instantiate `conf/<group>/<name>.yaml` or a file of this name on the search path.

    Raises:
        ValueError: if there is no such file.
    """
    return instantiate(config_node(group, name))


def config_node(group: str, name: str) -> DictConfig:
    """Compose `conf/<group>/<name>.yaml` or a file of this name in hydra.searchpath.

    Raises:
        ValueError: if there is no such file.
    """
    folders = ",".join(str(folder) for folder in HydraConfig.get().searchpath or [])
    try:
        composed = hydra.compose(overrides=[f"+{group}={name}", f"hydra.searchpath=[{folders}]"])
    except hydra.errors.MissingConfigException as error:
        raise ValueError(f"there is no conf/{group}/{name}.yaml: see `hass-benchmark --help` for the names.") from error
    node: DictConfig = OmegaConf.select(composed, group.replace("/", "."))
    return node
