"""Interface to SLURM: submit jobs and query their states."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

ENDED = {
    "BOOT_FAIL": "node failed", "CANCELLED": "cancelled", "COMPLETED": "ended without a result",
    "DEADLINE": "timed out", "FAILED": "failed", "NODE_FAIL": "node failed", "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted", "REVOKED": "cancelled", "TIMEOUT": "timed out",
}  # fmt: skip
"""States of ended jobs, and their names in the ledger."""
GONE = "lost: SLURM no longer knows the job"
OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|exceeded (?:job )?memory limit|OUT_OF_MEMORY", re.IGNORECASE)
SECONDS = 60  # timeout of a SLURM command


class NoAnswer(Exception):
    """Raised when SLURM does not answer, so that the states of its jobs are unknown."""


def ask(*command: str, env: Mapping[str, str] | None = None) -> str:
    """Run a SLURM command and return its output.

    Raises:
        NoAnswer: if the command fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{command[0]}: {error}") from error
    if done.returncode:
        output = (done.stderr or done.stdout).strip().splitlines()
        raise NoAnswer(f"{command[0]}: {output[-1] if output else f'exit code {done.returncode}'}")
    return done.stdout


def job_states(jobs: Iterable[str]) -> dict[str, str]:
    """Return the states of jobs by id (`12`, or `12_3` for an element of an array). Unknown jobs are omitted.

    The controller knows jobs that have not ended, and jobs that ended within the last minutes (MinJobAge). The
    accounting database, if there is one, knows all jobs.

    Raises:
        NoAnswer: if the controller does not answer.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    known = _listed(f"--user={getpass.getuser()}", wanted)  # --jobs fails for an unknown id
    for whole in {job.split("_")[0] for job in wanted - known.keys()}:  # jobs of another user
        with contextlib.suppress(NoAnswer):
            known |= _listed(f"--jobs={whole}", wanted)
    if wanted - known.keys():
        known |= _accounted(wanted - known.keys())
    return known


def _listed(chosen: str, wanted: set[str]) -> dict[str, str]:
    listed = ask("squeue", "--array", "--noheader", "--states=all", chosen, "--format=%i|%T")
    rows = (line.strip().split("|") for line in listed.splitlines() if line.count("|") == 1)
    return {job: state for job, state in rows if job in wanted}


def _accounted(jobs: set[str]) -> dict[str, str]:
    """Return the states in the accounting database; empty if there is none."""
    try:
        listed = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(sorted(jobs))}",
                     "--format=JobID,State")  # fmt: skip
    except NoAnswer:
        return {}
    rows = (line.split("|") for line in listed.splitlines() if line.count("|") == 1)
    return {job: state.split()[0] for job, state in rows if job in jobs and state}  # `CANCELLED by 0`


def ended(state: str | None) -> str | None:
    """Return how a job with this state (None: unknown job) ended; None if it has not ended."""
    return GONE if state is None else ENDED.get(state)


def own_job() -> str | None:
    """Return the id of the job of this process, in the format of `job_states`; None outside of a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def has_gpus(partition: str | None) -> bool:
    """Whether a partition has nodes with GPUs (None: any partition)."""
    chosen = [f"--partition={partition}"] if partition else []
    return "gpu" in ask("sinfo", "--noheader", "--format=%G", *chosen)


def submit(script: Path) -> str:
    """Submit a batch script and return its job id. `SLURM_*` variables of this process are not passed to the job.

    Raises:
        NoAnswer: if the submission fails.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    return ask("sbatch", "--parsable", str(script), env=kept).strip().split(";")[0]


def largest_array() -> int:
    """Return the maximum number of jobs in an array."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return max(1, int(found[1])) if found else 1000


def submitted_as(comment: str) -> str | None:
    """Return the id of the job (or array) that was submitted with this comment, or None."""
    listed = ask("squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", "--format=%F|%k")
    for line in listed.splitlines():
        job, _, found = line.strip().partition("|")
        if found == comment:
            return job
    return None


def available() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None
