"""Locks where `flock` works, and where a network disk has none that other machines see."""

import errno
import fcntl
import subprocess
import sys
import time

import pytest

from hass_lightning.runs import lock
from hass_lightning.runs.lock import file_lock, has_locks, hold, only_one_here

MOUNT = "36 35 0:31 / {place} rw,relatime shared:1 - {kind} server:/export rw,{options}\n"
ROOT = "25 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("nfs4", "vers=4.2,local_lock=none", True),
        ("nfs", "vers=3,nolock,local_lock=all", False),
        ("nfs", "vers=3,local_lock=flock", False),
        ("nfs", "vers=3,local_lock=posix", True),
        ("lustre", "localflock", False),
        ("lustre", "noflock", False),
        ("lustre", "flock", True),
        ("ext4", "nolock", True),  # an option of another file system
    ],
)
def test_a_network_disk_with_local_locks_is_recognised(tmp_path, kind, options, expected):
    mounts = ROOT + MOUNT.format(place=tmp_path, kind=kind, options=options)
    assert has_locks(tmp_path, mounts) is expected
    assert has_locks(tmp_path, ROOT + MOUNT.format(place=f"{tmp_path}x", kind=kind, options=options))


@pytest.fixture
def no_flock(monkeypatch):
    """A file system on which the system call fails, as on Lustre without `-o flock`."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock._has_locks.cache_clear()
    yield
    lock._has_locks.cache_clear()


def test_without_flock_a_cell_is_held_by_one(no_flock, tmp_path, caplog):
    held = hold(tmp_path / "cell")
    assert held is not None and held.descriptors == []
    assert "no locks that other machines see" in caplog.text
    other = "import sys; from hass_lightning.runs import lock; lock.has_locks = lambda *_: False; " \
        "sys.exit(lock.hold(lock.Path(sys.argv[1])) is not None)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", other, str(tmp_path / "cell")], check=False).returncode == 0
    held.release()
    assert subprocess.run([sys.executable, "-c", other, str(tmp_path / "cell")], check=False).returncode == 1


def test_without_flock_a_killed_process_holds_nothing_after_a_while(no_flock, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    code = (
        "import sys, time; from hass_lightning.runs import lock; lock.has_locks = lambda *_: False\n"
        "lock.LEASE_SECONDS = 2.0\n"
        "with lock.file_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    time.sleep(3)
    assert hold(tmp_path / "x") is None  # renewed
    other.kill()
    other.communicate()
    started = time.monotonic()
    with file_lock(tmp_path / "x", timeout=30):
        assert time.monotonic() - started < 30


def test_without_flock_a_run_folder_is_held(no_flock, tmp_path):
    with only_one_here(tmp_path / "run"):
        assert hold(tmp_path / "run" / ".lock") is None
    assert hold(tmp_path / "run" / ".lock") is not None
