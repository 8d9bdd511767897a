"""GPUs and number of threads of each of several simultaneous jobs."""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)


def visible_gpus() -> list[str]:
    """Return the GPUs visible to this process, in the format of CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [item.strip() for item in named.split(",") if item.strip() not in ("", "-1")]
    if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return []
    import torch  # takes seconds, so only if there is a driver

    return [str(index) for index in range(torch.cuda.device_count())]


def split_gpus(n_jobs: int, gpus_per_job: int | None, gpus: list[str]) -> list[list[str] | None]:
    """Return the GPUs of each of `n_jobs` slots; None leaves CUDA_VISIBLE_DEVICES unchanged.

    Args:
        n_jobs: number of simultaneous jobs.
        gpus_per_job: number of GPUs per job. None: all GPUs split evenly. 0: nothing is set, and the jobs share all.
        gpus: the visible GPUs.

    Raises:
        ValueError: if fewer GPUs are visible than requested.
    """
    if gpus_per_job == 0 or (gpus_per_job is None and (n_jobs == 1 or not gpus)):
        return [None] * n_jobs
    if gpus_per_job is None:
        if len(gpus) < n_jobs:
            log.warning("%d jobs at a time share %d GPUs", n_jobs, len(gpus))
            return [[gpus[slot % len(gpus)]] for slot in range(n_jobs)]
        gpus_per_job = len(gpus) // n_jobs
    if n_jobs * gpus_per_job > len(gpus):
        raise ValueError(
            f"hydra.launcher.n_jobs={n_jobs} with hydra.launcher.gpus_per_job={gpus_per_job} needs "
            f"{n_jobs * gpus_per_job} GPUs and {len(gpus)} are visible; lower one of them, "
            "or set hydra.launcher.gpus_per_job=0 to let the jobs share"
        )
    return [gpus[slot * gpus_per_job : (slot + 1) * gpus_per_job] for slot in range(n_jobs)]


def slot_environment(n_jobs: int, gpus: list[str] | None, num_processes: int) -> dict[str, str]:
    """Return the environment variables of a job in one of `n_jobs` slots that starts `num_processes` ranks.

    With several simultaneous jobs, each gets an equal share of the cores as threads. Otherwise each would start as many
    threads as there are cores, and all would be slow.
    """
    found = {}
    if gpus is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if n_jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found["OMP_NUM_THREADS"] = str(max(1, cores // (n_jobs * max(1, num_processes))))
    return found
