"""Build the module, the Trainer and the loggers from a composed config."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.draft import load_draft
from hass_lightning.runs.config import config_node
from hass_lightning.runs.folder import keep_curves
from hass_lightning.runs.machine import working_dtype
from hass_lightning.runs.provenance import plain
from hass_lightning.runs.screen import current_screen
from hass_lightning.training.compute import ComputeMeter, RunCost
from hass_lightning.training.heads import HeadsModule
from hass_lightning.training.module import HassModule
from hass_lightning.training.progress import ProgressLines
from hass_lightning.training.rendezvous import meet_first, seconds_of
from hass_lightning.training.strategy import deepspeed_stage, num_processes
from hass_lightning.training.wandb_logging import short_tags, wandb_disabled, wandb_settings

log = logging.getLogger(__name__)
HEAD_NAME = re.compile(r"[A-Za-z0-9_-]+")
MODEL_GROUPS = ("loss", "draft")  # groups of conf/model


def feature_layers(config: DictConfig, data: FeatureDataModule) -> tuple[int, ...]:
    """The layers of the target that the configured head reads."""
    with torch.device("meta"):
        layers: tuple[int, ...] = instantiate(config.model.draft)(data.target.config).feature_layers
    return layers


def build_module(config: DictConfig, data: FeatureDataModule) -> tuple[HassModule, float | None]:
    """Build the LightningModule with a new head.

    Returns:
        (module, fraction of the answer tokens that a pruned vocabulary covers or None).

    Raises:
        ValueError: ZeRO-3 would partition parameters that the loss multiplies with, outside the head's forward.
    """
    draft = instantiate(config.model.draft)(data.target.config)
    if deepspeed_stage(config.trainer) == 3 and draft.logit_parameters():
        raise ValueError(
            "trainer.strategy.stage=3 (ZeRO-3) does not support a head that trains its final norm or LM head: use "
            "trainer=deepspeed_zero2, or model/draft=eagle."
        )
    data.read_layers(draft.feature_layers)
    token_ids, coverage = None, None
    if draft.vocab_size is not None:
        # little data would give the second stage of a head a worse vocabulary than it has
        kept = load_draft(config.init_from).token_ids if config.get("init_from") else None
        token_ids, coverage = data.most_frequent_tokens(draft.vocab_size, kept)
    return instantiate(config.model)(draft=draft, head=data.target.head, token_ids=token_ids), coverage


def config_of_head(config: DictConfig, name: str, changes: Mapping[str, Any]) -> DictConfig:
    """Return the config of one head: `config` with `changes` of its model.

    Args:
        config: the composed config.
        name: name of the head.
        changes: keys of conf/model/default.yaml with new values, dotted or nested; `loss` and `draft` may be names of
            their groups, and another `draft` keeps the `vocab_size`, which all heads share.

    Raises:
        ValueError: the name cannot be a folder, or a key does not exist.
    """
    if not HEAD_NAME.fullmatch(name):
        raise ValueError(f"heads.{name}: use letters, digits, - and _ for the name, which is also a folder.")
    own = deepcopy(config)
    for key, value in (changes or {}).items():
        if key in MODEL_GROUPS and isinstance(value, str):
            before, own.model[key] = own.model[key], config_node(f"model/{key}", value)
            if "vocab_size" in own.model[key]:
                own.model[key].vocab_size = before.get("vocab_size")
            continue
        try:
            OmegaConf.update(own.model, str(key), value, merge=True)
        except OmegaConfBaseException as error:
            first_line = str(error).splitlines()[0]
            raise ValueError(f"heads.{name}.{key}={value} is not possible in `model` ({first_line}).") from error
    return own


def build_heads(config: DictConfig, data: FeatureDataModule) -> HeadsModule:
    """Build the module of `config.heads`, a mapping from names to changes of `model`.

    Every head is initialized from the same state of the random number generator, as in its separate run.

    Raises:
        ValueError: the heads do not fit together, or `compute` has a budget, which would differ between them.
    """
    if any(value is not None for value in config.compute.values()):
        raise ValueError("compute.* is a budget of one head: with heads=… set trainer.max_epochs or max_steps.")
    state = torch.get_rng_state()
    modules = {}
    for name, changes in config.heads.items():
        torch.set_rng_state(state)
        modules[str(name)] = build_module(config_of_head(config, str(name), changes), data)[0]
    # features with more layers end with the last hidden state, which is all that the other heads read
    layers = {module.draft.feature_layers for module in modules.values()} - {()}
    if len(layers) > 1:
        raise ValueError(f"heads read different layers of the target ({layers}): train these heads separately.")
    data.read_layers(next(iter(layers), ()))
    return HeadsModule(modules)


def make_trainer(
    config: DictConfig,
    data: FeatureDataModule,
    callbacks: list[Callback],
    loggers: list[Logger],
    module: HassModule | HeadsModule | None = None,
) -> L.Trainer:
    """Build the Trainer. A run is one pass over a numbered sequence of batches, whatever the number of epochs.

    `max_epochs` and a fractional `val_check_interval` are converted to numbers of batches, so resuming does not depend
    on where an epoch ends (see data/order.py). For the `module` of one head, `config.compute` is converted to a number
    of steps.
    """
    settings = trainer_settings(config)
    accumulate = settings["accumulate_grad_batches"]
    world_size = num_processes(settings)
    per_epoch = _batches_per_epoch(settings.pop("limit_train_batches"), data, world_size)
    num_steps = _step_limit(settings.pop("max_epochs"), settings["max_steps"], per_epoch, accumulate)
    if isinstance(module, HassModule):
        head = (module.draft.products(), len(module.vocabulary), module.planned_alignment)
        cost = RunCost(data.tokens()[0], data.batch_size * world_size, data.seed, accumulate, *head)
        budget = dict(config.compute)
        if (seconds := budget.pop("seconds")) is not None:
            settings["max_time"] = {"seconds": seconds}
        num_steps = cost.steps_within(num_steps, **budget)
        callbacks = [*callbacks, ComputeMeter(cost)]
    if num_steps is None:
        raise ValueError(
            "none of trainer.max_epochs, trainer.max_steps, compute.tokens, compute.flops is set: training would "
            "never end."
        )
    data.num_batches = num_steps * accumulate
    callbacks, settings["enable_progress_bar"] = _progress(callbacks, settings.get("enable_progress_bar", True))
    settings |= {
        "max_steps": num_steps,
        "max_epochs": -1,
        "val_check_interval": _validation_interval(settings, per_epoch, data.num_batches),
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
    }
    timeout = seconds_of(settings.pop("rendezvous_timeout"))
    with open_dict(config):
        node = OmegaConf.create(settings)
    trainer: L.Trainer = instantiate(node, callbacks=callbacks, logger=loggers, _convert_="all")
    meet_first(trainer.strategy, timeout)
    return trainer


def _progress(callbacks: list[Callback], wanted: bool) -> tuple[list[Callback], bool]:
    """Return (callbacks, `enable_progress_bar`): Lightning's bar on a terminal, ours or log lines in a command."""
    if wanted and current_screen() is None and sys.stderr.isatty():
        return callbacks, True
    others = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    return [*others, ProgressLines()] if wanted else others, False


def trainer_settings(config: DictConfig) -> dict[str, Any]:
    """Return the Trainer's arguments as plain containers, without null and `auto`."""
    node = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(node, dict)
    settings: dict[str, Any] = {str(key): value for key, value in node.items()}
    if settings["precision"] == "auto":
        on_gpu = settings["accelerator"] in ("gpu", "cuda") or (
            settings["accelerator"] == "auto" and torch.cuda.is_available()
        )
        fast = working_dtype("cuda" if on_gpu else "cpu") == torch.bfloat16
        settings["precision"] = "bf16-mixed" if fast else "32-true"
    settings["accumulate_grad_batches"] = int(settings.get("accumulate_grad_batches") or 1)
    defaults = {"limit_train_batches": None, "max_epochs": None, "max_steps": -1, "rendezvous_timeout": 300}
    return defaults | settings


def _batches_per_epoch(limit: float | None, data: FeatureDataModule, world_size: int) -> int:
    """Return the number of batches per epoch, limited by `limit`, which is a number of batches or a fraction."""
    whole = max(1, len(data.tokens()[0]) // (data.batch_size * world_size))
    if limit is None:
        return whole
    return max(1, min(whole, limit if isinstance(limit, int) else round(limit * whole)))


def _step_limit(max_epochs: float | None, max_steps: int | None, per_epoch: int, accumulate: int) -> int | None:
    """Return the optimizer steps of max_epochs and max_steps, whichever is less; None without either (null or -1)."""
    limits = []
    if max_epochs not in (None, -1):
        limits.append(math.ceil(max_epochs * per_epoch / accumulate))
    if max_steps not in (None, -1):
        limits.append(max_steps)
    return min(limits, default=None)


def _validation_interval(settings: dict[str, Any], per_epoch: int, num_batches: int) -> int:
    """Return the number of batches between validations: a multiple of the accumulated batches, at most the whole run.

    `val_check_interval` is in epochs if it is a float, and in batches if it is an int. 1.0 (or null) together with
    `check_val_every_n_epoch=n` means n epochs.
    """
    interval, accumulate = settings.get("val_check_interval"), settings["accumulate_grad_batches"]
    interval = 1.0 if interval is None else interval
    if isinstance(interval, float):
        interval = max(1, round(interval * (settings.get("check_val_every_n_epoch") or 1) * per_epoch))
    return min(num_batches, math.ceil(interval / accumulate) * accumulate)


def make_loggers(config: DictConfig, run_dir: Path) -> list[Logger]:
    """Build the configured loggers. W&B is offline without a key and never waits for a login."""
    loggers: list[Logger] = []
    keep_curves(run_dir)
    for node in (config.logger or {}).values():
        if not node:
            continue
        if "WandbLogger" not in node._target_:
            loggers.append(instantiate(node))
        elif wandb_disabled():
            log.info("W&B is disabled (WANDB_DISABLED or WANDB_MODE): nothing is logged to it")
        else:
            settings = wandb_settings(plain(config), run_dir)
            settings["tags"] = short_tags(node.get("tags") or ())
            loggers.append(instantiate(node, _partial_=True, _convert_="all")(**settings))
    return loggers
