"""`plan=true`: estimate the resources of a composed config before anything is downloaded, loaded or started."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hass_lightning.data.tokens import encode_all, load_tokenizer
from hass_lightning.draft import DraftHead
from hass_lightning.runs.machine import working_dtype
from hass_lightning.runs.names import counted
from hass_lightning.target_model.hub import TOKENIZER_FILES, hub_folder
from hass_lightning.target_model.read import resolve_dtype
from hass_lightning.training.estimate import DEVICES, Sizes, Workload, plan, training_flops
from hass_lightning.training.strategy import num_processes


def machine_flops(seconds: float = 0.2) -> float:
    """Return the operations per second of this process, measured with large matrix products."""
    a = torch.randn(512, 512, dtype=working_dtype())
    a @ a
    number, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ a
        number += 1
    return number * 2 * 512**3 / (time.perf_counter() - started)


def useful_flops(estimate: DictConfig) -> float:
    """Return the effective operations per second of one process: peak of the named device times `estimate.utilisation`.

    Raises:
        ValueError: if the device is unknown.
    """
    if estimate.device == "this":
        return machine_flops() * estimate.utilisation
    if estimate.device not in DEVICES:
        raise ValueError(f"estimate.device={estimate.device} is not supported: use one of this, {', '.join(DEVICES)}.")
    return DEVICES[estimate.device].flops * estimate.utilisation


def _folder(target: DictConfig) -> Path:
    """Return a folder with the target's config and tokenizer, creating or downloading it if necessary."""
    return hub_folder(str(instantiate(target.path)), target.get("revision"), patterns=TOKENIZER_FILES)


def target_sizes(target: DictConfig) -> Sizes:
    """Return the sizes in `target.sizes`, or those of the config.json of the target's folder."""
    if target.get("sizes"):
        return Sizes.read({str(key): value for key, value in target.sizes.items()})
    return Sizes.read_folder(_folder(target))


def count_tokens(config: DictConfig) -> tuple[int, int]:
    """Return (tokens, loss positions) of the training data.

    They are read from `estimate` if set there, otherwise bounded from the config, otherwise counted. Counting reads the
    conversations and needs the target's tokenizer.
    """
    estimate, data = config.estimate, config.data
    if estimate.num_tokens:
        return int(estimate.num_tokens), round(estimate.num_tokens * estimate.rows_fraction)
    if data.max_answer_tokens:
        return round(data.max_answer_tokens / estimate.rows_fraction), int(data.max_answer_tokens)
    source = instantiate(data.source)
    most = source.most_tokens() if hasattr(source, "most_tokens") else None  # of text that the target is to generate
    if most is not None:
        questions, rows = most
        return (round(rows / estimate.rows_fraction) if questions is None else questions + rows), rows
    conversations = source.load(None)  # no other source needs the target
    names = ("chat_template", "chat_template_options")
    tokenizer = load_tokenizer(_folder(config.target), **{name: config.target.get(name) for name in names})
    tokens = encode_all(tokenizer, conversations, data.max_length)
    return sum(map(len, tokens)), sum(int(sequence.loss_mask.sum()) for sequence in tokens)


def planned_head(draft: DictConfig, sizes: Sizes) -> DraftHead:
    """Return the head of a config for a target of these sizes, without memory for its weights."""
    rest = {"max_position_embeddings": 1, "bos_token_id": None, "eos_token_id": None}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    with torch.device("meta"):
        head: DraftHead = instantiate(draft)(SimpleNamespace(**vars(sizes), **rest, rope_parameters=rope))
    return head


def workload(config: DictConfig, sizes: Sizes) -> Workload:
    """Return the workload of a config of `hass-train` for a target of these sizes."""
    trainer, data = config.trainer, config.data
    head = planned_head(config.model.draft, sizes)
    tokens, rows = count_tokens(config)
    processes = num_processes(trainer)
    strategy = trainer.strategy if OmegaConf.is_config(trainer.strategy) else {}
    longest = data.batch_size * min(data.max_length, 2048)
    epochs = float(trainer.max_epochs) if trainer.max_epochs not in (None, -1) else float("inf")
    if trainer.max_steps not in (None, -1):
        mean = max(1.0, tokens / max(1, config.estimate.num_conversations or tokens / 500))
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        epochs = min(epochs, batches * data.batch_size * processes * mean / tokens)
    depth = config.model.alignment.depth
    on_gpu = config.estimate.device != "this"
    return Workload(
        num_tokens=tokens,
        num_rows=rows,
        epochs=epochs,
        depth=int(depth if isinstance(depth, int) else max(v for v in depth.values() if isinstance(v, int))),
        batch_tokens=int(min(longest, tokens)),
        processes=processes,
        extractors=1 if config.target.get("device_map") else None,
        draft_vocab=head.vocab_size,
        draft_parameters=sum(parameter.numel() for parameter in head.parameters()),
        feature_layers=len(data.feature_layers or head.feature_layers),
        stage=strategy.get("stage") if "DeepSpeed" in str(strategy.get("_target_", "")) else None,
        target_bytes=2 if on_gpu else resolve_dtype(config.target.dtype).itemsize,
        trained_bytes=4 if trainer.precision == "32-true" else 2 if on_gpu else working_dtype().itemsize,
    )


def plan_run(config: DictConfig, flops: float | None = None) -> dict[str, Any]:
    """Return the plan of one config; `flops` avoids measuring the machine again."""
    sizes = target_sizes(config.target)
    work = workload(config, sizes)
    budget = config.get("compute") or {}
    found = plan(sizes, within_budget(sizes, work, budget), flops or useful_flops(config.estimate))
    if seconds := budget.get("seconds"):
        found["training_hours"] = min(found["training_hours"], seconds / 3600)
    return found


def within_budget(sizes: Sizes, work: Workload, budget: Mapping[Any, Any]) -> Workload:
    """Return the workload limited by `config.compute`, as `RunCost.steps_within` limits a run.

    Raises:
        ValueError: if nothing ends the run.
    """
    epochs, one = work.epochs, training_flops(sizes, replace(work, epochs=1.0))
    if depth := budget.get("match_depth"):
        epochs = training_flops(sizes, replace(work, depth=int(depth))) / one
    if tokens := budget.get("tokens"):
        epochs = min(epochs, tokens / max(1, work.num_rows))
    if operations := budget.get("flops"):
        epochs = min(epochs, operations / one)
    if math.isinf(epochs):
        raise ValueError(
            "trainer.max_epochs=null: set it, trainer.max_steps, compute.tokens or compute.flops; otherwise "
            "training would never end."
        )
    return replace(work, epochs=epochs)


def plan_sweep(configs: Sequence[DictConfig], seconds: Sequence[float], num_done: int, n_jobs: int) -> dict[str, Any]:
    """Return the plan of a sweep.

    Args:
        configs: configs of the remaining runs.
        seconds: durations of completed runs of this sweep.
        num_done: number of completed runs.
        n_jobs: number of simultaneous jobs.
    """
    result: dict[str, Any] = {"num_cells": len(configs) + num_done, "num_completed": num_done}
    if not configs:
        return result | {"hours": 0.0, "hours_from": "nothing is left to run"}
    flops = useful_flops(configs[0].estimate)
    plans = [plan_run(config, flops) for config in configs]
    pairs = zip(configs, plans, strict=True)
    features = {(_data_key(config), each["disk_gb"]): each for config, each in pairs}  # runs share cached features
    extraction = sum(each["extraction_hours"] for each in features.values())
    if seconds:
        hours = len(configs) * sum(seconds) / len(seconds) / 3600
        source = f"the mean of {counted(len(seconds), 'completed cell')}"
    else:
        hours = extraction + sum(each["training_hours"] for each in plans)
        source = f"formulas, estimate.device={configs[0].estimate.device}; without start-up and decoding"
    processes = max(num_processes(config.trainer) for config in configs)
    return result | {
        "hours": round(hours / n_jobs, 3),
        "hours_from": source,
        "disk_gb": round(sum(each["disk_gb"] for each in features.values()), 3),
        "memory_gb": round(n_jobs * processes * max(each["training_memory_gb"] for each in plans), 2),
        "memory_gb_a_process": round(max(each["training_memory_gb"] for each in plans), 2),
    }


def _data_key(config: DictConfig) -> str:
    free = ("batch_size", "noise", "num_workers", "cache_dir", "seed")
    data = OmegaConf.masked_copy(config.data, [key for key in config.data if key not in free])
    content = [OmegaConf.to_container(node, resolve=False) for node in (config.target, data)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
