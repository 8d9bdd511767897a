"""`hass-train`: features, training, measurement, report. `hass-train --help` lists the config groups.

    hass-train                                   # the quickstart
    hass-train experiment=smoke                  # the whole pipeline on a tiny target, one minute
    hass-train -m model/loss=eagle,hass model.alignment.depth=1,3      # the paper's 2 x 2
    hass-train '+heads={eagle: {loss: eagle}, hass: {loss: hass}}'     # several heads in one pass over the data

The same command resumes an interrupted run, and prints the result of a finished one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from hass_lightning.commands.command import command
from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.draft.checkpoint import holds_head
from hass_lightning.report import run_report
from hass_lightning.runs.folder import forget, read_metrics, write_metrics
from hass_lightning.runs.lock import only_one_here
from hass_lightning.runs.provenance import keep_hydra_config, refuse_other_config, write_provenance
from hass_lightning.runs.ranks import is_first_process, settle_ranks
from hass_lightning.runs.screen import place, stage, without_tables
from hass_lightning.training.callbacks import DecodingBenchmark, KeepLastDraft
from hass_lightning.training.fit import fit, measure, spent_so_far
from hass_lightning.training.from_config import build_heads, build_module, make_loggers, make_trainer, trainer_settings
from hass_lightning.training.heads import HeadsModule, heads_callbacks
from hass_lightning.training.last_checkpoint import LastCheckpoint, find_last_checkpoint
from hass_lightning.training.module import HassModule
from hass_lightning.training.plan import plan_run
from hass_lightning.training.rehearsal import rehearse_end
from hass_lightning.training.resume import Layout, given_checkpoint, refuse_other_layout
from hass_lightning.training.settings import check_monitors, check_settings
from hass_lightning.training.strategy import num_processes
from hass_lightning.training.wandb_logging import close_wandb, wandb_place

log = logging.getLogger(__name__)


@command("train")
def main(config: DictConfig) -> dict[str, Any]:
    """Train a head and measure it; the result is also in `metrics.json` of the run folder."""
    check_settings(config)
    if config.plan:
        return plan_run(config)
    settle(config)
    run_dir = Path(config.paths.run_dir)
    with only_one_here(run_dir) if is_first_process() else contextlib.nullcontext():
        return finished_result(config, run_dir) or run(config, run_dir)


def run(config: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Do what is left to do for a run, whose folder this process has locked."""
    begin(config, run_dir)
    with stage("target") as loading:
        target = instantiate(config.target)
        loading.detail = target.name
    data: FeatureDataModule = instantiate(config.data)(target=target)
    callbacks: dict[str, Callback] = {name: instantiate(node) for name, node in config.callbacks.items() if node}
    benchmark = next((each for each in callbacks.values() if isinstance(each, DecodingBenchmark)), None)
    with open_loggers(config, run_dir) as loggers:
        spent = train(config, data, callbacks, benchmark, loggers, run_dir)
        if not is_first_process():
            return {"_silent": True}
        questions = {c.id: c.question for c in data.validation_conversations}
        found: dict[str, dict[str, Any]] = {}
        for head in heads_of(config) or [""]:  # the only head is in the run folder itself
            found[head], rows, records = measure(target, data, benchmark, loggers, run_dir / head)
            with stage("report") as report:
                run_report(run_dir / head, rows, records, tokenizer=target.tokenizer, prompts=questions)
                report.detail = "report.html"
    metrics: dict[str, Any] = found.get("") or {"heads": found}
    metrics |= {**spent, "run_dir": str(run_dir), "data_hash": data.data_hash()}
    metrics["_metric"] = metrics.get(str(config.optimized_metric).split("/")[-1])
    write_metrics(run_dir, metrics)
    return metrics


def heads_of(config: DictConfig) -> list[str]:
    """Return the names of `heads`; empty if the run trains one head."""
    return [str(name) for name in config.get("heads") or {}]


def settle(config: DictConfig) -> None:
    """Make this process the rank that the config implies, whatever an earlier launch left in the environment."""
    processes = num_processes(config.trainer)
    settle_ranks(processes, config.trainer.num_nodes)
    if processes == 1:
        rank_zero_only.rank = 0  # type: ignore[attr-defined]  # Lightning read the environment when it was imported


def finished_result(config: DictConfig, run_dir: Path) -> dict[str, Any] | None:
    """Return the result of a finished run; None if there is something to do.

    Raises:
        ValueError: if the run in this folder has another config.
    """
    result = None if config.fresh else read_metrics(run_dir)
    if result is None:
        return None
    if not is_first_process():
        return {"_silent": True}
    refuse_other_config(run_dir, config, begun=True)
    log.info("%s is finished: its result follows (fresh=true trains again)", run_dir)
    return result


def begin(config: DictConfig, run_dir: Path) -> None:
    """Set seed and threads of this process; the first process records the provenance of the run.

    Raises:
        ValueError: if the run in this folder has another config.
    """
    if config.fresh:
        forget(run_dir)
    L.seed_everything(config.seed, workers=True, verbose=False)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if is_first_process():
        begun = (run_dir / "trained").exists() or any((run_dir / "checkpoints").glob("last.ckpt*"))
        refuse_other_config(run_dir, config, begun)
        write_provenance(run_dir, config)
        keep_hydra_config(run_dir, Path(HydraConfig.get().runtime.output_dir))


@contextlib.contextmanager
def open_loggers(config: DictConfig, run_dir: Path) -> Iterator[list[Logger]]:
    """Open the loggers of a run, and close them with its outcome."""
    loggers, status, exit_code = make_loggers(config, run_dir), "success", 0
    try:
        yield loggers
    except BaseException as error:
        status, exit_code = "failed", 1
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            exit_code = error.code
        raise
    finally:
        for logger in loggers:
            logger.finalize(status)
        if (where := wandb_place()) is not None:
            place("W&B", where)
        close_wandb(exit_code)


def train(
    config: DictConfig,
    data: FeatureDataModule,
    callbacks: dict[str, Callback],
    benchmark: DecodingBenchmark | None,
    loggers: list[Logger],
    run_dir: Path,
) -> dict[str, float]:
    """Build module and Trainer and fit, unless this folder has the trained heads; return the compute of all attempts.

    With `heads`, several are trained on one stream of batches; each is saved in the subfolder of its name.
    """
    heads = heads_of(config)
    if (run_dir / "trained").exists() and all(holds_head(run_dir / head / "draft") for head in heads or [""]):
        return spent_so_far(run_dir)
    # build module and Trainer first: invalid values raise an error before the features are extracted
    module: HassModule | HeadsModule
    if heads:
        module = build_heads(config, data)
        callbacks = heads_callbacks(callbacks, module.names, run_dir)
    else:
        module, coverage = build_module(config, data)
        check_monitors(callbacks, module)
        callbacks = callbacks | {"last_draft": KeepLastDraft(run_dir / "draft")}
        if coverage is not None:
            log.info("draft vocabulary: %d of %d tokens cover %.2f %% of the training answers",
                     module.draft.vocab_size, data.target.head.vocab_size, 100 * coverage)  # fmt: skip
    given = prepare_checkpoints(config, callbacks, run_dir)
    trainer = make_trainer(config, data, list(callbacks.values()), loggers, module)
    for each in module.modules_by_name.values():
        rehearse(each, data, benchmark, run_dir)
    return fit(module, trainer, data, run_dir, given, config.init_from)


def prepare_checkpoints(config: DictConfig, callbacks: dict[str, Callback], run_dir: Path) -> str | None:
    """Return the given checkpoint, and refuse one of another layout of processes than this run."""
    given = given_checkpoint(config.ckpt_path)
    settings = trainer_settings(config)
    refuse_other_layout(find_last_checkpoint(run_dir / "checkpoints") or given, settings)
    for callback in callbacks.values():
        if isinstance(callback, LastCheckpoint):
            callback.layout = Layout.of_run(settings)
    return given


def rehearse(module: HassModule, data: FeatureDataModule, benchmark: DecodingBenchmark | None, run_dir: Path) -> None:
    """Rehearse the end of the run with the untrained head, in the first process."""
    if is_first_process():
        with stage("rehearsal"), without_tables():
            seconds = rehearse_end(module, data, benchmark, run_dir, run_report)
        log.info("rehearsed the end of the run in %.1f s", seconds)


if __name__ == "__main__":
    main()
