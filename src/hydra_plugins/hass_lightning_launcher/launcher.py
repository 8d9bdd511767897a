"""The Hydra launcher `subprocess`.

In-process launchers cannot run Lightning's multi-process strategies: the second rank starts the same command line
again, `-m` included, and so runs the whole sweep itself (with Optuna, another configuration than rank 0), and the
environment of one job's ranks leaks into the next. Here every job is `python -m <module> <its overrides>`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from hass_lightning.ledger import Entry, Ledger, cell_name, sweep_name

from ._config import SubprocessLauncherConf
from ._pool import Cell, Pool, Stopped
from ._process import entry_point, job_command
from ._resources import deal_gpus, visible_gpus

log = logging.getLogger(__name__)


ConfigStore.instance().store(
    group="hydra/launcher", name="subprocess", node=SubprocessLauncherConf, provider="hass_lightning_launcher"
)

# For conf/hydra/default.yaml. The sweep's name is cached with the multirun's config, from which Hydra copies it to the
# jobs, so that other launchers (submitit) compute it once, too; a cell's name is each job's own.
OmegaConf.register_new_resolver("hass.sweep_name", sweep_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("hass.cell_name", cell_name, replace=True)


class JobFailed(CompactHydraException):
    """What a failed, stopped or never started job raises when its sweeper asks for the result."""


class SubprocessLauncher(Launcher):
    """Starts every job of a multirun as its own process; see `SubprocessLauncherConf` for the arguments."""

    def __init__(
        self,
        n_jobs: int = 1,
        gpus_per_job: int | None = None,
        budget_hours: float | None = None,
        grace_seconds: float = 60.0,
        max_requeues: int = 3,
    ) -> None:
        if n_jobs < 1:
            raise ValueError(f"hydra.launcher.n_jobs={n_jobs}: at least one job at a time")
        self.n_jobs = n_jobs
        self.gpus_per_job = gpus_per_job
        self.deadline = None if budget_hours is None else time.monotonic() + 3600 * budget_hours
        self.grace_seconds = grace_seconds
        self.max_requeues = max_requeues

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over."""
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs that the ledger does not know as completed, and return the results of all.

        Raises:
            JobFailed: if `budget_hours` was spent before this call.
            SystemExit: after Ctrl-C or SIGTERM, when all jobs have ended.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise JobFailed("hydra.launcher.budget_hours is spent; the same command goes on where this one stopped")
        sweep_folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        pool = Pool(
            Ledger(sweep_folder),
            deal_gpus(self.n_jobs, self.gpus_per_job, visible_gpus() if self._deals_gpus() else []),
            cwd=str(self.config.hydra.runtime.cwd),
            git=_git_commit(),
            deadline=self.deadline,
            grace_seconds=self.grace_seconds,
            max_requeues=self.max_requeues,
        )
        if len(job_overrides) > 1:  # Optuna asks for single jobs, again and again
            log.info("%d jobs, %d at a time, in %s", len(job_overrides), self.n_jobs, sweep_folder)
        entry = entry_point(self.task_function)
        cells: dict[str, Cell] = {}
        returns = []
        for num, overrides in enumerate(job_overrides, initial_job_idx):
            job = self._compose(list(overrides), num)
            folder = Path(str(job.working_dir))
            command = job_command(self.config, entry, list(overrides), folder, num)
            num_ranks = _count(OmegaConf.select(job.cfg, "trainer.devices", default=1))
            name = cell_name(self.config.hydra.job.config_name, overrides)
            cells.setdefault(name, Cell(name, num, list(overrides), command, folder, _config_hash(job.cfg), num_ranks))
            returns.append((name, job))
        if OmegaConf.select(self.config, "plan", default=False):
            self._plan(pool.ledger, [(cells[name], job.cfg) for name, job in dict(returns).items()])
        try:
            pool.run(list(cells.values()))
        except Stopped as stop:
            done = sum(cell.outcome is not None and cell.outcome.status == "completed" for cell in cells.values())
            log.warning("stopped: %d of %d jobs completed; the same command goes on from here", done, len(cells))
            raise SystemExit(128 + stop.number) from None
        self._summarize(list(cells.values()))
        return [_with_outcome(job, cells[name].outcome) for name, job in returns]

    def _plan(self, ledger: Ledger, cells: Sequence[tuple[Cell, DictConfig]]) -> None:
        """Print what the sweep would take, and end."""
        from hass_lightning.planning import plan_sweep

        latest = ledger.latest()
        done = [
            entry
            for cell, _ in cells
            if (entry := latest.get(cell.name)) and (entry.status, entry.config_hash) == ("completed", cell.config_hash)
        ]
        left = [config for cell, config in cells if cell.name not in {entry.cell for entry in done}]
        seconds = [entry.seconds for entry in done if entry.seconds]
        print(json.dumps(plan_sweep(left, seconds, len(done), self.n_jobs)), flush=True)
        raise SystemExit(0)

    def _deals_gpus(self) -> bool:
        return self.gpus_per_job != 0 and (self.n_jobs > 1 or self.gpus_per_job is not None)

    def _compose(self, overrides: list[str], num: int) -> JobReturn:
        """The config of one job, as Hydra would compose it in this process."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = num
        earlier = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)
        try:
            folder = Path(str(config.hydra.sweep.dir)).absolute() / str(config.hydra.sweep.subdir)
        finally:
            HydraConfig.instance().cfg = earlier
        task = copy.deepcopy(config)
        with read_write(task), open_dict(task):
            del task["hydra"]
        return JobReturn(
            overrides=overrides, cfg=task, hydra_cfg=config, working_dir=str(folder), task_name=config.hydra.job.name
        )

    def _summarize(self, cells: Sequence[Cell]) -> None:
        failed = [cell for cell in cells if cell.outcome is not None and cell.outcome.status == "failed"]
        num_unstarted = sum(cell.outcome is None for cell in cells)
        num_completed = len(cells) - len(failed) - num_unstarted
        if len(cells) > 1:
            log.info("%d completed, %d failed, %d not started", num_completed, len(failed), num_unstarted)
            for cell in failed:
                log.error(
                    "#%d %s failed: %s\n    %s", cell.num, cell.name, " ".join(cell.overrides), cell.outcome.error
                )
        if failed or num_unstarted:
            log.info("the same command runs the %d again that are not completed", len(failed) + num_unstarted)


def _with_outcome(job: JobReturn, outcome: Entry | None) -> JobReturn:
    if outcome is not None and outcome.status == "completed":
        job.status, job.return_value = JobStatus.COMPLETED, outcome.metric
        return job
    why = (
        "not started: hydra.launcher.budget_hours is spent" if outcome is None else f"{outcome.status}: {outcome.error}"
    )
    job.status, job.return_value = JobStatus.FAILED, JobFailed(f"{why}\n{job.working_dir}")
    return job


def _config_hash(config: DictConfig | None) -> str:
    """Of the config as written, interpolations unresolved: the same on every machine and at any time.

    Where files lie and who logs is left out, as in `provenance.config_hash` (of the resolved config, so not the same).
    """
    assert config is not None
    content = OmegaConf.masked_copy(
        config, [key for key in config if key not in ("paths", "logger", "study", "fresh", "plan", "estimate")]
    )
    return hashlib.sha256(OmegaConf.to_yaml(content, sort_keys=True).encode()).hexdigest()[:12]


def _count(devices: object) -> int:
    return int(str(devices)) if str(devices).isdigit() else 1


def _git_commit() -> str | None:
    """The commit of this code, with `+` if there are changes on top; None outside a repository."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
