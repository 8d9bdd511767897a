"""The records of a benchmark while it runs, and the file to which they are appended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hass_lightning.measure.record import Record, read_records
from hass_lightning.runs.progress import Bar


@dataclass
class Journal:
    """The records so far: those found in the file, and `num_new` new ones appended to it.

    Attributes:
        done: records found in the file, by key.
        records: records of this benchmark, in order.
    """

    done: dict[tuple[Any, ...], Record]
    file: TextIO | None
    on_record: Callable[[Record], None] | None
    bar: Bar
    records: list[Record] = field(default_factory=list)
    num_new: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def write(self, record: Record) -> None:
        """Append a new record to the file and pass it to `on_record`."""
        self.num_new += 1
        if self.file is not None:
            self.file.write(record.to_json() + "\n")
            self.file.flush()
        if self.on_record is not None:
            self.on_record(record)


def open_records(path: Path) -> tuple[dict[tuple[Any, ...], Record], TextIO]:
    """Return (finished records by key, the file to append to), after removing an incomplete last line from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[tuple[Any, ...], Record] = {}
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
        done = {record.key: record for record in read_records(path)}
    return done, path.open("a", encoding="utf-8")
