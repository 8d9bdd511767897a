"""The rank of this process in a run, and leftover variables of earlier launches or batch systems in its environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

log = logging.getLogger(__name__)
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
_GROUP = (*RANKS, "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "JSM_NAMESPACE_RANK", "SLURM_NTASKS", "SLURM_LOCALID")


def is_first_process() -> bool:
    """Return whether this is the first process of a run, according to Lightning, torchrun or srun."""
    return not any(_number(rank) for rank in RANKS)


def settle_ranks(num_processes: int, num_nodes: int = 1) -> None:
    """Remove ranks of other launches from the environment, so that Lightning starts the processes of the config.

    A run with one process has no rank. A run with several processes was started by srun, torchrun or Lightning if they
    set the number of processes. Inside a batch job without srun, Lightning would wait for tasks that were not started.

    Args:
        num_processes: number of processes of the run on all machines.
        num_nodes: number of machines.

    Raises:
        ValueError: the launcher started another number of processes, or none on the other machines.
    """
    if num_processes == 1:
        _forget(_GROUP, "this run has one process (trainer.devices=1)")
        return
    if "SLURM_NTASKS" in os.environ and not {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        if num_nodes > 1 and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"trainer.num_nodes={num_nodes} inside a SLURM job, but not under srun, which starts the other "
                "machines' processes: put `srun` in front of the command."
            )
        _forget(("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"), "srun did not start this process, so the run does")
    launcher = next((name for name in ("WORLD_SIZE", "SLURM_NTASKS") if name in os.environ), None)
    if launcher is None:
        if num_nodes == 1:
            _forget(RANKS, "no launcher set the number of processes (WORLD_SIZE)")
    elif _number(launcher) != num_processes:
        raise ValueError(
            f"{launcher}={os.environ[launcher]} processes were started, but the config has {num_processes}: make "
            "trainer.devices × trainer.num_nodes the same number."
        )


def _number(name: str) -> int:
    value = os.environ.get(name) or "0"
    return int(value) if value.lstrip("-").isdigit() else 0


def _forget(names: Iterable[str], reason: str) -> None:
    """Remove variables. Log a warning with those that would have given this process another rank or world size."""
    found = {name: os.environ.pop(name) for name in names if name in os.environ}
    telling = [f"{name}={value}" for name, value in found.items() if value not in ("", "0")]
    if [word for word in telling if not word.endswith(("SIZE=1", "NTASKS=1"))]:
        log.warning("%s of another launch is ignored: %s", ", ".join(telling), reason)
