"""Stages of a command and their progress bars, without the display (screen.py)."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from datetime import timedelta

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 15.0


@dataclass
class Bar:
    """A progress bar. `update(n)` advances it, `note(text)` sets the text next to it.

    Attributes:
        unit: unit of the counts, in the singular.
    """

    name: str
    total: int
    unit: str
    done: int = 0
    text: str = ""
    started: float = field(default_factory=time.monotonic)
    known: int = 0  # completed by an earlier attempt; not counted in the rate
    last_line: float = field(default_factory=time.monotonic)
    silent: bool = False  # True: drawn in the list, so no log lines

    def update(self, count: int = 1) -> None:
        """Advance by `count`. Without a list, log a line every `SECONDS_BETWEEN_LINES`."""
        now = time.monotonic()
        if not self.done and now - self.started < 0.01:
            self.known = count
        self.done += count
        if not self.silent and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            log.info("%s: %s %s", self.name, self.summary(), self.text)

    def note(self, text: str) -> None:
        """Set the text next to the bar."""
        self.text = text

    @property
    def rate(self) -> float:
        """Units per second; 0 at the start."""
        seconds = time.monotonic() - self.started
        return (self.done - self.known) / seconds if seconds > 0 else 0.0

    @property
    def left(self) -> str:
        """The remaining time as `0:00:05 left`; empty if unknown."""
        return f"{short_time((self.total - self.done) / self.rate)} left" if self.rate > 0 else ""

    @property
    def count(self) -> str:
        """The count as `2,322/3,482 tokens`."""
        return f"{self.done:,}/{self.total:,} {self.unit}s"

    def summary(self) -> str:
        """Count, rate and remaining time as one line of text."""
        return f"{self.count}, {short_rate(self.rate)}, {self.left or 'unknown time left'}"


def short_time(seconds: float) -> str:
    """Format seconds as `0:00:05`."""
    return str(timedelta(seconds=round(max(0.0, seconds))))


def short_rate(rate: float) -> str:
    """Format a rate as `1,200/s` or `3.9/s`."""
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.1f}/s"


@dataclass
class Stage:
    """A stage of a command: one line of the list."""

    name: str
    state: str = "waiting"
    detail: str = ""  # text shown for a completed stage
    seconds: float = 0.0  # duration
    since: float = field(default_factory=time.monotonic)  # start of a running stage
    bars: list[Bar] = field(default_factory=list)  # the last one is shown
    counts: dict[str, int] = field(default_factory=dict)  # totals of the completed bars, by unit
    listed: bool = True  # False: removed from the list when it ends
