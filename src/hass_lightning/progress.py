"""One progress bar for every long stage (rich), silent when nobody watches."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
console = Console(stderr=True)


class Bar:
    """A running bar: `update(n)` moves it, `note(text)` writes beside it (a running metric)."""

    def __init__(self, name: str, total: int, unit: str, progress: Progress | None):
        self.name, self.total, self.unit, self.progress = name, total, unit, progress
        self.done, self.text, self._last = 0, "", time.monotonic()
        self.task = progress.add_task(name, total=total, note="") if progress else None

    def update(self, count: int = 1) -> None:
        """Move the bar; without a terminal, one log line every half minute instead."""
        self.done += count
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=self.done)
        elif time.monotonic() - self._last > 30:
            self._last = time.monotonic()
            log.info("%s: %d of %d %ss %s", self.name, self.done, self.total, self.unit, self.text)

    def note(self, text: str) -> None:
        """Show `text` beside the bar."""
        self.text = text
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, note=text)


@contextmanager
def progress_bar(name: str, total: int, unit: str = "step") -> Iterator[Bar]:
    """A progress bar on stderr, or sparse log lines where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield Bar(name, total, unit, None)
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as progress:
        yield Bar(name, total, unit, progress)
