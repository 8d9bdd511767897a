"""Which GPUs and how many threads each of several simultaneous jobs gets."""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [item.strip() for item in named.split(",") if item.strip() not in ("", "-1")]
    if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return []
    import torch  # takes seconds, so only where there is a driver

    return [str(index) for index in range(torch.cuda.device_count())]


def deal_gpus(n_jobs: int, gpus_per_job: int | None, gpus: list[str]) -> list[list[str] | None]:
    """The GPUs of each of `n_jobs` places; None leaves a job's CUDA_VISIBLE_DEVICES as it is.

    Args:
        n_jobs: jobs at a time.
        gpus_per_job: GPUs for each; None: all GPUs dealt out evenly; 0: nothing is set, and the jobs share all of them.
        gpus: what there is.

    Raises:
        ValueError: if there are fewer GPUs than asked for.
    """
    if gpus_per_job == 0 or (gpus_per_job is None and (n_jobs == 1 or not gpus)):
        return [None] * n_jobs
    if gpus_per_job is None:
        if len(gpus) < n_jobs:
            log.warning("%d jobs at a time share %d GPUs", n_jobs, len(gpus))
            return [[gpus[place % len(gpus)]] for place in range(n_jobs)]
        gpus_per_job = len(gpus) // n_jobs
    if n_jobs * gpus_per_job > len(gpus):
        raise ValueError(
            f"hydra.launcher.n_jobs={n_jobs} with hydra.launcher.gpus_per_job={gpus_per_job} needs "
            f"{n_jobs * gpus_per_job} GPUs and {len(gpus)} are visible; lower one of them, "
            "or set hydra.launcher.gpus_per_job=0 to let the jobs share"
        )
    return [gpus[place * gpus_per_job : (place + 1) * gpus_per_job] for place in range(n_jobs)]


def place_environment(n_jobs: int, gpus: list[str] | None, num_processes: int) -> dict[str, str]:
    """The environment variables of a job in one of `n_jobs` places that starts `num_processes` ranks.

    A job alone keeps the machine's defaults. Without a share, jobs side by side would start as many threads as there
    are cores each, and all of them crawl.
    """
    found = {}
    if gpus is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if n_jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found["OMP_NUM_THREADS"] = str(max(1, cores // (n_jobs * max(1, num_processes))))
    return found
