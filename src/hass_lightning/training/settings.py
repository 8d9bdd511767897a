"""Validation of the settings of a run, before anything is loaded.

Each rule belongs to one key of conf/train.yaml or conf/trainer/default.yaml. Values that Lightning would ignore,
misinterpret or reject with an unclear message are rejected here with the key, the value and how to fix it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from hass_lightning.draft.checkpoint import head_folder
from hass_lightning.training.module import HassModule
from hass_lightning.training.resume import given_checkpoint
from hass_lightning.training.setting_rules import RUN, TRAINER
from hass_lightning.training.strategy import check_trainer_config, num_processes

CALLBACK_METRICS = {"train/tokens_per_second", "train/data_wait_fraction"} | {
    f"compute/{name}" for name in ("tokens", "flops", "seconds")
}
DECODED = {f"{name}{end}" for name in ("acceptance_length", "speedup") for end in ("", "_low", "_high")} | {
    "tokens_per_second", "num_prompts", "num_checked", "num_identical",
}  # fmt: skip
TRAINED = {"simulated_acceptance_length", "train_seconds", "train_tokens", "train_flops"}


def check_settings(config: Mapping[str, Any]) -> None:
    """Validate the settings of a run.

    Args:
        config: the composed config of `hass-train` (a DictConfig, or plain containers). With `plan` it is not compared
            with this machine.

    Raises:
        ValueError: naming the key, its value and how to fix it.
    """
    trainer = config["trainer"]
    for name, (accepts, cure) in TRAINER.items():
        if name in trainer:
            _check(f"trainer.{name}", _plain(trainer[name]), accepts, cure)
    for key, (accepts, cure) in RUN.items():
        section, _, name = key.rpartition(".")
        node = config.get(section) if section else config
        if node is not None and name in node:
            _check(key, _plain(node[name]), accepts, cure)
    num_processes(trainer)
    if not config["plan"]:
        _check_machine(trainer)
    check_trainer_config(trainer)
    _check_together(config)
    _check_metric(str(config["optimized_metric"]))
    given_checkpoint(config["ckpt_path"])
    if config["init_from"] is not None:
        try:
            head_folder(config["init_from"])
        except ValueError as error:
            raise ValueError(
                f"init_from={error} Set it to the folder of a run, package://heads/<name>, or null."
            ) from error


def _plain(value: Any) -> Any:
    """Convert a mapping or list of a config to a dict or list."""
    if hasattr(value, "items"):
        return {key: _plain(each) for key, each in value.items()}
    return value if isinstance(value, str) or not hasattr(value, "__iter__") else [_plain(each) for each in value]


def _check(key: str, value: Any, accepts: Callable[[Any], bool], cure: str) -> None:
    try:
        accepted = accepts(value)
    except TypeError:
        accepted = False
    if not accepted:
        shown = "null" if value is None else value
        raise ValueError(f"{key}={shown} cannot be used: {cure}.")


def _check_machine(trainer: Mapping[str, Any]) -> None:
    """Validate the settings that depend on this machine."""
    from lightning.pytorch.strategies import StrategyRegistry

    strategy, accelerator, devices = trainer.get("strategy", "auto"), trainer.get("accelerator"), trainer["devices"]
    if isinstance(strategy, str) and strategy not in ("auto", *StrategyRegistry.available_strategies()):
        raise ValueError(
            f"trainer.strategy={strategy} is not a strategy of Lightning: use trainer=ddp or deepspeed_zero2."
        )
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and not gpus:
        raise ValueError(f"trainer.accelerator={accelerator}, but torch finds no GPU on this machine: use trainer=cpu.")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("trainer.accelerator=mps, but torch finds no Apple GPU on this machine: use trainer=cpu.")
    listed = not isinstance(devices, str) and hasattr(devices, "__len__")
    if listed and (accelerator == "cpu" or not gpus):
        raise ValueError(f"trainer.devices={devices} names GPUs, but this run uses the CPU: use a number of processes.")
    if accelerator in ("gpu", "cuda"):
        missing = [index for index in devices if int(index) >= gpus] if listed else int(devices) > gpus
        if missing:
            raise ValueError(f"trainer.devices={devices}, but torch finds {gpus} GPU(s) on this machine: use fewer.")


def _check_together(config: Mapping[str, Any]) -> None:
    """Validate keys that contradict each other."""
    trainer = config["trainer"]
    interval, every = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch")
    if every not in (None, 1) and not (interval is None or (isinstance(interval, float) and interval == 1.0)):
        raise ValueError(
            f"trainer.check_val_every_n_epoch={every} and trainer.val_check_interval={interval} both set the "
            "validation interval: leave one of them at 1."
        )
    if config.get("status"):
        raise ValueError("status=true prints the table of a sweep, and this is one run: start the command with -m.")
    seconds = config["compute"].get("seconds")
    if seconds is not None and trainer.get("max_time") is not None:
        raise ValueError(
            f"trainer.max_time={trainer['max_time']} and compute.seconds={seconds} both limit the time: set one of "
            "them to null."
        )


def _check_metric(metric: str) -> None:
    """Check that `optimized_metric` is a result of a run."""
    group, _, name = metric.rpartition("/")
    if (name in DECODED and group in ("", "decode")) or (name in TRAINED and not group):
        return
    known = sorted(DECODED | TRAINED)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or ["acceptance_length"]
    raise ValueError(f"optimized_metric={metric} is not a result of a run: use a name such as {', '.join(near)}.")


def check_monitors(callbacks: Mapping[str, Callback], module: HassModule) -> None:
    """Raise an error if a callback monitors a metric that nothing logs.

    A custom LightningModule or callback may log other names, so nothing is checked if there is one.

    Raises:
        ValueError: naming the callback, the metric and similar names.
    """
    ours = ("hass_lightning.", "lightning.")
    if not all(type(each).__module__.startswith(ours) for each in (*callbacks.values(), module)):
        return
    known = module.metric_names() | CALLBACK_METRICS
    for name, callback in callbacks.items():
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in known and not str(monitor).startswith("lr-"):
            near = difflib.get_close_matches(str(monitor), known, n=3, cutoff=0.4) or ["val/acceptance_length"]
            raise ValueError(
                f"callbacks.{name}.monitor={monitor} is not logged: set it to a name such as {', '.join(near)}."
            )
