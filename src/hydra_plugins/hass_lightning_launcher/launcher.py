"""The Hydra launcher `subprocess`.

In-process launchers do not work with Lightning's multi-process strategies: the second rank runs the same command line
including `-m`, and thereby the whole sweep (with Optuna, in a configuration that differs from rank 0), and the rank
variables of one job leak into the next. This launcher runs every job as `python -m <module> <its overrides>`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from hass_lightning.runs.ledger import Entry, Ledger, cell_id, sweep_name
from hass_lightning.runs.names import cell_folder, counted
from hass_lightning.runs.screen import print_error, print_result, stdout_console

from ._config import SubprocessLauncherConf
from ._pool import Cell, Pool, Stopped
from ._process import entry_point, job_command
from ._resources import split_gpus, visible_gpus
from ._table import status_counts, status_table

log = logging.getLogger(__name__)


ConfigStore.instance().store(
    group="hydra/launcher", name="subprocess", node=SubprocessLauncherConf, provider="hass_lightning_launcher"
)


# For conf/hydra/default.yaml. The sweep's name is cached with the multirun's config, from which Hydra copies it to the
# jobs, so that other launchers also compute it once; a cell's folder is computed by each job. Overrides are not
# resolved: each job resolves `${seed}` in one of them.
def _written(overrides: Any) -> list[str]:
    plain: Any = OmegaConf.to_container(overrides, resolve=False) if OmegaConf.is_config(overrides) else overrides
    return list(plain)


def _sweep_name(study: Any, config_name: Any, task: Any, hydra: Any = ()) -> str:
    return sweep_name(study, config_name, _written(task), _written(hydra))


def _cell_folder(task: Any) -> str:
    return cell_folder(_written(task))


OmegaConf.register_new_resolver("hass.sweep_name", _sweep_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("hass.cell_folder", _cell_folder, replace=True)


class JobFailed(CompactHydraException):
    """Raised when a sweeper reads the result of a job that failed, was stopped or was not started.

    Attributes:
        sweep_dir: the folder of the sweep; the command then ends with its table (`commands.command`).
    """

    sweep_dir: Path | None = None


class SweepLauncher(Launcher):
    """Base class of the launchers: the cells of a multirun, its plan and its table."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the context given by Hydra."""
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def _cells(
        self, ledger: Ledger, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> tuple[dict[str, Cell], dict[str, DictConfig], list[tuple[str, JobReturn]]]:
        """Return the cells of these jobs and their configs by id, and the id and return value of each job."""
        entry = entry_point(self.task_function)
        cells: dict[str, Cell] = {}
        configs: dict[str, DictConfig] = {}
        returns = []
        for num, overrides in enumerate(job_overrides, initial_job_idx):
            job = self._compose(list(overrides), num)
            config = job.cfg
            assert config is not None
            cell = cell_id(self.config.hydra.job.config_name, overrides)
            wanted = Path(str(job.working_dir))
            folder = ledger.new_folder(cell, wanted, {key: other.folder for key, other in cells.items()})
            job.working_dir = str(folder)
            command = job_command(self.config, config, entry, list(overrides), folder, num)
            num_ranks = _count(OmegaConf.select(config, "trainer.devices", default=1))
            cells.setdefault(cell, Cell(cell, num, list(overrides), command, folder, _config_hash(config), num_ranks))
            configs[cell] = config
            returns.append((cell, job))
        return cells, configs, returns

    def _exit_after_query(self, ledger: Ledger, cells: Mapping[str, Cell], configs: Mapping[str, DictConfig]) -> None:
        """Print the plan (plan=true) or the status table (status=true) of the sweep and exit, if one was requested."""
        if OmegaConf.select(self.config, "plan", default=False):
            print_result(json.dumps(self._plan(ledger, cells, configs)))
            raise SystemExit(0)
        if OmegaConf.select(self.config, "status", default=False):
            stdout_console().print(status_table(ledger, cells.values()), soft_wrap=True, markup=False)
            print_result(json.dumps(status_counts(ledger, cells)))
            raise SystemExit(0)

    def _plan(self, ledger: Ledger, cells: Mapping[str, Cell], configs: Mapping[str, DictConfig]) -> dict[str, Any]:
        from hass_lightning.training.plan import plan_sweep

        latest = ledger.latest()
        done = {
            cell: entry
            for cell, wanted in cells.items()
            if (entry := latest.get(cell)) and (entry.status, entry.config_hash) == ("completed", wanted.config_hash)
        }
        left = [configs[cell] for cell in cells if cell not in done]
        seconds = [entry.seconds for entry in done.values() if entry.seconds]
        return plan_sweep(left, seconds, len(done), self._at_a_time(len(left)))

    def _at_a_time(self, num_cells: int) -> int:
        raise NotImplementedError

    def _compose(self, overrides: list[str], num: int) -> JobReturn:
        """Compose the config of one job, as Hydra would in this process."""
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


class SubprocessLauncher(SweepLauncher):
    """Runs every job of a multirun as a separate process; see `SubprocessLauncherConf` for the arguments."""

    def __init__(
        self,
        n_jobs: int = 1,
        gpus_per_job: int | None = None,
        budget_hours: float | None = None,
        grace_seconds: float = 60.0,
        max_requeues: int = 3,
    ) -> None:
        if n_jobs < 1:
            raise ValueError(f"hydra.launcher.n_jobs={n_jobs} must be at least 1")
        self.n_jobs = n_jobs
        self.gpus_per_job = gpus_per_job
        self.deadline = None if budget_hours is None else time.monotonic() + 3600 * budget_hours
        self.grace_seconds = grace_seconds
        self.max_requeues = max_requeues

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs that are not completed according to the ledger, and return the results of all jobs.

        Raises:
            JobFailed: if `budget_hours` has passed before this call.
            SystemExit: after Ctrl-C or SIGTERM, when all jobs have ended.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise JobFailed("hydra.launcher.budget_hours has passed; the same command resumes the sweep")
        sweep_folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        pool = Pool(
            Ledger(sweep_folder),
            split_gpus(self.n_jobs, self.gpus_per_job, visible_gpus() if self._splits_gpus() else []),
            cwd=str(self.config.hydra.runtime.cwd),
            git=git_commit(),
            deadline=self.deadline,
            grace_seconds=self.grace_seconds,
            max_requeues=self.max_requeues,
        )
        if len(job_overrides) > 1:  # Optuna requests single jobs repeatedly
            log.info("%s, %d at a time, in %s", counted(len(job_overrides), "job"), self.n_jobs, sweep_folder)
        cells, configs, returns = self._cells(pool.ledger, job_overrides, initial_job_idx)
        self._exit_after_query(pool.ledger, cells, configs)
        try:
            pool.run(list(cells.values()))
        except Stopped as stop:
            done = sum(cell.outcome is not None and cell.outcome.status == "completed" for cell in cells.values())
            jobs = counted(len(cells), "job")
            log.warning("stopped: %d of %s completed; the same command resumes the sweep", done, jobs)
            raise SystemExit(128 + stop.number) from None
        self._summarize(list(cells.values()))
        return [with_outcome(job, cells[cell].outcome, sweep_folder) for cell, job in returns]

    def _at_a_time(self, num_cells: int) -> int:
        return self.n_jobs

    def _splits_gpus(self) -> bool:
        return self.gpus_per_job != 0 and (self.n_jobs > 1 or self.gpus_per_job is not None)

    def _summarize(self, cells: Sequence[Cell]) -> None:
        failed = [(cell, cell.outcome) for cell in cells if cell.outcome and cell.outcome.status == "failed"]
        num_unstarted = sum(cell.outcome is None for cell in cells)
        num_completed = len(cells) - len(failed) - num_unstarted
        if len(cells) > 1:
            log.info("%d completed, %d failed, %d not started", num_completed, len(failed), num_unstarted)
            for cell, outcome in failed:
                words = " ".join(cell.overrides)
                log.info("#%d %s failed: %s\n    %s", cell.num, cell.folder.name, words, outcome.error)
        if failed or num_unstarted:
            left = counted(len(failed) + num_unstarted, "job")
            log.info("the same command runs the %s that did not complete again", left)


def refuse(problem: str) -> NoReturn:
    """Print an error message and exit with code 1."""
    print_error(problem)
    raise SystemExit(1)


def with_outcome(job: JobReturn, outcome: Entry | None, sweep_folder: Path) -> JobReturn:
    """Set the status and return value of a job for the sweeper."""
    if outcome is not None and outcome.status == "completed":
        job.status, job.return_value = JobStatus.COMPLETED, outcome.metric
        return job
    why = (
        "not started: hydra.launcher.budget_hours has passed"
        if outcome is None
        else f"{outcome.status}: {outcome.error}"
    )
    failure = JobFailed(f"{why}\n{job.working_dir}")
    failure.sweep_dir = sweep_folder
    job.status, job.return_value = JobStatus.FAILED, failure
    return job


def _config_hash(config: DictConfig) -> str:
    """Return the hash of the config with interpolations unresolved, which is the same on every machine and at any time.

    Paths and loggers are excluded, as in `provenance.config_hash` (which hashes the resolved config).
    """
    left_out = ("paths", "logger", "study", "fresh", "plan", "status", "estimate")
    content = copy.deepcopy(OmegaConf.masked_copy(config, [str(key) for key in config if key not in left_out]))
    if OmegaConf.is_dict(content.get("trainer")):
        with open_dict(content):
            content.trainer.pop("rendezvous_timeout", None)  # has no effect on results, and is not in old ledgers
    text = OmegaConf.to_yaml(content, sort_keys=True)
    # use the old name of target_model/, so that the cells of old ledgers are found
    text = text.replace("hass_lightning.target_model.", "hass_lightning.target.").replace(
        "package://target_model/", "package://target/"
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _count(devices: object) -> int:
    return int(str(devices)) if str(devices).isdigit() else 1


def git_commit() -> str | None:
    """Return the commit of this code, with `+` for uncommitted changes; None outside a repository."""
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
