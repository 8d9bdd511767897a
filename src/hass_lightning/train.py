"""`hass-train`: features, training, measurement, report. `hass-train --help` lists the config groups.

    hass-train                                   # the quickstart
    hass-train experiment=smoke                  # the whole path on a tiny target in a minute
    hass-train -m model/loss=eagle,hass model.alignment.depth=1,3      # the paper's 2 x 2

The same command started again goes on where it was stopped; a finished run prints its result.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict

from hass_lightning.cli import command, is_first_process
from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.data.manifest import write_feature_manifest
from hass_lightning.draft import load_draft
from hass_lightning.draft.checkpoint import save_start
from hass_lightning.draft.initialize import least_squares_start, start_from
from hass_lightning.files import write_whole
from hass_lightning.planning import plan_run
from hass_lightning.provenance import add_provenance, plain, refuse_other_config, write_provenance
from hass_lightning.report import run_report
from hass_lightning.target.model import working_dtype
from hass_lightning.training.callbacks import DecodingBenchmark, decode_metrics
from hass_lightning.training.compute import ComputeMeter, RunCost
from hass_lightning.training.last_checkpoint import find_last_checkpoint
from hass_lightning.training.module import HassModule
from hass_lightning.training.strategy import check_trainer_config, lost_process, num_processes
from hass_lightning.training.wandb_logging import close_wandb, log_results, wandb_settings

log = logging.getLogger(__name__)


@command("train")
def main(config: DictConfig) -> dict[str, Any]:
    """Train a head and measure it; the result is also in `metrics.json` of the run folder."""
    if config.plan:
        return plan_run(config)
    run_dir = Path(config.paths.run_dir)
    finished = run_dir / "metrics.json"
    if finished.exists() and not config.fresh:
        if not is_first_process():
            return {"_silent": True}
        refuse_other_config(run_dir, config, begun=True)
        log.info("%s is finished: its result follows (fresh=true trains again)", run_dir)
        return json.loads(finished.read_text())
    check_trainer_config(config.trainer)
    if config.fresh:
        forget(run_dir)
    L.seed_everything(config.seed, workers=True, verbose=False)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    rank_zero = is_first_process()
    if rank_zero:
        begun = (run_dir / "trained").exists() or any((run_dir / "checkpoints").glob("last.ckpt*"))
        refuse_other_config(run_dir, config, begun)
        write_provenance(run_dir, config)

    target = instantiate(config.target)
    data: FeatureDataModule = instantiate(config.data)(target=target)
    callbacks: list[Callback] = [instantiate(node) for node in config.callbacks.values() if node]
    benchmark = next((callback for callback in callbacks if isinstance(callback, DecodingBenchmark)), None)
    loggers = make_loggers(config, run_dir)
    status = "failed"
    try:
        spent = fit(config, data, callbacks, loggers, run_dir)
        if not rank_zero:
            status = "success"
            return {"_silent": True}
        metrics = measure(target, data, benchmark, loggers, run_dir) | spent
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)
        close_wandb()
    metrics |= {"run_dir": str(run_dir), "data_hash": data.data_hash()}
    metrics["_metric"] = metrics.get(str(config.optimized_metric).split("/")[-1])
    write_whole(finished, json.dumps(metrics, indent=2) + "\n")
    return metrics


def forget(run_dir: Path) -> None:
    """Remove what an earlier run left in this folder (fresh=true), in the first process."""
    if is_first_process():
        for name in ("checkpoints", "draft", "csv", "tensorboard"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for name in ("records.jsonl", "metrics.json", "trained", "train_seconds.json", "wandb_id", "report.html"):
            (run_dir / name).unlink(missing_ok=True)


def fit(
    config: DictConfig, data: FeatureDataModule, callbacks: list[Callback], loggers: list[Logger], run_dir: Path
) -> dict[str, float]:
    """Train, from the last checkpoint if there is one; what was spent over all attempts: seconds, tokens, FLOPs."""
    clock = run_dir / "train_seconds.json"
    spent = json.loads(clock.read_text()) if clock.exists() else {"train_seconds": 0.0}
    if (run_dir / "trained").exists():
        return spent
    target = data.target
    # module and trainer first: a wrong value is refused before the features are extracted
    module, coverage = build_module(config, data)
    draft = module.draft
    if coverage is not None:
        log.info("draft vocabulary: %d of %d tokens cover %.2f %% of the training answers",
                 draft.vocab_size, target.head.vocab_size, 100 * coverage)  # fmt: skip
    trainer = make_trainer(config, data, callbacks, loggers, module)
    store, _ = data.stores()  # before any process group waits: another process of this run waits at the file lock
    if is_first_process():  # the trainer does not know its rank yet
        keys = write_feature_manifest(run_dir / "features.json", target, data.tokens(), data.stores())
        add_provenance(run_dir, features=keys)
    last = config.ckpt_path or find_last_checkpoint(run_dir / "checkpoints")
    if last:
        log.info("resuming from %s", last)
    elif config.init_from:
        start_from(draft, config.init_from)
        log.info("the head starts from %s", config.init_from)
    elif draft.start == "least_squares":
        rows = least_squares_start(draft, target.head, (store.read(index) for index in range(len(store))))
        log.info("fc starts as the least-squares map of %d rows", rows)
    if not last and trainer.is_global_zero:
        folder = getattr(store, "folder", None)  # its name is a hash of tokens, masks and target
        save_start(run_dir / "start.json", draft, folder and folder.name)
    started = time.perf_counter()
    # batch n is a function of (seed, n), see data/datamodule.py: there is no loader state to resume
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
        if trainer.global_step * trainer.accumulate_grad_batches % int(trainer.val_check_interval):
            trainer.validate(module, datamodule=data, verbose=False)  # the last steps count, too
    except RuntimeError as error:
        if lost_process(error):
            raise ConnectionError(
                "another process of this run has died (its own lines, or the system's log, say of what; kill -9 and a "
                "lack of memory leave none): this one stops, too. The same command goes on from the last checkpoint."
            ) from error
        raise
    finally:
        meter = next(each for each in trainer.callbacks if isinstance(each, ComputeMeter))  # type: ignore[attr-defined]
        seconds = spent["train_seconds"] + time.perf_counter() - started
        spent = {"train_seconds": round(seconds, 1)}
        spent |= {f"train_{name}": n for name, n in meter.spent(trainer.global_step, trainer.max_steps).items()}
        if trainer.is_global_zero:
            write_whole(clock, json.dumps(spent))
    if trainer.is_global_zero:
        (run_dir / "trained").touch()
    return spent


def build_module(config: DictConfig, data: FeatureDataModule) -> tuple[HassModule, float | None]:
    """The composed LightningModule with a fresh head, and the share of answers that a pruned vocabulary covers."""
    draft = instantiate(config.model.draft)(data.target.config)
    token_ids, coverage = None, None
    if draft.vocab_size is not None:
        token_ids, coverage = data.most_frequent_tokens(draft.vocab_size)
    node = OmegaConf.masked_copy(config.model, [key for key in config.model if key != "draft"])
    return instantiate(node)(draft=draft, head=data.target.head, token_ids=token_ids), coverage


def make_trainer(
    config: DictConfig,
    data: FeatureDataModule,
    callbacks: list[Callback],
    loggers: list[Logger],
    module: HassModule | None = None,
) -> L.Trainer:
    """The Trainer. A run is one pass over a numbered sequence of batches, whatever number of epochs that spans.

    `max_epochs` and a fractional `val_check_interval` are turned into numbers of batches here, so that resuming never
    depends on where an epoch ends (see data/order.py); with the module, `config.compute` is, too.
    """
    node = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(node, dict)
    settings: dict[str, Any] = {str(key): value for key, value in node.items()}
    if settings["precision"] == "auto":
        on_gpu = settings["accelerator"] in ("gpu", "cuda") or (
            settings["accelerator"] == "auto" and torch.cuda.is_available()
        )
        fast = working_dtype("cuda" if on_gpu else "cpu") == torch.bfloat16
        settings["precision"] = "bf16-mixed" if fast else "32-true"
    world_size = num_processes(settings)
    accumulate = int(settings.get("accumulate_grad_batches") or 1)
    per_epoch = max(1, len(data.tokens()[0]) // (data.batch_size * world_size))
    share = settings.pop("limit_train_batches", None)
    if share is not None and share != 1.0:
        per_epoch = max(1, min(per_epoch, share if isinstance(share, int) else round(share * per_epoch)))
    limits = []
    if (max_epochs := settings.pop("max_epochs", None)) not in (None, -1):
        limits.append(math.ceil(max_epochs * per_epoch / accumulate))
    if settings.get("max_steps", -1) not in (None, -1):
        limits.append(settings["max_steps"])
    num_steps = min(limits, default=None)
    if module is not None:
        global_batch = data.batch_size * world_size
        head = (module.draft.config, len(module.vocabulary), module.planned_alignment)
        cost = RunCost(data.tokens()[0], global_batch, data.seed, accumulate, *head)
        budget = dict(config.compute)
        if (seconds := budget.pop("seconds")) is not None:
            settings["max_time"] = {"seconds": seconds}
        num_steps = cost.steps_within(num_steps, **budget)
        callbacks = [*callbacks, ComputeMeter(cost)]
    if num_steps is None:
        raise ValueError(
            "none of trainer.max_epochs, trainer.max_steps, compute.tokens, compute.flops is set: it would never end."
        )
    data.num_batches = num_steps * accumulate
    interval = settings.get("val_check_interval") or 1.0
    if isinstance(interval, float):
        interval = max(1, round(interval * per_epoch))
    interval = min(data.num_batches, math.ceil(interval / accumulate) * accumulate)
    settings |= {
        "max_steps": num_steps,
        "max_epochs": -1,
        "val_check_interval": interval,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
    }
    with open_dict(config):
        trainer = OmegaConf.create(settings)
    return instantiate(trainer, callbacks=callbacks, logger=loggers, _convert_="all")


def make_loggers(config: DictConfig, run_dir: Path) -> list[Logger]:
    """All configured loggers; W&B goes offline by itself where there is no key, and nothing waits for a login."""
    loggers: list[Logger] = []
    keep_curves(run_dir)
    for node in (config.logger or {}).values():
        if not node:
            continue
        if "WandbLogger" in node._target_:
            settings = wandb_settings(plain(config), run_dir)
            loggers.append(instantiate(node, _partial_=True, _convert_="all")(**settings))
        else:
            loggers.append(instantiate(node))
    return loggers


def keep_curves(run_dir: Path) -> None:
    """Move the curves of an interrupted attempt aside: Lightning's CSVLogger would delete them."""
    curves = run_dir / "csv" / "metrics.csv"
    if curves.exists() and is_first_process():
        number = len(list(curves.parent.glob("metrics.*.csv")))
        curves.rename(curves.with_name(f"metrics.{number}.csv"))


def measure(
    target: Any, data: FeatureDataModule, benchmark: DecodingBenchmark | None, loggers: list[Logger], run_dir: Path
) -> dict[str, Any]:
    """The final measurement on held-out questions, its table, plots and logged metrics."""
    data.tokens()
    saved = load_draft(run_dir / "draft")
    metrics: dict[str, Any] = {"simulated_acceptance_length": saved.notes.get("val/acceptance_length")}
    rows: list[dict[str, Any]] = []
    records: list[Any] = []
    if benchmark is not None:
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
    run_report(run_dir, rows, records, tokenizer=target.tokenizer, prompts=questions)
    return metrics


if __name__ == "__main__":
    main()
