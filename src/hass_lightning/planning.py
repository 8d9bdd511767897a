"""`plan=true`: what a composed config would take, before anything is downloaded, loaded or started."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hass_lightning.data.tokens import encode_all, load_tokenizer
from hass_lightning.estimate import DEVICES, Sizes, Workload, plan, training_flops
from hass_lightning.target.model import resolve_dtype, working_dtype
from hass_lightning.target.source import TOKENIZER_FILES, hub_folder
from hass_lightning.training.strategy import num_processes


def machine_flops(seconds: float = 0.2) -> float:
    """Operations a second of this process on this machine: large products, timed."""
    a = torch.randn(512, 512, dtype=working_dtype())
    a @ a
    number, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ a
        number += 1
    return number * 2 * 512**3 / (time.perf_counter() - started)


def useful_flops(estimate: DictConfig) -> float:
    """What one process will do a second: the named device's data sheet times `estimate.utilisation`.

    Raises:
        ValueError: an unknown device.
    """
    if estimate.device == "this":
        return machine_flops() * estimate.utilisation
    if estimate.device not in DEVICES:
        raise ValueError(f"estimate.device={estimate.device} is none of this, {', '.join(DEVICES)}.")
    return DEVICES[estimate.device].flops * estimate.utilisation


def _folder(target: DictConfig) -> Path:
    """A folder with config and tokenizer of a target; made or downloaded if it is not there."""
    return hub_folder(str(instantiate(target.path)), target.get("revision"), patterns=TOKENIZER_FILES)


def target_sizes(target: DictConfig) -> Sizes:
    """From `target.sizes`, else from the config.json of its folder."""
    if target.get("sizes"):
        return Sizes.read({str(key): value for key, value in target.sizes.items()})
    return Sizes.read_folder(_folder(target))


def count_tokens(config: DictConfig) -> tuple[int, int]:
    """(tokens, marked rows) of the training data: as `estimate` states them, else bounded by the config, else counted.

    Counting reads the conversations and needs the target's tokenizer.
    """
    estimate, data = config.estimate, config.data
    if estimate.num_tokens:
        return int(estimate.num_tokens), round(estimate.num_tokens * estimate.rows_fraction)
    if data.max_answer_tokens:
        return round(data.max_answer_tokens / estimate.rows_fraction), int(data.max_answer_tokens)
    source = data.source
    if "num_questions" in source and source.get("answers") != "given":
        rows = source.num_questions * (source.get("answer_max_tokens") or source.max_tokens)
        if "question_max_tokens" not in source:  # they come from outside: their length is not known
            return round(rows / estimate.rows_fraction), rows
        return rows + source.num_questions * source.question_max_tokens, rows
    conversations = instantiate(source).load(None)  # no other source looks at the target
    tokenizer = load_tokenizer(_folder(config.target))
    tokens = encode_all(tokenizer, conversations, data.max_length)
    return sum(map(len, tokens)), sum(int(sequence.loss_mask.sum()) for sequence in tokens)


def workload(config: DictConfig) -> Workload:
    """What a config of `hass-train` would do."""
    trainer, data = config.trainer, config.data
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
        draft_vocab=config.model.draft.vocab_size,
        stage=strategy.get("stage") if "DeepSpeed" in str(strategy.get("_target_", "")) else None,
        target_bytes=2 if on_gpu else resolve_dtype(config.target.dtype).itemsize,
        trained_bytes=4 if trainer.precision == "32-true" else 2 if on_gpu else working_dtype().itemsize,
    )


def plan_run(config: DictConfig, flops: float | None = None) -> dict[str, Any]:
    """The plan of one config; `flops` saves timing the machine again."""
    sizes, work = target_sizes(config.target), workload(config)
    budget = config.get("compute") or {}
    found = plan(sizes, within_budget(sizes, work, budget), flops or useful_flops(config.estimate))
    if seconds := budget.get("seconds"):
        found["training_hours"] = min(found["training_hours"], seconds / 3600)
    return found


def within_budget(sizes: Sizes, work: Workload, budget: Mapping[Any, Any]) -> Workload:
    """The workload cut to `config.compute`, as RunCost.steps_within cuts a run.

    Raises:
        ValueError: nothing ends the run.
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
            "trainer.max_epochs=null: set it, trainer.max_steps, compute.tokens or compute.flops: it would never end."
        )
    return replace(work, epochs=epochs)


def plan_sweep(configs: Sequence[DictConfig], seconds: Sequence[float], num_done: int, n_jobs: int) -> dict[str, Any]:
    """The plan of a sweep.

    Args:
        configs: of the cells still to run. seconds: what completed cells of it took. num_done: their number.
        n_jobs: cells at a time.
    """
    result: dict[str, Any] = {"num_cells": len(configs) + num_done, "num_completed": num_done}
    if not configs:
        return result | {"hours": 0.0, "hours_from": "nothing is left to run"}
    flops = useful_flops(configs[0].estimate)
    plans = [plan_run(config, flops) for config in configs]
    features = {_data_key(config): each for config, each in zip(configs, plans, strict=True)}  # cells share the cache
    extraction = sum(each["extraction_hours"] for each in features.values())
    if seconds:
        hours, source = len(configs) * sum(seconds) / len(seconds) / 3600, f"the mean of {len(seconds)} completed cells"
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
