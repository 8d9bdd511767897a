"""The end of a multirun: one line of JSON, and an exit code that says whether every job completed."""

from __future__ import annotations

import json
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from hass_lightning.ledger import LAUNCH, Ledger


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
