"""Files of a run folder: the result in `metrics.json`, and preparation of the folder for another attempt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hass_lightning.runs.files import read_json_object, write_whole
from hass_lightning.runs.ranks import is_first_process


def write_metrics(run_dir: Path, metrics: dict[str, Any]) -> None:
    """Write the result of a command to `metrics.json` of its run folder, which marks the run as finished."""
    write_whole(run_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def read_metrics(run_dir: Path) -> dict[str, Any] | None:
    """Read the result in `metrics.json`; None if the run is not finished.

    Raises:
        ValueError: if the file is damaged.
    """
    file = run_dir / "metrics.json"
    return read_json_object(file, "add fresh=true to train again") if file.exists() else None


def forget(run_dir: Path) -> None:
    """Remove the files of an earlier run (fresh=true), in the first process only."""
    if is_first_process():
        for name in ("checkpoints", "draft", "csv", "tensorboard"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for name in ("records.jsonl", "metrics.json", "trained", "train_seconds.json", "wandb_id", "report.html"):
            (run_dir / name).unlink(missing_ok=True)


def keep_curves(run_dir: Path) -> None:
    """Rename the training curves of an interrupted attempt, because Lightning's CSVLogger would delete them."""
    curves = run_dir / "csv" / "metrics.csv"
    if curves.exists() and is_first_process():
        number = len(list(curves.parent.glob("metrics.*.csv")))
        curves.rename(curves.with_name(f"metrics.{number}.csv"))


def run_folder(draft: Path) -> Path | None:
    """The run folder that a head is in: `draft` itself or the folder above it; None if neither has a run's config."""
    return next((each for each in (draft, draft.parent) if (each / ".hydra" / "config.yaml").is_file()), None)
