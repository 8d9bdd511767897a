"""Progress display of a command: a list of its stages with progress bars.

The list is drawn on a terminal only. Without a terminal, and in the other processes of a run, stages and their progress
are written to the log.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hass_lightning.runs.stages import Bar, Stage, short_rate, short_time

log = logging.getLogger(__name__)
MARKS = {"waiting": "·", "running": "•", "done": "✓", "failed": "✗"}
STYLES = {"waiting": "dim", "running": "bold cyan", "done": "green", "failed": "bold red"}
BAR_WIDTH = 20


class Screen:
    """The stages of a command, drawn as a list on a terminal.

    Args:
        stages: names of the stages, in order.
        terminal: stream for the list (None: no list).
        stdout: stream for the result.
        stderr: stream for tables.
        lines: stream for log lines (None: `stdout`).
        ends_with_table: whether the result is printed as a table; otherwise as one line of JSON.
    """

    def __init__(
        self,
        stages: Sequence[str],
        terminal: TextIO | None,
        stdout: TextIO,
        stderr: TextIO | None = None,
        lines: TextIO | None = None,
        ends_with_table: bool = False,
    ) -> None:
        self.stages = [Stage(name) for name in stages]
        self.stdout, self.stderr, self.lines = stdout, stderr or sys.stderr, lines or stdout
        self.ends_with_table = ends_with_table
        self.note = ""
        self.places: dict[str, str] = {}  # printed at the end: names and locations of results
        self.console = None if terminal is None else Console(file=terminal, highlight=False)
        self._running: Stage | None = None
        self._with_tables = True
        self._live: Live | None = None

    def __rich__(self) -> RenderableType:
        if all(stage.state == "waiting" or (not stage.listed and stage.state != "running") for stage in self.stages):
            return Group()  # no stage has started, e.g. because the run is complete
        table = Table.grid(padding=(0, 1))
        for _ in range(3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        for stage in self.stages:
            if not stage.listed and stage.state != "running":
                continue
            style = STYLES[stage.state]
            table.add_row(Text(MARKS[stage.state], style), Text(f"{stage.name:<11}", style), self._body(stage))
        lines: list[RenderableType] = [table]
        if self.note:
            lines.append(Text(f"  {self.note}", "dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def _body(self, stage: Stage) -> RenderableType:
        if stage.state == "waiting":
            return ""
        if stage.state != "running" or not stage.bars:
            seconds = stage.seconds + (time.monotonic() - stage.since if stage.state == "running" else 0.0)
            detail = "" if stage.state == "running" and stage.listed else stage.detail
            return Text(f"{detail}  {short_time(seconds)}".strip(), "dim")
        bar = stage.bars[-1]
        row = Table.grid(padding=(0, 1))
        for _ in range(4):
            row.add_column(no_wrap=True)
        row.add_row(
            ProgressBar(bar.total, bar.done, BAR_WIDTH),
            bar.count,
            Text(short_rate(bar.rate), "dim"),
            Text(bar.left, "cyan"),
        )
        return row

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Draw the list while the block runs. It stays on the terminal afterwards."""
        global _current  # noqa: PLW0603
        before, _current = _current, self
        try:
            if self.console is None:
                yield
                return
            self._live = Live(
                self, console=self.console, refresh_per_second=8, redirect_stdout=False, redirect_stderr=False,
                vertical_overflow="visible",
            )  # fmt: skip
            yield
        finally:
            self.note = ""
            self.stop()
            _current = before

    def draw(self) -> None:
        """Start to draw the list, if it is not drawn yet."""
        if self._live is not None and not self._live.is_started:
            self._live.start()

    def stop(self) -> None:
        """Draw the list for the last time. Later output appears below it."""
        if self._live is not None and self._live.is_started:
            self._live.stop()
        self._live = None

    def say(self, text: str, style: str = "") -> None:
        """Print a permanent line above the list; does nothing without a terminal."""
        if self.console is not None:
            self.console.print(Text(text, style))

    def table(self, table: RenderableType) -> None:
        """Print a table on stderr if there is no terminal. On a terminal, the command prints its result at the end."""
        if self.console is None and self._with_tables:
            Console(file=self.stderr, width=200).print(table)  # do not wrap lines in a log file

    @contextlib.contextmanager
    def without_tables(self) -> Iterator[None]:
        """Print no tables while the block runs."""
        before, self._with_tables = self._with_tables, False
        try:
            yield
        finally:
            self._with_tables = before

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Show the block as a stage. A stage inside another one is part of the outer one."""
        if self._running is not None:
            yield self._running
            return
        stage = next((each for each in self.stages if each.name == name), None)
        if stage is None:
            stage = Stage(name, listed=False)
            place = next((n for n, each in enumerate(self.stages) if each.state == "waiting"), len(self.stages))
            self.stages.insert(place, stage)
        self.draw()
        if self.console is None and stage.state == "waiting":
            log.info("stage: %s", name)
        stage.state, stage.since, self._running = "running", time.monotonic(), stage
        try:
            yield stage
            stage.state = "done"
        except BaseException:
            stage.state = "failed"
            raise
        finally:
            stage.seconds += time.monotonic() - stage.since
            self._running, self.note = None, ""

    @contextlib.contextmanager
    def bar(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        """Show a progress bar in the running stage, or in a new stage if none is running."""
        with contextlib.ExitStack() as stack:
            stage = self._running or stack.enter_context(self.stage(name))
            bar = Bar(name, total, unit, silent=self.console is not None)
            stage.bars.append(bar)
            try:
                yield bar
                stage.counts[unit] = stage.counts.get(unit, 0) + bar.total
                stage.detail = ", ".join(f"{count:,} {unit}s" for unit, count in stage.counts.items())
            finally:
                stage.bars.remove(bar)


_current: Screen | None = None


def current_screen() -> Screen | None:
    """Return the screen of the command that runs in this process, or None."""
    return _current


@contextlib.contextmanager
def stage(name: str) -> Iterator[Stage]:
    """Show the block as a stage of the running command, if any. Its `detail` is shown when it is complete."""
    if _current is None:
        yield Stage(name)
        return
    with _current.stage(name) as running:
        yield running


@contextlib.contextmanager
def without_tables() -> Iterator[None]:
    """Print no tables while the block runs."""
    with contextlib.nullcontext() if _current is None else _current.without_tables():
        yield


def place(name: str, where: str) -> None:
    """Print the location of a result at the end of the command."""
    if _current is not None:
        _current.places[name] = where
        log.info("%s: %s", name, where)


def print_result(text: str) -> None:
    """Print to the real stdout, which is separate from the output of libraries."""
    print(text, file=None if _current is None else _current.stdout, flush=True)


def folded(line: str, width: int) -> list[str]:
    """Return the line in parts of at most `width` characters; all but the first are indented."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def print_error(sentence: str, stream: TextIO | None = None) -> None:
    """Print `error: …` to the real stderr or to `stream`, wrapped between words on a terminal."""
    stream = stream or (sys.stderr if _current is None else _current.stderr)
    lines = f"error: {sentence}".splitlines()
    if stream.isatty():
        width = shutil.get_terminal_size().columns - 1
        lines = [part for line in lines for part in folded(line, width)]
    print("\n".join(lines), file=stream, flush=True)


def stdout_console() -> Console:
    """Return a console on the real stdout, for output that the user requested."""
    return Console(file=None if _current is None else _current.lines, highlight=False)
