"""Locks on files that hold for all processes on all machines, and the lock of a run folder.

Most file systems have `flock`: the kernel releases a lock when its last process ends. Some network disks do not support
it (Lustre without `-o flock`), or only locally (NFS with `local_lock` or `nolock`, Lustre with `localflock`). There a
lease is used instead: a file that its owner renews, and that expires `LEASE_SECONDS` after the last renewal.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from hass_lightning.runs.files import write_whole

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
SAY_AGAIN_SECONDS = 300.0
LEASE_SECONDS = 120.0
_LOCAL_ONLY = re.compile(r"(?:^|,)(?:nolock|local_lock=(?:all|flock)|localflock|noflock)(?:,|$)")
_NETWORK = re.compile(r"(?:nfs\d?|lustre)$")


def has_locks(folder: Path, mounts: str | None = None) -> bool:
    """Whether `flock` works in a folder and holds for other machines.

    Args:
        folder: an existing one. mounts: the text of /proc/self/mountinfo; None: as it is now.
    """
    if mounts is None:
        return _has_locks(folder, os.stat(folder).st_dev)
    kind, options = _mount(folder, mounts)
    return not (_NETWORK.match(kind) and _LOCAL_ONLY.search(options)) and _flock_works(folder)


@functools.lru_cache
def _has_locks(folder: Path, device: int) -> bool:
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        mounts = ""
    found = has_locks(folder, mounts)
    if not found:
        log.warning("%s has no locks that other machines see: lock files are used, renewed by their holders", folder)
    return found


def _mount(folder: Path, mounts: str) -> tuple[str, str]:
    """Type and options of the file system that a folder is on."""
    place, best = os.path.realpath(folder), ("", "", "")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, more = before.split(), after.split()
        if len(fields) < 6 or len(more) < 3:
            continue
        point = fields[4].encode().decode("unicode_escape")  # a space is \040
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, more[0], f"{fields[5]},{more[2]}")
    return best[1:]


def _flock_works(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
    return True


def file_lock(path: str | Path, timeout: float = -1) -> BaseFileLock:
    """A lock on a file, to be entered with `with`.

    Args:
        path: below an existing folder. timeout: seconds to wait; -1: as long as it takes, 0: not at all.

    Raises:
        filelock.Timeout: on entering it, if another process holds it.
    """
    if has_locks(Path(path).parent):
        return FileLock(path, timeout=timeout)
    return SoftFileLease(f"{path}.lease", timeout=timeout, lease_duration=LEASE_SECONDS)


class Held:
    """A lock of this process and of those that inherit `descriptors`; a lease has none."""

    def __init__(self, descriptor: int | None, lease: BaseFileLock | None = None) -> None:
        self.descriptors = [] if descriptor is None else [descriptor]
        self._lease = lease

    def release(self) -> None:
        """Give it up."""
        while self.descriptors:
            os.close(self.descriptors.pop())
        if self._lease is not None:
            self._lease.release()


def hold(path: Path) -> Held | None:
    """Lock a file; None if another process holds it."""
    if not has_locks(path.parent):
        lease = file_lock(path, timeout=0)
        try:
            lease.acquire()
        except Timeout:
            return None
        return Held(None, lease)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return Held(descriptor)


@contextmanager
def only_one_here(run_dir: Path) -> Iterator[None]:
    """Lock `run_dir` for this process; wait while another one holds the lock, which is released when its process ends.

    `.lock.json` identifies the process.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    holder = run_dir / ".lock.json"
    lock = file_lock(run_dir / ".lock", timeout=0)
    said = 0.0
    while True:
        try:
            lock.acquire()
            break
        except Timeout:
            if time.monotonic() - said > SAY_AGAIN_SECONDS or not said:
                said = time.monotonic()
                log.warning("%s is being written by %s: waiting for its end", run_dir, _name(holder))
            time.sleep(POLL_SECONDS)
    try:
        write_whole(holder, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _name(holder: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(holder.read_text())
        return f"process {known['pid']} on {known['host']}"
    return "another process"
