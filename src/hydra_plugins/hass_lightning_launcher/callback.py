"""Hydra callbacks: refuse configs with secrets before a run; print a JSON line and exit code after a multirun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from hass_lightning.runs.quiet import Log
from hass_lightning.runs.redaction import find_secrets
from hass_lightning.runs.screen import print_error

from ._ending import end_sweep
from .optuna import adopt


class NoSecrets(Callback):
    """Refuses a config that contains a secret, before Hydra writes it to disk."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Raise SystemExit(1), naming the keys but not the values. Hydra would suppress any other exception."""
        if keys := list(find_secrets(OmegaConf.to_container(config, resolve=False))):
            sentence = (
                f"{', '.join(keys)} contains a secret, and configs are written to disk and logged: set it in the "
                "environment instead (HF_TOKEN, WANDB_API_KEY), where the libraries read it."
            )
            print_error(sentence)
            raise SystemExit(1)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the config of a sweep."""
        self.on_run_start(config)


class SweepResult(Callback):
    """Prints the result of a sweep, and exits with 1 if a job failed (Optuna would exit with 0)."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a launcher that keeps no ledger; set what Optuna maximizes, and over which ranges (optuna.py)."""
        if "submitit" in str(config.hydra.launcher.get("_target_")):
            sentence = "hydra/launcher=submitit_slurm keeps no ledger of the cells: use hydra/launcher=slurm."
            print_error(sentence)
            raise SystemExit(1)
        adopt(config)
        if isinstance(sys.stdout, Log) and not any(OmegaConf.select(config, key) for key in ("plan", "status")):
            sys.stdout.attach(Path(str(config.hydra.sweep.dir)) / "log.txt")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the JSON line. Raise SystemExit(1) if a job of this launch failed."""
        if end_sweep(Path(str(config.hydra.sweep.dir))):
            raise SystemExit(1)
