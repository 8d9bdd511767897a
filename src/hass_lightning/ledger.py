"""The run ledger: what became of every cell of a sweep, in `<sweep folder>/ledger.jsonl`.

The launcher writes a line when a cell starts and another when it ends; the last line of a cell is what holds. A cell is
named by a hash of its overrides, so the same command finds its cells again. Lines are only ever appended, so a kill at
any moment costs at most a partial last line, which readers skip.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

RESULT_FILE_VARIABLE = "HASS_LIGHTNING_RESULT_FILE"
"""Where a job writes its result (see `cli.command`); set by the launcher."""

SWEEP_VARIABLE = "HASS_LIGHTNING_SWEEP"
"""The name of the sweep a job belongs to, for the W&B group; set by the launcher."""

REQUEUE_EXIT_CODE = 75
"""A job that saved its state and wants to be started again (preemption) exits with it: EX_TEMPFAIL of sysexits.h."""

LAUNCH = f"{socket.gethostname()}-{os.getpid()}-{int(time.time())}"
"""Names this process in the ledger."""

# Options of a sweep that may change from one launch to the next without making it another sweep.
_LAUNCH_OPTIONS = re.compile(
    r"\+*hydra\.(launcher|sweep|mode|verbose|run|sweeper\.(n_trials|n_jobs|max_\w+|storage))\b"
)


# What only asks about a sweep (planning.py) names no other sweep or cell.
_QUESTIONS = re.compile(r"\+*(plan|estimate\.\w+)=")


def short_hash(parts: Iterable[str]) -> str:
    """Twelve letters a-p that name these strings: in paths, shells and Hydra overrides they need no quoting."""
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return digest.translate(str.maketrans("0123456789abcdef", "abcdefghijklmnop"))


def cell_name(config_name: str | None, overrides: Sequence[str]) -> str:
    """The name of a cell, from its task overrides; their order does not matter."""
    return short_hash([str(config_name), *sorted(o for o in overrides if not _QUESTIONS.match(o))])


def sweep_name(study: str | None, config_name: str | None, task: Sequence[str], hydra: Sequence[str] = ()) -> str:
    """The name of a sweep: its study, else a hash of the overrides (task's, and Hydra's that choose what is run)."""
    if study:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", str(study))
    choices = [
        override for override in hydra if not _LAUNCH_OPTIONS.match(override) and "hydra/launcher" not in override
    ]
    return short_hash([str(config_name), *sorted(o for o in task if not _QUESTIONS.match(o)), *sorted(choices)])


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    `status` is `running`, `completed`, `failed`, `stopped` (with the launcher) or `requeued` (exit code 75).
    """

    cell: str
    status: str
    overrides: list[str]
    config_hash: str
    folder: str
    git: str | None = None
    data: str | None = None  # hash of the sequences trained on (`FeatureDataModule.data_hash`)
    metric: Any = None
    seconds: float | None = None
    error: str | None = None
    result: dict[str, Any] = field(default_factory=dict)  # the line of JSON the job printed
    launch: str = LAUNCH
    time: float = field(default_factory=time.time)


class Ledger:
    """The ledger of the sweep in `folder`, shared by all launches of that sweep on this machine or file system."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "ledger.jsonl"

    def append(self, entry: Entry) -> Entry:
        """Write one line, flushed to the disk, under a lock that all launches share."""
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(entry), default=str).encode() + b"\n"
        with FileLock(f"{self.path}.lock"), open(self.path, "a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END) or True) and file.read(1) != b"\n":
                line = b"\n" + line  # the line before was cut short by a kill: keep the damage to that line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return entry

    def entries(self) -> list[Entry]:
        """All lines in the order written. A damaged line is skipped and named in a warning."""
        known = {item.name for item in fields(Entry)}
        found = []
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                found.append(Entry(**{key: value for key, value in values.items() if key in known}))
            except (ValueError, TypeError, AttributeError):
                log.warning("%s, line %d is damaged and was skipped: its cell counts as not run", self.path, number)
        return found

    def latest(self) -> dict[str, Entry]:
        """The last entry of every cell, in the order in which the cells were first started."""
        found: dict[str, Entry] = {}
        for entry in self.entries():
            found[entry.cell] = entry
        return found

    def folder_of(self, entry: Entry) -> Path:
        """Where a cell's files are: a sweep that was moved or copied still has its cells, under their names."""
        here = self.folder / entry.cell
        return next((folder for folder in (here, Path(entry.folder)) if folder.is_dir()), here)

    def lock(self, cell: str) -> int | None:
        """Take a cell, or None if somebody has it. The lock is held by the returned open file, and so by every process
        that inherits it: a job that outlives its killed launcher still holds its cell, and no second launch starts it.
        """
        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / cell, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor
