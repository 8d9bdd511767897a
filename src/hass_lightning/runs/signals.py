"""Preemption signals, which ask a command to end and to be restarted."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from hass_lightning.runs.ledger import REQUEUE_EXIT_CODE

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""SIGTERM of a scheduler, SIGUSR1 of `sbatch --signal=USR1@90`, SIGHUP of a terminal or a connection that is gone."""

STUCK_SECONDS = 15.0
_asked = threading.Event()  # the handler ran: this process ends by itself


def preemption_signals() -> list[signal.Signals]:
    """Return the signals of `PREEMPTION` that this process does not ignore (nohup ignores SIGHUP)."""
    return [number for number in PREEMPTION if signal.getsignal(number) != signal.SIG_IGN]


def ask_to_be_started_again() -> None:
    """End this process with the exit code that requests a restart; a Ctrl-C that follows does not change it."""
    _asked.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(REQUEUE_EXIT_CODE)


def _on_preemption(number: int, frame: FrameType | None) -> None:
    ask_to_be_started_again()


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Within this context, a preemption signal ends the command with `REQUEUE_EXIT_CODE`; every stage can be resumed.

    During training, LastCheckpoint handles the signals instead and saves first. Python runs a handler only between two
    of its instructions, so a process that waits inside a library, such as for a rank that was not started, would never
    run it. Therefore a thread ends the process after `STUCK_SECONDS`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    before = {number: signal.signal(number, _on_preemption) for number in preemption_signals()}
    interrupt = signal.getsignal(signal.SIGINT)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    wakeup, ended = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False), threading.Event()
    threading.Thread(target=_end_when_stuck, args=(ours, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        theirs.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if not _asked.is_set():
            signal.signal(signal.SIGINT, interrupt)


def _end_when_stuck(signals: socket.socket, ended: threading.Event) -> None:
    """Read the numbers of signals as they arrive; end the process if `_on_preemption` should run but does not."""
    while received := signals.recv(1):
        number = received[0]
        if number not in PREEMPTION or signal.getsignal(number) is not _on_preemption:
            continue
        if not ended.wait(STUCK_SECONDS) and not _asked.is_set():
            os._exit(REQUEUE_EXIT_CODE)
    signals.close()
