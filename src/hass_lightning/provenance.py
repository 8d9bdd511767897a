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
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=2) + "\n")


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
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    return record
