"""Submit cells as SLURM array jobs, and record in the ledger how the jobs ended."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hass_lightning.runs import slurm
from hass_lightning.runs.files import read_json, write_whole
from hass_lightning.runs.ledger import LAUNCH, Entry, Ledger

from ._process import outcome

log = logging.getLogger(__name__)
FOLDER = ".slurm"  # in the folder of the sweep
ALIVE = ("queued", "running", "requeued")


@dataclass(frozen=True)
class Item:
    """One cell of an array job."""

    cell: str
    overrides: list[str]
    config_hash: str
    folder: str
    command: list[str]


@dataclass(frozen=True)
class Size:
    """Resources of a job: nodes, processes per node, GPUs per node."""

    nodes: int
    tasks: int
    gpus: int


@dataclass(frozen=True)
class Submission:
    """An array of cells with the same resources, stored as `submission.json` in its folder.

    Args:
        sweep: folder of the sweep.
        items: the cells, by array index.
        cwd: working directory of the commands.
        max_requeues: maximum number of restarts of a job.
        git: the commit to record in the ledger.
        srun: the command that starts the processes of one cell.
    """

    sweep: str
    items: list[Item]
    cwd: str
    max_requeues: int
    git: str | None
    srun: list[str]

    @classmethod
    def read(cls, folder: Path) -> Submission:
        """Read the submission that `submit` wrote to `folder`."""
        content = json.loads((folder / "submission.json").read_text())
        return cls(**content | {"items": [Item(**item) for item in content["items"]]})

    def entry(self, index: int, status: str, job: str, **values: Any) -> Entry:
        """Return a ledger entry for one of the cells."""
        item = self.items[index]
        known = (item.cell, status, item.overrides, item.config_hash, item.folder)
        return Entry(*known, **{"git": self.git, "job": job, **values})


def submit(submission: Submission, options: Sequence[str], setup: Sequence[str]) -> str:
    """Submit an array, record its cells as queued and return its job id.

    If the launcher is killed in between, `recover` finds the job by the name of the folder.

    Args:
        options: options of sbatch.
        setup: shell lines before the command.

    Raises:
        slurm.NoAnswer: it was refused.
    """
    folder = Path(submission.sweep) / FOLDER / uuid.uuid4().hex[:12]
    folder.mkdir(parents=True)
    write_whole(folder / "submission.json", json.dumps(asdict(submission)))
    fixed = [f"--comment={folder.name}", f"--output={folder}/%a.out", "--open-mode=append", "--requeue"]
    lines = [f"#SBATCH {shlex.quote(option)}" for option in (*fixed, *options)]
    run = [sys.executable, "-m", "hydra_plugins.hass_lightning_launcher._slurm_job", str(folder)]
    script = "\n".join(["#!/bin/bash", *lines, *setup, f"exec {shlex.join(run)}", ""])
    write_whole(folder / "job.sh", script)
    try:
        job = slurm.submit(folder / "job.sh")
    except slurm.NoAnswer:
        (folder / "job_id").touch()  # nothing to recover
        raise
    _note_queued(folder, submission, job)
    return job


def _note_queued(folder: Path, submission: Submission, job: str) -> None:
    ledger = Ledger(submission.sweep)
    latest = ledger.latest()
    for index, item in enumerate(submission.items):
        last = latest.get(item.cell)
        if last is None or last.job != f"{job}_{index}":  # otherwise it has started already
            ledger.append(submission.entry(index, "queued", f"{job}_{index}"))
    write_whole(folder / "job_id", job)


def recover(ledger: Ledger) -> None:
    """Record the jobs of launchers that were killed between submitting and recording them."""
    for file in (ledger.folder / FOLDER).glob("*/submission.json"):
        if not (file.parent / "job_id").exists() and (job := slurm.submitted_as(file.parent.name)):
            _note_queued(file.parent, Submission.read(file.parent), job)


def settle(ledger: Ledger) -> dict[str, str]:
    """Query SLURM for all jobs that have not ended according to the ledger, and record those that have.

    Returns:
        The states of the jobs that have not ended, by job id.

    Raises:
        slurm.NoAnswer: if SLURM does not answer.
    """
    open_entries = {cell: entry for cell, entry in ledger.latest().items() if entry.status in ALIVE and entry.job}
    states = slurm.job_states(entry.job for entry in open_entries.values() if entry.job)
    latest = ledger.latest()
    for cell, entry in open_entries.items():
        state = states.get(str(entry.job))
        how = slurm.ended(state)
        if state is None and entry.status == "queued":
            how = "cancelled before it started"  # SLURM removes such an element of an array immediately
        if how is None or latest[cell] != entry:  # its own process has recorded it in the meantime
            continue
        result = read_json(Path(entry.folder) / "result.json")
        values: dict[str, Any] = {"launch": LAUNCH, "time": time.time()}
        if result and not result.get("error"):
            ledger.append(replace(entry, status="completed", **outcome(result), **values))
        else:
            ledger.append(replace(entry, status="failed", error=f"{how} (SLURM job {entry.job})", **values))
    return {job: state for job, state in states.items() if slurm.ended(state) is None}


def sizes(configs: Mapping[str, Any], gpus_per_node: int | None, partition: str | None) -> dict[str, Size]:
    """Return the resources of the job of each cell.

    Args:
        configs: configs by cell.
        gpus_per_node: the launcher's key. None: one GPU per process if the trainer uses GPUs, where
            `accelerator=auto` uses GPUs if the partition has any.
        partition: the launcher's key.
    """
    found = {}
    for cell, config in configs.items():
        trainer = OmegaConf.select(config, "trainer") or {}
        devices = trainer.get("devices", 1)
        tasks = len(devices) if hasattr(devices, "__len__") and not isinstance(devices, str) else int(devices)
        accelerator = trainer.get("accelerator", "cpu")
        gpus = gpus_per_node
        if gpus is None:
            on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and slurm.has_gpus(partition))
            gpus = tasks if on_gpu else 0
        found[cell] = Size(int(trainer.get("num_nodes", 1)), tasks, gpus)
    return found


def by_size(found: Mapping[str, Size], cells: Iterable[str]) -> dict[Size, list[str]]:
    """Group cells by resources; the cells of a group can share an array."""
    groups: dict[Size, list[str]] = {}
    for cell in cells:
        groups.setdefault(found[cell], []).append(cell)
    return groups


def is_alive(entry: Entry | None) -> bool:
    """Whether a SLURM job of this cell is queued or running."""
    return entry is not None and entry.status in ALIVE and entry.job is not None


def own_node() -> str:
    """Return the node list of this job."""
    return os.environ.get("SLURM_JOB_NODELIST", "")
