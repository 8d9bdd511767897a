"""What a run was made from: written first, so that a run which dies can be understood, too."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from hass_lightning.files import write_whole
from hass_lightning.redaction import redact, redacted

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "omegaconf", "wandb", "deepspeed", "hass-lightning")


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers, without secrets (what checkpoints, loggers and hashes take)."""
    return redacted(OmegaConf.to_container(config, resolve=True))


def config_hash(config: DictConfig) -> str:
    """SHA-256 of what decides the result: the config without paths and Hydra's own node."""
    content = {key: value for key, value in plain(config).items() if key not in ("paths", "hydra", "logger")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def add_provenance(run_dir: Path, **values: Any) -> None:
    """Add what is known only later, such as the keys of the features."""
    file = run_dir / "provenance.json"
    write_whole(file, json.dumps({**json.loads(file.read_text()), **values}, indent=2) + "\n")


# What may be another when a run goes on: it changes no weight.
MAY_CHANGE = (
    "paths", "logger", "study", "fresh", "plan", "estimate", "ckpt_path", "num_threads", "callbacks.progress",
    "callbacks.last_checkpoint", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.log_every_n_steps", "trainer.max_time", "data.num_workers", "data.cache_dir",
)  # fmt: skip


def _leaves(config: DictConfig) -> dict[str, Any]:
    """Every value by its dotted key; what only says where files lie keeps its interpolation."""
    found: dict[str, Any] = {}

    def walk(raw: Any, key: str) -> None:
        if isinstance(raw, dict):
            for name, value in raw.items():
                walk(value, f"{key}.{name}" if key else str(name))
            return
        resolved = OmegaConf.select(config, key)
        places = isinstance(raw, str) and "${paths." in raw
        found[key] = raw if places or OmegaConf.is_dict(resolved) else plain_value(resolved)

    walk(OmegaConf.to_container(config, resolve=False), "")
    return {
        key: value for key, value in found.items() if not any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE)
    }


def plain_value(value: Any) -> Any:
    """A config value as JSON gives it back."""
    content = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return json.loads(json.dumps(content, default=str))


def refuse_other_config(run_dir: Path, config: DictConfig, begun: bool) -> None:
    """Note the config of a run in its folder; refuse to go on (`begun`) with another one.

    Raises:
        ValueError: naming the keys that changed, with their old and new values.
    """
    file, now = run_dir / "resume_config.json", _leaves(config)
    if begun and file.exists():
        before = json.loads(file.read_text())
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            listed = ", ".join(f"{key}={now.get(key)} (was {before.get(key)})" for key in changed)
            raise ValueError(
                f"{run_dir} holds a run of another config and would go on with {listed}: change that back, train again "
                f"with fresh=true, or take another folder with name=…. Only these may change: {', '.join(MAY_CHANGE)}."
            )
    write_whole(file, json.dumps(now, indent=2, default=str) + "\n")


def write_provenance(run_dir: Path, config: DictConfig) -> dict[str, Any]:
    """Write `provenance.json`: argv, git state, versions, seed, device, config hash. No secret is read."""
    status = _git("status", "--porcelain")
    record = {
        "argv": [Path(sys.argv[0]).name, *map(redact, sys.argv[1:])],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(status) if status is not None else None,
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "seed": config.get("seed"),
        "config_hash": config_hash(config),
    }
    write_whole(run_dir / "provenance.json", json.dumps(record, indent=2) + "\n")
    return record
