"""The two stages of a run: train the head, then measure it by decoding."""

from __future__ import annotations

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger

from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.data.manifest import write_feature_manifest
from hass_lightning.draft import load_draft
from hass_lightning.draft.checkpoint import save_start
from hass_lightning.draft.initialize import initialize, start_from
from hass_lightning.measure.record import Record
from hass_lightning.runs.files import write_whole
from hass_lightning.runs.provenance import add_provenance
from hass_lightning.runs.ranks import is_first_process
from hass_lightning.runs.screen import stage
from hass_lightning.target_model import TargetModel
from hass_lightning.training.callbacks import DecodingBenchmark, decode_metrics
from hass_lightning.training.compute import ComputeMeter
from hass_lightning.training.heads import HeadsModule
from hass_lightning.training.last_checkpoint import find_last_checkpoint
from hass_lightning.training.module import HassModule
from hass_lightning.training.rendezvous import dead_process, part
from hass_lightning.training.strategy import lost_process
from hass_lightning.training.wandb_logging import log_results

log = logging.getLogger(__name__)


def spent_so_far(run_dir: Path) -> dict[str, float]:
    """Return the training compute of all attempts: `train_seconds`, and tokens and FLOPs once an attempt has ended."""
    clock = run_dir / "train_seconds.json"
    return json.loads(clock.read_text()) if clock.exists() else {"train_seconds": 0.0}


def fit(
    module: HassModule | HeadsModule,
    trainer: L.Trainer,
    data: FeatureDataModule,
    run_dir: Path,
    ckpt_path: str | None = None,
    init_from: str | None = None,
) -> dict[str, float]:
    """Train, resuming from the last checkpoint if there is one, and record in `run_dir` what the run started from.

    Args:
        module: the module to train; of several heads, each has the subfolder of its name.
        trainer: the Trainer.
        data: the data.
        run_dir: the run folder.
        ckpt_path: checkpoint to start from if the run has none of its own.
        init_from: run folder whose head a new run starts from.

    Returns:
        training compute of all attempts: seconds, tokens, FLOPs.

    Raises:
        ConnectionError: if another process of this run has died.
    """
    # before the process group is created, because another process of this run may be waiting for the file lock
    store, _ = data.stores()
    if is_first_process():  # the Trainer does not know its rank yet
        keys = write_feature_manifest(run_dir / "features.json", data.target, data.tokens(), data.stores())
        add_provenance(run_dir, features=keys)
    checkpoint = find_last_checkpoint(run_dir / "checkpoints") or ckpt_path
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    else:
        for name, each in module.modules_by_name.items():
            _initialize_head(each, data.target, store, init_from)
            if trainer.is_global_zero:
                folder = getattr(store, "folder", None)  # the folder name is a hash of tokens, masks and target
                (run_dir / name).mkdir(exist_ok=True)
                save_start(run_dir / name / "start.json", each.draft, folder and folder.name)
    before, started = spent_so_far(run_dir), time.perf_counter()
    try:
        with stage("training") as training:
            _fit_and_validate(trainer, module, data, checkpoint)
            training.detail = f"{trainer.global_step:,} steps"
        part()
    except BaseException as error:
        part(error)
        raise
    finally:
        spent = _note_spent(trainer, run_dir, before["train_seconds"] + time.perf_counter() - started)
    if trainer.is_global_zero:
        (run_dir / "trained").touch()
    return spent


def _initialize_head(module: HassModule, target: TargetModel, store: Any, init_from: str | None) -> None:
    """Initialize the weights of a new head."""
    if init_from:
        start_from(module.draft, init_from, module.token_ids)
        log.info("the head is initialized from %s", init_from)
    else:
        initialize(module.draft, target, (store.read(index) for index in range(len(store))), module.token_ids)


def _fit_and_validate(
    trainer: L.Trainer, module: L.LightningModule, data: FeatureDataModule, checkpoint: str | None
) -> None:
    """Train, and validate at the end unless the last step was validated."""
    # Batch n is a function of (seed, n) (data/datamodule.py), so there is no loader state to restore.
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        num_batches = trainer.global_step * trainer.accumulate_grad_batches
        if trainer.limit_val_batches and (not num_batches or num_batches % int(trainer.val_check_interval)):
            trainer.validate(module, datamodule=data, verbose=False)
    except RuntimeError as error:
        if lost_process(error):
            raise ConnectionError(
                f"{dead_process() or 'another process'} of this run has died, so this one stops. Its own output or the "
                "system log has the cause (kill -9 and out-of-memory leave no output). The same command resumes from "
                "the last checkpoint."
            ) from error
        raise


def _note_spent(trainer: L.Trainer, run_dir: Path, seconds: float) -> dict[str, float]:
    """Write the training compute of all attempts, however this one ended."""
    meters = [each for each in trainer.callbacks if isinstance(each, ComputeMeter)]  # type: ignore[attr-defined]
    spent = {"train_seconds": round(seconds, 1)}
    for meter in meters:  # none with several heads
        spent |= {f"train_{name}": n for name, n in meter.spent(trainer.global_step, trainer.max_steps).items()}
    if trainer.is_global_zero:
        write_whole(run_dir / "train_seconds.json", json.dumps(spent))
    return spent


def measure(
    target: TargetModel,
    data: FeatureDataModule,
    benchmark: DecodingBenchmark | None,
    loggers: list[Logger],
    run_dir: Path,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Record]]:
    """Measure the head on held-out questions and log the result.

    Returns:
        (metrics, rows of `summarize`, records); the two lists are empty without `benchmark`.
    """
    data.tokens()
    saved = load_draft(run_dir / "draft")
    if saved.notes.get("chosen_by") == "none":
        log.warning(
            "no validation has selected a head: draft/ contains the last one, of step %s", saved.notes.get("step")
        )
    metrics: dict[str, Any] = {"simulated_acceptance_length": saved.notes.get("val/acceptance_length")}
    rows: list[dict[str, Any]] = []
    records: list[Record] = []
    if benchmark is not None:
        with stage("measuring"):
            rows, records, checked = benchmark.measure(
                target, saved, data.validation_conversations, records_path=run_dir / "records.jsonl"
            )
        row = next(row for row in rows if row["decoder"] != "autoregressive")
        names = ("acceptance_length", "speedup")
        metrics |= {f"{n}{end}": row[f"{n}{end}"] for n in names for end in ("", "_low", "_high")}
        metrics |= {"tokens_per_second": row["tokens_per_second"], "num_prompts": row["num_prompts"], **checked}
        for logger in loggers:
            logger.log_metrics(decode_metrics(rows, records), step=saved.notes.get("step"))
    questions = {c.id: c.question for c in data.validation_conversations}
    log_results(loggers, run_dir, metrics, records, target.tokenizer, questions)
    return metrics, rows, records
