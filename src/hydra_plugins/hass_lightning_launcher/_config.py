"""The keys of `hydra.launcher`.

Not in launcher.py: Hydra's plugin scan executes that file before it is in `sys.modules`, and there a dataclass with
postponed annotations cannot be made.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SubprocessLauncherConf:
    """`hydra.launcher.*`; none of it changes which sweep or cell a command means."""

    _target_: str = "hydra_plugins.hass_lightning_launcher.launcher.SubprocessLauncher"
    n_jobs: int = 1  # jobs at a time
    gpus_per_job: int | None = None  # null: all GPUs dealt out evenly; 0: all jobs see all GPUs
    budget_hours: float | None = None  # start no job that would not end within so many hours
    grace_seconds: float = 60.0  # for the jobs to save and end after Ctrl-C or SIGTERM
    max_requeues: int = 3  # how often a job that exits with code 75 (preempted) is started again
