"""Prompts of a benchmark by its name in conf/benchmark."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hass_lightning.runs.config import config_node
from hass_lightning.target_model import TargetModel
from hass_lightning.types import Conversation


def load_prompts(name: str, config: DictConfig, target: TargetModel) -> list[Conversation]:
    """Load the prompts of a benchmark. `validation` is the held-out questions of `data`.

    Raises:
        ValueError: the benchmark cannot be read, or no question is left.
    """
    if name == "validation":
        data = instantiate(config.data)(target=target)
        data.tokens()
        held_out = data.validation_conversations[config.skip :]
        if not held_out:
            raise ValueError(
                f"skip={config.skip} leaves none of {len(data.validation_conversations)} validation questions: raise "
                "data.num_validation, or lower skip."
            )
        return [c.without_answers() for c in held_out[: config.limit]]
    node = config_node("benchmark", name)
    OmegaConf.set_struct(node, False)
    node.limit = config.limit or node.get("limit")
    return _load(node)


def answer_limit(name: str, max_new_tokens: int) -> int:
    """The generated tokens per answer at most: the benchmark's own `max_new_tokens`, or else the given one."""
    own = None if name == "validation" else config_node("benchmark", name).get("max_new_tokens")
    return int(own or max_new_tokens)


def load_benchmark(name: str) -> list[Conversation]:
    """Load all prompts of conf/benchmark/<name>.yaml."""
    node = config_node("benchmark", name)
    OmegaConf.set_struct(node, False)
    node.limit = None
    return _load(node)


def _load(node: DictConfig) -> list[Conversation]:
    prompts: list[Conversation] = instantiate(node).load()
    return prompts
