"""The Hydra launcher `slurm`: every job of a multirun is an element of a SLURM array job, recorded in the ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from omegaconf import DictConfig, OmegaConf

from hass_lightning.runs import slurm
from hass_lightning.runs.ledger import Entry, Ledger
from hass_lightning.runs.lock import file_lock
from hass_lightning.runs.names import counted
from hass_lightning.runs.screen import stdout_console

from ._config import SlurmLauncherConf
from ._ending import watch
from ._pool import Cell, move_aside
from ._submission import FOLDER, Item, Size, Submission, by_size, is_alive, recover, settle, sizes, submit
from ._table import status_table
from .launcher import SweepLauncher, git_commit, refuse, with_outcome

log = logging.getLogger(__name__)
SETTLE_SECONDS = 15.0  # interval between queries of SLURM while waiting

ConfigStore.instance().store(
    group="hydra/launcher", name="slurm", node=SlurmLauncherConf, provider="hass_lightning_launcher"
)


class SlurmLauncher(SweepLauncher):
    """Submits every job of a multirun to SLURM; see `SlurmLauncherConf` for the arguments.

    Only cells that are not completed, queued or running according to the ledger are submitted. Each job starts its
    processes with srun, so that a sweep needs no process on the login node (`wait=false`).
    """

    def __init__(self, **settings: Any) -> None:
        self.settings: DictConfig = OmegaConf.merge(OmegaConf.structured(SlurmLauncherConf), settings)  # type: ignore[assignment]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the missing cells and wait for the results of all jobs. Without `wait`, return no results.

        Raises:
            SystemExit: after a user error, Ctrl-C, plan=true or status=true.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        ledger = Ledger(Path(str(self.config.hydra.sweep.dir)).absolute())
        cells, configs, returns = self._cells(ledger, job_overrides, initial_job_idx)
        try:
            self._check(cells)
            states = {}
            if ledger.path.exists():
                recover(ledger)
                states = settle(ledger)
            if not OmegaConf.select(self.config, "plan", default=False):
                _log_states(states)
            self._exit_after_query(ledger, cells, configs)
            watch(cells)
            self._submit_missing(ledger, cells, configs)
        except (ValueError, slurm.NoAnswer) as error:
            refuse(str(error))
        if not self.settings.wait:
            log.info("submitted; status=true shows the status of the cells, and the same command submits missing ones")
            return [_unfinished(job) for _, job in returns]
        self._wait(ledger, cells)
        stdout_console().print(status_table(ledger, cells.values()), soft_wrap=True, markup=False)
        latest = ledger.latest()
        return [with_outcome(job, latest.get(cell), ledger.folder) for cell, job in returns]

    def _check(self, cells: Mapping[str, Cell]) -> None:
        settings = self.settings
        if settings.max_concurrent is not None and settings.max_concurrent < 1:
            raise ValueError(f"hydra.launcher.max_concurrent={settings.max_concurrent} must be at least 1, or null.")
        sweeper = str(self.config.hydra.sweeper.get("_target_"))
        if not settings.wait and "BasicSweeper" not in sweeper:
            raise ValueError("hydra.launcher.wait=false: this sweeper needs the results of earlier cells.")
        if not slurm.available():
            raise ValueError("hydra/launcher=slurm needs sbatch on this machine: run the command on a login node.")

    def _at_a_time(self, num_cells: int) -> int:
        return min(self.settings.max_concurrent or num_cells, num_cells) or 1

    def _plan(self, ledger: Ledger, cells: Mapping[str, Cell], configs: Mapping[str, DictConfig]) -> dict[str, Any]:
        found = sizes(configs, self.settings.gpus_per_node, self.settings.partition)
        jobs = [{"num_cells": len(group), "sbatch": self._options(size, len(group))}
                for size, group in by_size(found, cells).items()]  # fmt: skip
        return super()._plan(ledger, cells, configs) | {"jobs": jobs, "setup": list(self.settings.setup)}

    def _options(self, size: Size, num_cells: int, after: str | None = None) -> list[str]:
        """Return the options of sbatch for an array of jobs of this size."""
        settings = self.settings
        throttle = f"%{settings.max_concurrent}" if settings.max_concurrent else ""
        options = {
            "job-name": Path(str(self.config.hydra.sweep.dir)).name[:60],
            "partition": settings.partition,
            "account": settings.account,
            "time": settings.time,
            "mem": settings.memory,
            "nodes": size.nodes,
            "ntasks-per-node": size.tasks,
            "cpus-per-task": settings.cpus_per_task,
            "gres": f"gpu:{size.gpus}" if size.gpus else None,
            "signal": f"USR1@{settings.signal_seconds}",
            "array": f"0-{num_cells - 1}{throttle}",
            "dependency": f"afterany:{after}" if after else None,
        }
        options |= {str(name): value for name, value in (settings.options or {}).items()}
        chosen = {name: value for name, value in options.items() if value is not None}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in chosen.items()]

    def _submit_missing(self, ledger: Ledger, cells: Mapping[str, Cell], configs: Mapping[str, DictConfig]) -> None:
        folder = ledger.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / ".lock"):  # simultaneous launches submit each cell once
            latest = ledger.latest()
            missing = [id for id, cell in cells.items() if self._is_missing(ledger, cell, latest.get(id))]
            known = len(cells) - len(missing)
            log.info("%s: %d to submit, %d completed, queued or running", ledger.folder, len(missing), known)
            if not missing:
                return
            largest, last = slurm.largest_array(), None
            found = sizes({id: configs[id] for id in missing}, self.settings.gpus_per_node, self.settings.partition)
            for size, group in by_size(found, missing).items():
                for start in range(0, len(group), largest):
                    part = [cells[id] for id in group[start : start + largest]]
                    # max_concurrent limits the jobs of one array, so with a limit the arrays run one after another
                    options = self._options(size, len(part), last if self.settings.max_concurrent else None)
                    last = submit(self._submission(ledger, part, size), options, list(self.settings.setup))
                    log.info("submitted %s as job %s", counted(len(part), "cell"), last)

    def _is_missing(self, ledger: Ledger, cell: Cell, last: Entry | None) -> bool:
        if last is None:
            return True
        if is_alive(last):
            if last.config_hash != cell.config_hash:
                log.warning("job %s runs %s with another config: cancel it first (scancel)", last.job, cell.folder.name)
            return False
        if last.status == "running":  # started by `hydra/launcher=subprocess`
            lock = ledger.lock(cell.id)
            if lock is None:
                log.warning("%s is run by another launch (%s)", cell.folder.name, last.launch)
                return False
            lock.release()
        if last.config_hash != cell.config_hash:
            move_aside(cell, last)
            return True
        return last.status != "completed"

    def _submission(self, ledger: Ledger, cells: Sequence[Cell], size: Size) -> Submission:
        srun = [
            "srun",
            "--kill-on-bad-exit=1",  # end the cell if one of its processes fails
            f"--nodes={size.nodes}",
            f"--ntasks={size.nodes * size.tasks}",
            f"--ntasks-per-node={size.tasks}",
            f"--cpus-per-task={self.settings.cpus_per_task}",
        ]
        items = [Item(cell.id, cell.overrides, cell.config_hash, str(cell.folder), cell.command) for cell in cells]
        cwd = str(self.config.hydra.runtime.cwd)
        return Submission(str(ledger.folder), items, cwd, self.settings.max_requeues, git_commit(), srun)

    def _wait(self, ledger: Ledger, cells: Mapping[str, Cell]) -> None:
        """Wait until no cell is queued or running, and log changes of status."""
        seen = {id: entry.status for id, entry in ledger.latest().items()}
        next_question = 0.0
        try:
            while True:
                if time.monotonic() >= next_question:
                    next_question = time.monotonic() + SETTLE_SECONDS
                    try:
                        settle(ledger)
                    except slurm.NoAnswer as error:
                        log.warning("SLURM does not answer, still waiting (%s)", error)
                latest = ledger.latest()
                for id, cell in cells.items():
                    entry = latest[id]
                    if seen.get(id) != entry.status:
                        seen[id] = entry.status
                        why = f": {entry.error}" if entry.error else f" on {entry.node}" if entry.node else ""
                        log.info("#%d %s %s%s", cell.num, cell.folder.name, entry.status, why)
                if not any(is_alive(latest[id]) or latest[id].status == "running" for id in cells):
                    return
                time.sleep(self.settings.poll_seconds)
        except KeyboardInterrupt:
            log.warning("the jobs continue (scancel ends them); the same command waits for them again")
            raise SystemExit(130) from None


def _log_states(states: Mapping[str, str]) -> None:
    if states:
        counts = {state: list(states.values()).count(state) for state in sorted(set(states.values()))}
        log.info("jobs of this sweep: %s", ", ".join(f"{number} {state}" for state, number in counts.items()))


def _unfinished(job: JobReturn) -> JobReturn:
    job.status, job.return_value = JobStatus.COMPLETED, None
    return job
