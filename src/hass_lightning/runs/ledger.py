"""Ledger of a sweep: the status of every cell, in `<sweep folder>/ledger.jsonl`.

The launcher writes a line when a cell starts and another when it ends; the last line of a cell is the valid one. A
cell's id is a hash of its overrides, so the same command finds its cells again, whatever the names of their folders (in
old sweeps the name of a folder is the id). Lines are only appended, so a kill at any moment costs at most an incomplete
last line, which readers skip.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hass_lightning.runs.lock import Held, file_lock, hold
from hass_lightning.runs.names import short

log = logging.getLogger(__name__)

RESULT_FILE_VARIABLE = "HASS_LIGHTNING_RESULT_FILE"
"""File to which a job writes its result (see `commands.command`); set by the launcher."""

SWEEP_VARIABLE = "HASS_LIGHTNING_SWEEP"
"""Name of the sweep of a job, used as W&B group; set by the launcher."""

REQUEUE_EXIT_CODE = 75
"""Exit code of a preempted job that saved its state and asks to be restarted: EX_TEMPFAIL of sysexits.h."""

LAUNCH = f"{socket.gethostname()}-{os.getpid()}-{int(time.time())}"
"""Identifies this process in the ledger."""

# Options that may differ between two launches of the same sweep.
_LAUNCH_OPTIONS = re.compile(
    r"\+*hydra\.(launcher|sweep|mode|verbose|run|sweeper\.(n_trials|n_jobs|max_\w+|storage))\b"
)


# Overrides that only request a plan (training/plan.py) or a table do not change the name of a sweep or cell.
_PLAN_OVERRIDES = re.compile(r"\+*(plan|status|estimate\.\w+)=")


def short_hash(parts: Iterable[str]) -> str:
    """Hash strings to twelve letters a-p, which need no quoting in paths, shells and Hydra overrides."""
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return digest.translate(str.maketrans("0123456789abcdef", "abcdefghijklmnop"))


def cell_id(config_name: str | None, overrides: Sequence[str]) -> str:
    """Return the id of a cell, from its task overrides; their order does not matter."""
    return short_hash([str(config_name), *sorted(o for o in overrides if not _PLAN_OVERRIDES.match(o))])


def sweep_name(study: str | None, config_name: str | None, task: Sequence[str], hydra: Sequence[str] = ()) -> str:
    """Return the name of a sweep: its study, or a hash of the overrides (of the task, and of Hydra if they matter)."""
    if study:
        return short(re.sub(r"[^A-Za-z0-9._-]+", "-", str(study)))
    choices = [
        override for override in hydra if not _LAUNCH_OPTIONS.match(override) and "hydra/launcher" not in override
    ]
    return short_hash([str(config_name), *sorted(o for o in task if not _PLAN_OVERRIDES.match(o)), *sorted(choices)])


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    `status` is `queued` (by SLURM), `running`, `completed`, `failed`, `stopped` (together with the launcher) or
    `requeued` (exit code 75).
    """

    cell: str  # its id
    status: str
    overrides: list[str]
    config_hash: str
    folder: str
    git: str | None = None
    data: str | None = None  # hash of the training sequences (`FeatureDataModule.data_hash`)
    metric: Any = None
    seconds: float | None = None
    error: str | None = None
    job: str | None = None  # of SLURM, which is asked whether it has ended
    node: str | None = None  # where it runs
    result: dict[str, Any] = field(default_factory=dict)  # the JSON line that the job printed
    launch: str = LAUNCH
    time: float = field(default_factory=time.time)


class Ledger:
    """Ledger of the sweep in `folder`, shared by all launches of that sweep on the same file system."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "ledger.jsonl"

    def append(self, entry: Entry) -> Entry:
        """Append one line and flush it to disk, under a lock that all launches share."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(entry), default=str).encode() + b"\n"
        with file_lock(f"{self.path}.lock"), open(self.path, "a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END) or True) and file.read(1) != b"\n":
                line = b"\n" + line  # the previous line is incomplete (killed process): start a new one
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return entry

    def entries(self) -> list[Entry]:
        """Read all lines in order. Damaged lines are skipped with a warning."""
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
        """Return the last entry of every cell, in the order in which the cells were first started."""
        found: dict[str, Entry] = {}
        for entry in self.entries():
            found[entry.cell] = entry
        return found

    def folder_of(self, entry: Entry) -> Path:
        """Return the folder of a cell, which is found by its name if the sweep was moved or copied."""
        here = self.folder / Path(entry.folder).name
        return next((folder for folder in (here, Path(entry.folder)) if folder.is_dir()), here)

    def new_folder(self, cell: str, wanted: Path, others: Mapping[str, Path]) -> Path:
        """Return the folder for a cell that starts: the one it used before, otherwise `wanted`.

        Args:
            cell: the id of the cell.
            wanted: a folder below the sweep's. If another cell uses it, the id is added to the name.
            others: folders of cells that may not be in the ledger yet.
        """
        taken = dict(others)
        for entry in self.latest().values():
            noted = Path(entry.folder)
            taken[entry.cell] = noted if self.folder in noted.parents else self.folder / noted.name  # a moved sweep
        if cell in taken:
            return taken[cell]
        return wanted.with_name(f"{wanted.name}-{cell}") if wanted in taken.values() else wanted

    def lock(self, cell: str) -> Held | None:
        """Lock a cell; None if it is already locked.

        Every process that inherits the descriptors of the lock holds it. If a launcher is killed and its job continues,
        the cell stays locked and no other launch starts it.
        """
        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return hold(folder / cell)
