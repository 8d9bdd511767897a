"""Rendezvous of the processes of a run, with a timeout and with error messages that name the missing process.

`torch.distributed` itself waits up to half an hour without output, and the error of a collective does not name the
process that has died.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from hass_lightning.training.peers import Peers

log = logging.getLogger(__name__)
MAX_SECONDS = 1e9
ATTEMPT_SECONDS = 1.0  # timeout of an attempt to connect to the first process, and interval between attempts
HELP = "start all processes, or correct MASTER_ADDR and MASTER_PORT; trainer.rendezvous_timeout sets how long to wait"

_watched: list[Peers] = []  # the other processes of the run, until its collectives are finished


def seconds_of(duration: Any) -> float:
    """Return the seconds of `trainer.rendezvous_timeout`: a number, DD:HH:MM:SS, or a mapping such as {minutes: 5}.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(duration, str):
        parts = duration.split(":")
        if len(parts) == 4 and all(part.isdigit() for part in parts):
            duration = dict(zip(("days", "hours", "minutes", "seconds"), map(int, parts), strict=True))
    if isinstance(duration, Mapping):
        return timedelta(**{str(unit): value for unit, value in duration.items()}).total_seconds()
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not duration < MAX_SECONDS:
        raise TypeError(f"{duration} is not a duration")
    return float(duration)


@dataclass(frozen=True)
class Rendezvous:
    """The address at which the processes of a run meet.

    Args:
        host, port: those of the first process (MASTER_ADDR, MASTER_PORT).
        rank: rank of this process.
        world_size: number of processes.
    """

    host: str
    port: int
    rank: int
    world_size: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"

    def wait(self, seconds: float) -> tuple[Store, dict[int, str]]:
        """Wait for all processes and return the shared store, and host and process id of each rank.

        Raises:
            ConnectionError: if not all of them arrived within `seconds`.
        """
        whom = "the other processes" if self.rank == 0 else "the first process"
        log.info("%s waits for %s at %s, port %d (at most %g s)", self, whom, self.host, self.port, seconds)
        started = time.monotonic()
        deadline = started + seconds
        try:
            store = self._connect(deadline)
        except (OSError, DistError) as error:
            raise ConnectionError(self._gave_up(_problem(error, self.host), started)) from error
        store.set(f"rank/{self.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        keys = [f"rank/{rank}" for rank in range(self.world_size)]
        try:
            store.wait(keys, _left(deadline))
            return store, {rank: store.get(key).decode() for rank, key in enumerate(keys)}
        except DistError as error:
            raise ConnectionError(self._gave_up(f"{_missing(store, keys)} did not come", started)) from error

    def _connect(self, deadline: float) -> Store:
        """Return the store of the first process, or of torchrun if it has one."""
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._reach(deadline, listens=not serves)  # TCPStore itself would wait for twice its timeout
        store = TCPStore(
            self.host, self.port, self.world_size, is_master=serves, timeout=_left(deadline), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
        return PrefixStore(f"hass/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _reach(self, deadline: float, listens: bool) -> None:
        """Wait until the host has an address (on some clusters only after its machine has started) and `listens`."""
        logged = False
        while True:
            try:
                if listens:
                    socket.create_connection((self.host, self.port), ATTEMPT_SECONDS).close()
                else:
                    socket.getaddrinfo(self.host, self.port)
                return
            except OSError as error:
                if time.monotonic() + ATTEMPT_SECONDS >= deadline:
                    raise
                if not logged and isinstance(error, socket.gaierror):
                    log.warning("%s: %s; retrying", self, _problem(error, self.host))
                    logged = True
            time.sleep(min(ATTEMPT_SECONDS, max(0.0, deadline - time.monotonic())))

    def _gave_up(self, problem: str, started: float) -> str:
        seconds = time.monotonic() - started
        return f"{self} gave up after {seconds:.0f} s at {self.host}, port {self.port}: {problem}. To go on, {HELP}."


def _problem(error: Exception, host: str) -> str:
    if isinstance(error, socket.gaierror):
        return f"the address {host} cannot be resolved ({error.strerror})"
    if isinstance(error, OSError):
        return "no process answers there"
    return "another program listens there" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))


def _missing(store: Store, keys: list[str]) -> str:
    try:
        ranks = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    except DistError:
        return "the first process has ended, and other ranks"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks[:20])}{' …' if len(ranks) > 20 else ''}"


def meet_first(strategy: Any, seconds: float) -> None:
    """Let the processes of a strategy meet before it creates its process group.

    Args:
        strategy: strategy of a Trainer; one with a single process is unchanged.
        seconds: time limit.
    """
    if not hasattr(strategy, "setup_distributed") or getattr(strategy, "_start_method", "popen") != "popen":
        return
    create: Callable[[], None] = strategy.setup_distributed

    def setup_distributed() -> None:
        _create_group(strategy, seconds)
        create()  # Lightning and DeepSpeed use an existing group

    strategy.setup_distributed = setup_distributed


def _create_group(strategy: Any, seconds: float) -> None:
    if torch.distributed.is_initialized():
        return
    strategy.set_world_ranks()
    where = strategy.cluster_environment
    rank, world_size = int(strategy.global_rank), int(strategy.world_size)
    if world_size == 1:
        return
    store, names = Rendezvous(where.main_address, where.main_port, rank, world_size).wait(seconds)
    backend = strategy._get_process_group_backend()
    torch.distributed.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank, world_size=world_size, timeout=strategy._timeout
    )
    if backend == "nccl":
        atexit.register(_destroy_group)  # as Lightning does for a group that it created
    log.info("rank %d of %d: all processes are here", rank, world_size)
    if peers := Peers.meet(store, rank, names, where.main_address):
        _watched.append(peers)


def _destroy_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def dead_process(seconds: float = 5.0) -> str | None:
    """Return which process of this run has died, such as `rank 1 (process 7 on n2)`, within `seconds`; or None."""
    return _watched[-1].lost(seconds) if _watched else None


def part(error: BaseException | None = None) -> None:
    """Stop watching the other processes, because the run's collectives are finished.

    Args:
        error: the error that ended this process. With an error (not a requested exit), the others are notified by name.
    """
    while _watched:
        _watched.pop().leave(in_peace=error is None or not isinstance(error, Exception))
