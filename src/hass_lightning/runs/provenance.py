"""Provenance of a run, written at its start so that it also exists for a run that fails."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from hass_lightning.runs.files import write_whole
from hass_lightning.runs.machine import device_name
from hass_lightning.runs.old_names import new_name
from hass_lightning.runs.redaction import redact, redacted

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "omegaconf", "wandb", "deepspeed", "hass-lightning")


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers, without secrets (what checkpoints, loggers and hashes take)."""
    content: dict[str, Any] = redacted(OmegaConf.to_container(config, resolve=True))
    return content


def config_hash(config: DictConfig) -> str:
    """Return the SHA-256 of the config without paths, loggers and the Hydra node, which do not affect the result."""
    content = {key: value for key, value in plain(config).items() if key not in ("paths", "hydra", "logger", "status")}
    if isinstance(content.get("trainer"), dict):
        content["trainer"].pop("rendezvous_timeout", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in this repository; None outside a repository or without git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def add_provenance(run_dir: Path, **values: Any) -> None:
    """Add values that are known only later, such as the keys of the features."""
    file = run_dir / "provenance.json"
    write_whole(file, json.dumps({**json.loads(file.read_text()), **values}, indent=2) + "\n")


# Keys that may change when a run resumes, because they do not affect the weights.
MAY_CHANGE = (
    "paths", "logger", "study", "fresh", "plan", "status", "estimate", "ckpt_path", "num_threads", "callbacks.progress",
    "callbacks.last_checkpoint", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.log_every_n_steps", "trainer.max_time", "trainer.rendezvous_timeout", "data.num_workers", "data.cache_dir",
    "data.source.output_dir",
)  # fmt: skip


def _leaves(config: DictConfig) -> dict[str, Any]:
    """Return every value by its dotted key; values with `${paths.…}` keep the interpolation."""
    found: dict[str, Any] = {}

    def walk(raw: Any, key: str) -> None:
        if isinstance(raw, dict):
            for name, value in raw.items():
                walk(value, f"{key}.{name}" if key else str(name))
            return
        resolved = OmegaConf.select(config, key)
        places = isinstance(raw, str) and "${paths." in raw
        found[key] = new_name(raw if places or OmegaConf.is_dict(resolved) else plain_value(resolved))

    walk(OmegaConf.to_container(config, resolve=False), "")
    return {key: value for key, value in found.items() if not may_change(key)}


def may_change(key: str) -> bool:
    """Whether a key, or a node around it, is in `MAY_CHANGE`."""
    return any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE)


def plain_value(value: Any) -> Any:
    """Convert a config value to what JSON would read back."""
    content = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return json.loads(json.dumps(content, default=str))


def refuse_other_config(run_dir: Path, config: DictConfig, begun: bool) -> None:
    """Write the config of a run to its folder, and refuse to resume a run that has `begun` with another config.

    Raises:
        ValueError: if keys changed; they are named with their old and new values.
    """
    file, now = run_dir / "resume_config.json", _leaves(config)
    if begun and file.exists():
        noted = json.loads(file.read_text())
        before = {key: new_name(value) for key, value in noted.items() if not may_change(key)}
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            listed = ", ".join(f"{key}={now.get(key)} (was {before.get(key)})" for key in changed)
            raise ValueError(
                f"{run_dir} holds a run with another config and would resume with {listed}: change it back, train "
                f"again with fresh=true, or use another folder with name=…. These may change: {', '.join(MAY_CHANGE)}."
            )
    write_whole(file, json.dumps(now, indent=2, default=str) + "\n")


def keep_hydra_config(run_dir: Path, hydra_dir: Path) -> None:
    """Copy Hydra's record of the config to a run folder that `paths.run_dir` set to another place than Hydra's own."""
    written = hydra_dir / ".hydra"
    if written.is_dir() and hydra_dir.resolve() != run_dir.resolve():
        shutil.copytree(written, run_dir / ".hydra", dirs_exist_ok=True)


def write_provenance(run_dir: Path, config: DictConfig) -> dict[str, Any]:
    """Write `provenance.json`: argv, git state, versions, seed, device and config hash, without secrets."""
    status = _git("status", "--porcelain")
    record = {
        "argv": [Path(sys.argv[0]).name, *map(redact, sys.argv[1:])],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(status) if status is not None else None,
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "device": device_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "seed": config.get("seed"),
        "config_hash": config_hash(config),
    }
    write_whole(run_dir / "provenance.json", json.dumps(record, indent=2) + "\n")
    return record
