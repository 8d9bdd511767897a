"""Config of `hydra.launcher`.

In a separate module because Hydra's plugin scan executes launcher.py before it is in `sys.modules`, where a dataclass
with postponed annotations cannot be created.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SubprocessLauncherConf:
    """Keys of `hydra.launcher`. They do not affect the name of a sweep or cell."""

    _target_: str = "hydra_plugins.hass_lightning_launcher.launcher.SubprocessLauncher"
    n_jobs: int = 1  # number of simultaneous jobs
    gpus_per_job: int | None = None  # null: all GPUs split evenly; 0: all jobs see all GPUs
    budget_hours: float | None = None  # jobs that are not expected to end within this time are not started
    grace_seconds: float = 60.0  # time for jobs to save and exit after Ctrl-C or SIGTERM
    max_requeues: int = 3  # maximum number of restarts of a job that exits with code 75 (preempted)


@dataclass
class SlurmLauncherConf:
    """Keys of `hydra.launcher` with `hydra/launcher=slurm`. They do not affect the name of a sweep or cell."""

    _target_: str = "hydra_plugins.hass_lightning_launcher.slurm.SlurmLauncher"
    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"  # time limit of a job
    memory: str | None = None  # memory per node, such as 64G; null: the cluster's default
    cpus_per_task: int = 8  # cores per process
    gpus_per_node: int | None = None  # null: trainer.devices if the trainer uses GPUs, otherwise none
    setup: list[str] = field(default_factory=list)  # shell lines before the command: module load cuda
    options: Any = None  # further options of sbatch: {constraint: h100, exclusive: true}
    max_concurrent: int | None = None  # maximum number of simultaneous jobs
    max_requeues: int = 20  # maximum number of restarts of a job that was preempted or reached its time limit
    signal_seconds: int = 120  # time before the limit at which a job is signalled to save and requeue
    wait: bool = True  # wait until all jobs have ended; false: submit and return
    poll_seconds: float = 5.0  # interval between reads of the ledger while waiting
