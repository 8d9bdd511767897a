"""Runs cells of a sweep, `n_jobs` at a time, each as a process, and writes the ledger."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hass_lightning.ledger import (
    REQUEUE_EXIT_CODE,
    RESULT_FILE_VARIABLE,
    SWEEP_VARIABLE,
    Entry,
    Ledger,
)

from ._process import JobProcess, job_environment, read_result
from ._resources import place_environment

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
WAIT_SECONDS = 1.0  # between two looks at a cell that another launch runs


@dataclass
class Cell:
    """One job of the sweep, and in the end its ledger entry."""

    name: str
    num: int
    overrides: list[str]
    command: list[str]
    folder: Path
    config_hash: str
    num_processes: int = 1
    outcome: Entry | None = None
    num_requeues: int = 0


class Stopped(Exception):
    """The launcher was asked to end: Ctrl-C, SIGTERM (the cluster) or SIGHUP (a closed terminal)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def _collect_signals(received: list[int]) -> Iterator[None]:
    """Signals go to a list that the loop looks at, so that none falls between the start of a job and its record."""
    earlier = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                earlier[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _outcome(result: dict[str, Any]) -> dict[str, Any]:
    """What the ledger notes of a job's result file."""
    said = result.get("result") or {}
    return {"metric": result.get("metric"), "data": said.get("data_hash"), "result": said}


class Pool:
    """The places where jobs run.

    Args:
        ledger: the ledger of the sweep.
        gpus: for each place the GPUs its jobs see (`_resources.deal_gpus`).
        cwd: where the jobs start.
        git: the commit to note in the ledger.
        deadline: monotonic time after which no job may still be running, as far as can be foreseen; None: no limit.
        grace_seconds: how long jobs have to end when the launcher is stopped.
        max_requeues: how often a job may ask to be started again.
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
        self.running: dict[int, tuple[Cell, JobProcess]] = {}  # by place
        self.signals: list[int] = []
        self.at_start = ledger.latest()
        self.num_cells = self.num_done = 0

    def run(self, cells: Sequence[Cell]) -> None:
        """Bring every cell to an outcome; a cell left without one was not started for want of time.

        Raises:
            Stopped: after a signal, when all jobs have ended and are noted as `stopped`.
        """
        self.num_cells = len(cells)
        with _collect_signals(self.signals):
            try:
                self._run(deque(cells))
            except BaseException as stop:
                self._stop(stop.number if isinstance(stop, Stopped) else signal.SIGTERM)
                raise

    def _run(self, queue: deque[Cell]) -> None:
        elsewhere: deque[Cell] = deque()  # cells that another launch, or a job of a killed one, is working on
        look_again = 0.0
        while queue or elsewhere or self.running:
            if self.signals:
                raise Stopped(self.signals[0])
            free = [place for place in range(len(self.gpus)) if place not in self.running]
            while free and queue:
                cell = queue.popleft()
                if not self._take(cell, free):
                    log.info("#%d %s is being run by another launch: waiting for its result", cell.num, cell.name)
                    elsewhere.append(cell)
            if free and elsewhere and time.monotonic() >= look_again:
                look_again = time.monotonic() + WAIT_SECONDS
                elsewhere = deque(cell for cell in elsewhere if not free or not self._take(cell, free))
            for place, (cell, job) in list(self.running.items()):
                code = job.poll()
                if code is not None:
                    del self.running[place]
                    if self._end(cell, job, code).status == "requeued":
                        queue.append(cell)
            time.sleep(POLL_SECONDS if self.running or elsewhere else 0)

    def _take(self, cell: Cell, free: list[int]) -> bool:
        """Settle a cell from the ledger or start it; False if somebody else holds it."""
        lock = self.ledger.lock(cell.name)
        if lock is None:
            return False
        started = False
        try:
            last = self.ledger.latest().get(cell.name)
            if last is not None and self._is_settled(cell, last):
                self._done(cell, last, "" if last == self.at_start.get(cell.name) else " (by another launch)")
            elif self._has_time():
                if last is not None and last.config_hash != cell.config_hash:
                    self._move_aside(cell, last)
                place = free.pop(0)
                self.running[place] = (cell, self._start(cell, place, lock))
                started = True
        finally:
            if not started:
                os.close(lock)
        return True

    def _is_settled(self, cell: Cell, last: Entry) -> bool:
        if last.config_hash != cell.config_hash:
            return False
        if (
            last.status == "running"
            and (result := read_result(cell.folder / "result.json"))
            and not result.get("error")
        ):
            # The launcher was killed and the job went on to its end: take over what it wrote.
            self._note(cell, "completed", **_outcome(result))
            self.at_start.pop(cell.name, None)
            return True
        return last.status == "completed" or (last.status == "failed" and last != self.at_start.get(cell.name))

    def _start(self, cell: Cell, place: int, lock: int) -> JobProcess:
        variables = {
            RESULT_FILE_VARIABLE: str(cell.folder / "result.json"),
            SWEEP_VARIABLE: self.ledger.folder.name,
            **place_environment(len(self.gpus), self.gpus[place], cell.num_processes),
        }
        self._note(cell, "running")
        log.info("#%d %s started: %s", cell.num, cell.name, " ".join(cell.overrides))
        return JobProcess(cell.command, cell.folder, job_environment(variables), self.cwd, lock)

    def _end(self, cell: Cell, job: JobProcess, code: int, stopping: bool = False) -> Entry:
        try:
            return self._record(cell, job, code, stopping)
        finally:
            os.close(job.lock)  # only now: another launch must find the cell taken, or its outcome

    def _record(self, cell: Cell, job: JobProcess, code: int, stopping: bool) -> Entry:
        result = job.result()
        values = {**_outcome(result), "seconds": round(job.seconds, 2)}
        if code == 0:
            return self._done(cell, self._note(cell, "completed", **values))
        if stopping:
            return self._done(cell, self._note(cell, "stopped", seconds=values["seconds"], error="stopped"))
        if code == REQUEUE_EXIT_CODE and cell.num_requeues < self.max_requeues:
            cell.num_requeues += 1
            cell.command = [word for word in cell.command if not word.startswith("fresh=")]  # it goes on from its state
            log.info("#%d %s saved its state and asked to be started again", cell.num, cell.name)
            return self._note(cell, "requeued", seconds=values["seconds"])
        error = job.error(code)
        return self._done(cell, self._note(cell, "failed", error=error, **values), f"\n    {error}\n    {job.log_file}")

    def _note(self, cell: Cell, status: str, **values) -> Entry:
        entry = Entry(
            cell.name, status, cell.overrides, cell.config_hash, str(cell.folder), **{"git": self.git, **values}
        )
        return self.ledger.append(entry)

    def _done(self, cell: Cell, entry: Entry | None, remark: str = "") -> Entry:
        if entry is None or entry.status == "running":
            entry = self.ledger.latest()[cell.name]
        cell.outcome = entry
        self.num_done += 1
        metric = "" if entry.metric is None else f", metric {entry.metric}"
        seconds = "" if entry.seconds is None else f", {entry.seconds:.0f} s"
        known = " before" if self.at_start.get(cell.name) == entry else ""
        log.info(
            "#%d %s %s%s%s%s [%d of %d]%s",
            *(cell.num, cell.name, entry.status, known, metric, seconds, self.num_done, self.num_cells, remark),
        )
        return entry

    def _has_time(self) -> bool:
        if self.deadline is None:
            return True
        past = [
            entry.seconds for entry in self.ledger.latest().values() if entry.status == "completed" and entry.seconds
        ]
        expected = sum(past) / len(past) if past else 0.0
        return time.monotonic() + expected < self.deadline

    def _move_aside(self, cell: Cell, last: Entry) -> None:
        if not cell.folder.exists():
            return
        aside = cell.folder.with_name(f"{cell.folder.name}.{last.config_hash}-{int(time.time())}")
        cell.folder.rename(aside)
        log.warning("#%d %s was run with another config; its folder is now %s", cell.num, cell.name, aside)

    def _stop(self, number: int) -> None:
        """End all jobs: the signal first, SIGKILL for whatever is left after `grace_seconds` (or a second signal)."""
        if self.running:
            log.warning("stopping %d jobs (at most %.0f s) …", len(self.running), self.grace_seconds)
        for _, job in self.running.values():
            job.send(number)
        deadline = time.monotonic() + self.grace_seconds
        num_signals = len(self.signals)
        while time.monotonic() < deadline and any(job.poll() is None for _, job in self.running.values()):
            time.sleep(POLL_SECONDS)
            if len(self.signals) > num_signals:
                log.warning("killing them")
                break
        for cell, job in self.running.values():
            while (code := job.poll()) is None:
                job.send(signal.SIGKILL)
                time.sleep(POLL_SECONDS)
            self._end(cell, job, code, stopping=True)
        self.running.clear()
