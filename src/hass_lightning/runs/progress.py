"""Progress bar for long stages: in the list of the command that runs, else rich's own, or log lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hass_lightning.runs.screen import Screen, current_screen
from hass_lightning.runs.stages import Bar

__all__ = ["Bar", "progress_bar"]


@contextmanager
def progress_bar(name: str, total: int, unit: str = "step") -> Iterator[Bar]:
    """Show a progress bar in the list of the command that runs; outside of one, on stderr if it is a terminal.

    Args:
        name: of the bar, and of its stage where none runs. total: units to do. unit: in the singular.
    """
    screen = current_screen()
    if screen is not None:
        with screen.bar(name, total, unit) as bar:
            yield bar
        return
    own = Screen((), sys.stderr if sys.stderr.isatty() else None, sys.stdout)
    with own.shown(), own.bar(name, total, unit) as bar:
        yield bar
