"""Run one cell of a sweep inside its SLURM job: `python -m …_slurm_job <folder of the submission>` in the batch script.

Starts the processes of the cell with srun and records the outcome in the ledger. If SLURM ended the job (cancelled, out
of time), `_submission.settle` records the outcome later.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from hass_lightning.runs import slurm
from hass_lightning.runs.ledger import REQUEUE_EXIT_CODE, RESULT_FILE_VARIABLE, SWEEP_VARIABLE, Entry, Ledger
from hass_lightning.runs.lock import Held
from hass_lightning.runs.signals import PREEMPTION

from ._process import JobProcess, job_environment, outcome
from ._submission import Item, Submission, own_node

POLL_SECONDS = 0.5
# it saved its state, or a preemption signal ended it before its handler was installed
PREEMPTED = (REQUEUE_EXIT_CODE, *(128 + number for number in PREEMPTION))
# srun says how the first process ended, and ends the others
ENDED = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: (?P<how>.+)$", re.MULTILINE)
NOT_STARTED = re.compile(r"^srun: error: Task launch for \S+ failed on node (?P<node>\S+): (?P<how>.+)$", re.MULTILINE)
REQUEUE_SECONDS = 120.0  # time for SLURM to end a job that it requeues


class Job:
    """The job that this process belongs to, and its cell."""

    def __init__(self, folder: Path) -> None:
        self.submission = Submission.read(folder)
        self.index = int(os.environ["SLURM_ARRAY_TASK_ID"])
        self.id = str(slurm.own_job())
        self.item: Item = self.submission.items[self.index]
        self.ledger = Ledger(self.submission.sweep)
        self.num_requeues = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.stopped = False
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the processes of the cell also receive it, and save

    def _on_stop(self, number: int, frame: object) -> None:
        self.stopped = True  # SLURM also ends the processes of the cell, which have time to save

    def run(self) -> int:
        """Run the cell unless it is completed, and return the exit code."""
        lock = self._lock()
        if lock is None:
            return 1
        try:
            last = self.ledger.latest().get(self.item.cell)
            if last and (last.status, last.config_hash) == ("completed", self.item.config_hash):
                print(f"{self.item.folder} is completed by job {last.job or last.launch}", flush=True)
                return 0
            self._note("running")
            process = self._start(lock)
            while (code := process.poll()) is None:
                time.sleep(POLL_SECONDS)
            return self._end(process, code)
        finally:
            lock.release()

    def _lock(self) -> Held | None:
        """Acquire the cell's lock. Waits for a job that may still run on a node that SLURM has lost."""
        logged = False
        while not self.stopped:
            lock = self.ledger.lock(self.item.cell)
            if lock is not None:
                return lock
            if not logged:
                print(f"{self.item.folder} is run by another process: waiting until it ends", flush=True)
                logged = True
            time.sleep(POLL_SECONDS)
        return None

    def _start(self, lock: Held) -> JobProcess:
        command = self.item.command
        if self.num_requeues:
            command = [word for word in command if not word.startswith("fresh=")]  # resume from the saved state
        variables = {
            RESULT_FILE_VARIABLE: str(Path(self.item.folder) / "result.json"),
            SWEEP_VARIABLE: self.ledger.folder.name,
        }
        srun = [*self.submission.srun, *command]
        return JobProcess(srun, Path(self.item.folder), job_environment(variables), self.submission.cwd, lock)

    def _end(self, process: JobProcess, code: int) -> int:
        result = process.result()
        values = {"seconds": round(process.seconds, 2)}
        if code == 0 and result:
            self._note("completed", **values, **outcome(result))
            return 0
        if self.stopped or not self._is_running():
            return code or 1
        error = srun_says(process.output()) or process.error(code)
        if code in PREEMPTED:
            if self.num_requeues < self.submission.max_requeues:
                return self._requeue(values)
            error = f"preempted, and hydra.launcher.max_requeues={self.submission.max_requeues} is reached"
        self._note("failed", error=error, **values)
        return code

    def _is_running(self) -> bool:
        """Whether SLURM still runs this job. srun exits with 0 when a node is lost and the job is requeued."""
        try:
            return slurm.job_states([self.id]).get(self.id) == "RUNNING"
        except slurm.NoAnswer:
            return True

    def _requeue(self, values: dict[str, float]) -> int:
        self._note("requeued", **values)
        try:
            slurm.ask("scontrol", "requeue", self.id)
        except slurm.NoAnswer as error:
            self._note("failed", error=f"preempted, and requeuing failed ({error})", **values)
            return REQUEUE_EXIT_CODE
        deadline = time.monotonic() + REQUEUE_SECONDS
        while not self.stopped and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return REQUEUE_EXIT_CODE

    def _note(self, status: str, **values: object) -> Entry:
        return self.ledger.append(self.submission.entry(self.index, status, self.id, node=own_node(), **values))


def srun_says(output: str) -> str | None:
    """Return why srun has ended the processes of a cell; None if they ended by themselves."""
    if slurm.OUT_OF_MEMORY.search(output):
        return "out of memory: exceeded hydra.launcher.memory or the limit of the cluster"
    if lost := NOT_STARTED.search(output):
        return f"node failed: {lost['node']} did not start the processes ({lost['how']})"
    if (first := ENDED.search(output)) and not first["how"].startswith("Exited"):
        return f"rank {first['rank']} on {first['node']} has died ({first['how']})"
    return None


if __name__ == "__main__":
    try:
        sys.exit(Job(Path(sys.argv[1])).run())
    except (OSError, json.JSONDecodeError, KeyError, IndexError) as problem:
        sys.exit(f"error: not a job of a sweep ({problem!r})")
