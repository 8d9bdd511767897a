"""Detection of dead processes of a run: the kernel closes a dead process's connection, even after kill -9.

Every process has a connection to the first one, which notifies the others. Collectives do not give this information:
NCCL waits, and the error of gloo names an address that may belong to any rank.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Mapping

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from hass_lightning.runs.screen import print_error

log = logging.getLogger(__name__)
CONNECT_SECONDS = 10.0
GRACE_SECONDS = 20.0  # time for a process to end by itself, by the error of a collective, after another has died
FAREWELL = b"bye\n"
# A machine without power closes no connection: the kernel probes after 10 s, and four more times.
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Peers:
    """The other processes of this run, watched by a thread.

    If one of them dies, the thread prints which. If this process has not ended after `GRACE_SECONDS`, the thread ends
    it.

    Args:
        rank: rank of this process.
        names: host and process id of every rank.
        connections: connections by rank: to all others in the first process, to the first process in any other.
    """

    def __init__(self, rank: int, names: Mapping[int, str], connections: dict[int, socket.socket]) -> None:
        self.rank, self.names, self.connections = rank, names, connections
        self._dead: str | None = None
        self._changed, self._left = threading.Event(), threading.Event()
        self._wake, self._woken = socket.socketpair()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    @classmethod
    def meet(cls, store: Store, rank: int, names: Mapping[int, str], host: str) -> Peers | None:
        """Connect all processes with the first one; return None with a warning if that is not possible.

        Args:
            store: the store shared by all processes.
            rank: rank of this process.
            names: host and process id of every rank.
            host: host of the first process.
        """
        connections: dict[int, socket.socket] = {}
        try:
            if rank == 0:
                with socket.create_server(("", 0), backlog=len(names)) as server:
                    server.settimeout(CONNECT_SECONDS)
                    store.set("peers", str(server.getsockname()[1]))
                    while len(connections) < len(names) - 1:
                        connection, _ = server.accept()
                        connection.settimeout(CONNECT_SECONDS)
                        connections[int(_read_line(connection))] = connection
            else:
                connection = socket.create_connection((host, int(store.get("peers"))), CONNECT_SECONDS)
                connection.sendall(b"%d\n" % rank)
                connections[0] = connection
        except (OSError, ValueError, DistError) as error:
            log.warning("the processes cannot watch each other (%s): one that dies will not be named", error)
            for connection in connections.values():
                connection.close()
            return None
        for connection in connections.values():
            connection.settimeout(None)
            _keep_alive(connection)
        return cls(rank, names, connections)

    def lost(self, seconds: float) -> str | None:
        """Return which process has died, waiting up to `seconds` for a notification; None if none is known."""
        self._changed.wait(seconds)
        return self._dead

    def leave(self, in_peace: bool) -> None:
        """Stop watching. `in_peace`: this process is finished; otherwise it has failed, and the others are notified."""
        self._left.set()
        for connection in self.connections.values():
            try:
                if in_peace:
                    connection.sendall(FAREWELL)
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()
        self._wake.close()

    def _watch(self) -> None:
        watched = {connection: rank for rank, connection in self.connections.items()}
        while watched and not self._left.is_set():
            try:
                ready, _, _ = select.select([*watched, self._woken], [], [])
            except (OSError, ValueError):  # closed by `leave`
                return
            for connection in ready:
                if connection is self._woken:
                    return
                rank = watched[connection]
                words = _receive(connection)
                if words == FAREWELL:
                    del watched[connection]
                elif words:
                    self._say(int(words.split()[0]))
                    return
                elif not self._left.is_set():
                    self._tell(rank, [other for other in watched if other is not connection])
                    self._say(rank)
                    return

    def _tell(self, rank: int, others: list[socket.socket]) -> None:
        for other in others:
            try:
                other.sendall(b"%d\n" % rank)
            except OSError:
                continue

    def _say(self, rank: int) -> None:
        self._dead = f"rank {rank} ({self.names[rank]})"
        self._changed.set()
        if not self._left.wait(GRACE_SECONDS):
            print_error(f"{self._dead} of this run has died: rank {self.rank} stops, too")
            os._exit(1)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(64)
    except OSError:
        return b""


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        more = connection.recv(1)
        if not more:
            raise ConnectionError("closed before it said its rank")
        line += more
    return line
