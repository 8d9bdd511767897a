"""Before a command: no secret in its config. After a multirun: one line of JSON, and an exit code."""

from __future__ import annotations

import json
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from hass_lightning.ledger import LAUNCH, Ledger
from hass_lightning.redaction import find_secrets


class NoSecrets(Callback):
    """Refuses a config with a secret in it before Hydra writes that config to disk."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Raises SystemExit(1), naming the keys and never the values (Hydra would swallow any other exception)."""
        if keys := list(find_secrets(OmegaConf.to_container(config, resolve=False))):
            sentence = (
                f"{', '.join(keys)} holds a secret, and a config is written to disk and logged: set it in the "
                "environment (HF_TOKEN, WANDB_API_KEY), where the libraries look for it by themselves."
            )
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            raise SystemExit(1)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """The same before a sweep."""
        self.on_run_start(config)


class SweepResult(Callback):
    """Prints the sweep's result. Optuna tolerates failed trials (`max_failure_rate`) and would exit with 0."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Raises SystemExit(1) if a job of this launch failed."""
        ledger = Ledger(str(config.hydra.sweep.dir))
        latest = ledger.latest()
        touched = {entry.cell for entry in ledger.entries() if entry.launch == LAUNCH}
        if not latest:
            return  # another launcher
        failed = sum(latest[cell].status == "failed" for cell in touched)
        completed = sum(entry.status == "completed" for entry in latest.values())
        print(
            json.dumps({"sweep_dir": str(ledger.folder.absolute()), "num_completed": completed, "num_failed": failed}),
            flush=True,
        )
        if failed:
            raise SystemExit(1)
