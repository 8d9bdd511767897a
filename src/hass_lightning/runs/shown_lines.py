"""Show the log records of this package while a command runs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from hass_lightning.runs.redaction import RedactingFilter
from hass_lightning.runs.screen import Screen

OURS = ("hass_lightning", "hydra_plugins", "__main__")  # __main__: `python -m hass_lightning.commands.train`


class ShownLines(logging.Handler):
    """Prints records as `12:03:29 text`, or without the time above the list of stages on a terminal.

    Args:
        screen: the screen of the command.
        level: minimum level of the records.
    """

    def __init__(self, screen: Screen, level: int) -> None:
        super().__init__(level)
        self.screen, self._warned = screen, set[str]()
        self.addFilter(RedactingFilter())

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record. Repeated warnings are printed once."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            if text in self._warned:
                return
            self._warned.add(text)
            text = f"{record.levelname.lower()}: {text}"
        if self.screen.console is not None:
            self.screen.say(text, "yellow" if record.levelno >= logging.WARNING else "")
            return
        with contextlib.suppress(ValueError):  # the stream is closed when the interpreter exits
            print(time.strftime("%H:%M:%S", time.localtime(record.created)), text, file=self.screen.lines, flush=True)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Handle the records of this package while the block runs."""
        loggers = [logging.getLogger(name) for name in OURS]
        for logger in loggers:
            logger.addHandler(self)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(self)
