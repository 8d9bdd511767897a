"""Runs the cells of a sweep as processes, `n_jobs` at a time, and writes the ledger."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hass_lightning.runs.files import read_json
from hass_lightning.runs.ledger import (
    REQUEUE_EXIT_CODE,
    RESULT_FILE_VARIABLE,
    SWEEP_VARIABLE,
    Entry,
    Ledger,
)
from hass_lightning.runs.lock import Held
from hass_lightning.runs.names import axes_of, cell_label, counted
from hass_lightning.runs.signals import PREEMPTION

from ._cell_lines import CellLines
from ._process import JobProcess, job_environment, outcome
from ._resources import slot_environment

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
WAIT_SECONDS = 1.0  # interval between checks of a cell that another launch runs


@dataclass
class Cell:
    """One job of the sweep and, when it has ended, its ledger entry."""

    id: str  # in the ledger
    num: int
    overrides: list[str]
    command: list[str]
    folder: Path
    config_hash: str
    num_processes: int = 1
    outcome: Entry | None = None
    num_requeues: int = 0


class Stopped(Exception):
    """Raised when the launcher is asked to stop: Ctrl-C, or a preemption signal (`runs.signals`)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def _collect_signals(received: list[int]) -> Iterator[None]:
    """Append signals to a list that the loop checks, so that none arrives between the start of a job and its record."""
    earlier = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *PREEMPTION):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                earlier[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class Pool:
    """A pool of slots, each of which runs one job at a time.

    Args:
        ledger: the ledger of the sweep.
        gpus: for each slot, the GPUs visible to its jobs (`_resources.split_gpus`).
        cwd: working directory of the jobs.
        git: the commit to record in the ledger.
        deadline: monotonic time at which all jobs should have ended, as estimated from earlier ones; None: no limit.
        grace_seconds: time for jobs to exit when the launcher is stopped.
        max_requeues: maximum number of restarts of a job.
    """

    def __init__(
        self,
        ledger: Ledger,
        gpus: Sequence[list[str] | None],
        *,
        cwd: str,
        git: str | None = None,
        deadline: float | None = None,
        grace_seconds: float = 60.0,
        max_requeues: int = 3,
    ) -> None:
        self.ledger = ledger
        self.gpus = gpus
        self.cwd = cwd
        self.git = git
        self.deadline = deadline
        self.grace_seconds = grace_seconds
        self.max_requeues = max_requeues
        self.running: dict[int, tuple[Cell, JobProcess]] = {}  # by slot
        self.signals: list[int] = []
        self.at_start = ledger.latest()
        self.num_cells = self.num_done = 0
        self.lines = CellLines()
        self.labels: dict[str, str] = {}  # on a terminal: the axes of a cell only

    def run(self, cells: Sequence[Cell]) -> None:
        """Run all cells and set their `outcome`, which remains None for cells that could not start before the deadline.

        Raises:
            Stopped: after a signal, when all jobs have ended and are recorded as `stopped`.
        """
        self.num_cells = len(cells)
        axes = axes_of([cell.overrides for cell in cells])
        self.labels = {cell.id: cell_label(cell.overrides, axes) or cell.folder.name for cell in cells}
        self.lines.known(self.at_start.values())
        with _collect_signals(self.signals):
            try:
                self._run(deque(cells))
            except BaseException as stop:
                self._stop(stop.number if isinstance(stop, Stopped) else signal.SIGTERM)
                raise

    def _run(self, queue: deque[Cell]) -> None:
        elsewhere: deque[Cell] = deque()  # cells locked by another launch, or by a job of a killed launch
        next_check = 0.0
        while queue or elsewhere or self.running:
            if self.signals:
                raise Stopped(self.signals[0])
            free = [slot for slot in range(len(self.gpus)) if slot not in self.running]
            while free and queue:
                cell = queue.popleft()
                if not self._take(cell, free):
                    log.info("#%d %s is run by another launch: waiting for its result", cell.num, cell.folder.name)
                    elsewhere.append(cell)
            if free and elsewhere and time.monotonic() >= next_check:
                next_check = time.monotonic() + WAIT_SECONDS
                elsewhere = deque(cell for cell in elsewhere if not free or not self._take(cell, free))
            for slot, (cell, job) in list(self.running.items()):
                code = job.poll()
                if code is not None:
                    del self.running[slot]
                    if self._end(cell, job, code).status == "requeued":
                        queue.append(cell)
            self.lines.tick(self.num_cells - self.num_done, len(self.gpus))
            time.sleep(POLL_SECONDS if self.running or elsewhere else 0)

    def _take(self, cell: Cell, free: list[int]) -> bool:
        """Use the ledger's result of a cell or start it; return False if another process holds it."""
        lock = self.ledger.lock(cell.id)
        if lock is None:
            return False
        started = False
        try:
            last = self.ledger.latest().get(cell.id)
            if last is not None and self._is_settled(cell, last):
                self._done(cell, last, "" if last == self.at_start.get(cell.id) else " (by another launch)")
            elif self._has_time():
                if last is not None and last.config_hash != cell.config_hash:
                    move_aside(cell, last)
                slot = free.pop(0)
                self.running[slot] = (cell, self._start(cell, slot, lock))
                started = True
        finally:
            if not started:
                lock.release()
        return True

    def _is_settled(self, cell: Cell, last: Entry) -> bool:
        if last.config_hash != cell.config_hash:
            return False
        if last.status == "running" and (result := read_json(cell.folder / "result.json")) and not result.get("error"):
            # the launcher was killed, but the job completed: use its result
            self._note(cell, "completed", **outcome(result))
            self.at_start.pop(cell.id, None)
            return True
        return last.status == "completed" or (last.status == "failed" and last != self.at_start.get(cell.id))

    def _start(self, cell: Cell, slot: int, lock: Held) -> JobProcess:
        variables = {
            RESULT_FILE_VARIABLE: str(cell.folder / "result.json"),
            SWEEP_VARIABLE: self.ledger.folder.name,
            **slot_environment(len(self.gpus), self.gpus[slot], cell.num_processes),
        }
        self._note(cell, "running")
        log.info("#%d %s started: %s", cell.num, cell.folder.name, " ".join(cell.overrides))
        self.lines.started(cell.id, self.labels[cell.id], cell.folder / "job.log")
        return JobProcess(cell.command, cell.folder, job_environment(variables), self.cwd, lock)

    def _end(self, cell: Cell, job: JobProcess, code: int, stopping: bool = False) -> Entry:
        try:
            return self._record(cell, job, code, stopping)
        finally:
            job.lock.release()  # last, so that another launch finds the cell either locked or with an outcome

    def _record(self, cell: Cell, job: JobProcess, code: int, stopping: bool) -> Entry:
        result = job.result()
        values = {**outcome(result), "seconds": round(job.seconds, 2)}
        if code == 0:
            return self._done(cell, self._note(cell, "completed", **values))
        if stopping:
            return self._done(cell, self._note(cell, "stopped", seconds=values["seconds"], error="stopped"))
        if code == REQUEUE_EXIT_CODE and cell.num_requeues < self.max_requeues:
            cell.num_requeues += 1
            cell.command = [word for word in cell.command if not word.startswith("fresh=")]  # resume from its state
            log.info("#%d %s saved its state and asked to be started again", cell.num, cell.folder.name)
            return self._note(cell, "requeued", seconds=values["seconds"])
        error = job.error(code)
        return self._done(cell, self._note(cell, "failed", error=error, **values), f"\n    {error}\n    {job.log_file}")

    def _note(self, cell: Cell, status: str, **values: Any) -> Entry:
        entry = Entry(
            cell.id, status, cell.overrides, cell.config_hash, str(cell.folder), **{"git": self.git, **values}
        )
        return self.ledger.append(entry)

    def _done(self, cell: Cell, entry: Entry | None, remark: str = "") -> Entry:
        if entry is None or entry.status == "running":
            entry = self.ledger.latest()[cell.id]
        cell.outcome = entry
        self.num_done += 1
        number = f"{entry.metric:.5g}" if isinstance(entry.metric, float) else entry.metric
        metric = "" if entry.metric is None else f", metric {number}"
        seconds = "" if entry.seconds is None else f", {entry.seconds:.0f} s"
        known = " before" if self.at_start.get(cell.id) == entry else ""
        words = f"{entry.status}{known}{metric}{seconds} [{self.num_done} of {self.num_cells}]"
        log.info("#%d %s %s%s", cell.num, cell.folder.name, words, remark)
        spent = None if known else entry.seconds
        self.lines.ended(cell.id, self.labels[cell.id], words, spent, entry.status != "completed")
        return entry

    def _has_time(self) -> bool:
        if self.deadline is None:
            return True
        past = [
            entry.seconds for entry in self.ledger.latest().values() if entry.status == "completed" and entry.seconds
        ]
        expected = sum(past) / len(past) if past else 0.0
        return time.monotonic() + expected < self.deadline

    def _stop(self, number: int) -> None:
        """Stop all jobs with the signal, and with SIGKILL after `grace_seconds` or a second signal."""
        if self.running:
            log.warning("stopping %s (at most %.0f s) …", counted(len(self.running), "job"), self.grace_seconds)
        for _, job in self.running.values():
            job.send(number)
        deadline = time.monotonic() + self.grace_seconds
        num_signals = len(self.signals)
        while time.monotonic() < deadline and any(job.poll() is None for _, job in self.running.values()):
            time.sleep(POLL_SECONDS)
            if len(self.signals) > num_signals:
                log.warning("killing the remaining jobs")
                break
        for cell, job in self.running.values():
            while (code := job.poll()) is None:
                job.send(signal.SIGKILL)
                time.sleep(POLL_SECONDS)
            self._end(cell, job, code, stopping=True)
        self.running.clear()


def move_aside(cell: Cell, last: Entry) -> None:
    """Keep the folder of a cell that was run with another config."""
    if not cell.folder.exists():
        return
    aside = cell.folder.with_name(f"{cell.folder.name}.{last.config_hash}-{int(time.time())}")
    cell.folder.rename(aside)
    log.warning("#%d %s was run with another config; its folder is now %s", cell.num, cell.folder.name, aside)
