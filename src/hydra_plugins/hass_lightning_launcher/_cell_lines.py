"""Progress display of a sweep on a terminal: one line per running cell with elapsed and remaining time.

The module name starts with an underscore so that Hydra's plugin scan skips it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path

from hass_lightning.runs.files import read_tail
from hass_lightning.runs.ledger import Entry
from hass_lightning.runs.screen import current_screen
from hass_lightning.runs.stages import Stage, short_time

LEFT = re.compile(r"(\d[\d:]*:\d\d) left")
TAIL = 2000  # bytes at the end of a job's log that are searched for the remaining time
LONGEST = 36  # maximum length of a cell's name; longer names keep their end, which distinguishes them


class CellLines:
    """Lines of the running cells. Without a terminal, nothing is shown (the pool logs starts and ends)."""

    def __init__(self) -> None:
        screen = current_screen()
        self.screen = screen if screen is not None and screen.console is not None else None
        self._lines: dict[str, tuple[Stage, float, Path]] = {}
        self._seconds: list[float] = []  # durations of completed cells

    def known(self, entries: Iterable[Entry]) -> None:
        """Use the durations of cells completed by earlier launches for estimates."""
        self._seconds = [entry.seconds for entry in entries if entry.status == "completed" and entry.seconds]

    def started(self, cell: str, name: str, log_file: Path) -> None:
        """Add a line for a cell that starts."""
        if self.screen is not None:
            line = Stage(cut(name), "running", listed=False)
            self.screen.stages.append(line)
            self.screen.draw()
            self._lines[cell] = line, time.monotonic(), log_file

    def ended(self, cell: str, name: str, words: str, seconds: float | None, failed: bool) -> None:
        """Replace the line of a cell by its outcome.

        Args:
            words: text of the outcome.
            seconds: duration in this launch.
        """
        if self.screen is None:
            return
        if (found := self._lines.pop(cell, None)) is not None:
            self.screen.stages.remove(found[0])
        if seconds and not failed:
            self._seconds.append(seconds)
        self.screen.say(f"{'✗' if failed else '✓'} {cut(name):{LONGEST}} {words}", "red" if failed else "green")

    def tick(self, num_left: int, num_slots: int) -> None:
        """Update the remaining times. The list itself shows the elapsed times.

        Args:
            num_left: number of cells that have not ended.
            num_slots: number of simultaneous cells.
        """
        if self.screen is None:
            return
        now = time.monotonic()
        typical = sum(self._seconds) / len(self._seconds) if self._seconds else None
        for line, started, log_file in self._lines.values():
            elapsed = now - started
            left = f"about {short_time(typical - elapsed)} left" if typical is not None else logged_time_left(log_file)
            line.detail = left
        self.screen.note = ""
        if typical is not None and num_left:
            spent = sum(now - started for _, started, _ in self._lines.values())
            seconds = max(0.0, num_left * typical - spent) / num_slots
            self.screen.note = f"{num_left} to go, about {short_time(seconds)} left"


def cut(name: str) -> str:
    """Shorten a name to `LONGEST` characters."""
    return name if len(name) <= LONGEST else "…" + name[-LONGEST + 1 :]


def logged_time_left(log_file: Path) -> str:
    """Return the remaining time of the stage that a job logged last; empty if there is none."""
    try:
        found = LEFT.findall(read_tail(log_file, TAIL))
    except OSError:
        return ""
    return f"stage: {found[-1]} left" if found else ""
