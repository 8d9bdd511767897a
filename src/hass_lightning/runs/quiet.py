"""Redirect the output of libraries to a log file, and restore global state when a command ends."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class Log(io.TextIOBase):
    """A text stream that replaces stdout and stderr. Text is kept in memory until `attach` sets the file.

    Args:
        also: a stream to which the same text is written, or None.
    """

    def __init__(self, also: TextIO | None = None) -> None:
        self.also, self.path = also, None
        self._early, self._file = io.StringIO(), None
        self._descriptor = os.open(os.devnull, os.O_WRONLY)

    path: Path | None
    _file: TextIO | None

    def attach(self, path: Path) -> None:
        """Append to `path`, starting with the text in memory."""
        if self.path == path:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115  # closed by `release`
        file.write(self._early.getvalue())
        self._early, self.path = io.StringIO(), path
        if self._file is not None:
            self._file.close()
        self._file = file

    def write(self, text: str) -> int:
        """Write text; carriage returns of progress bars become newlines."""
        (self._file or self._early).write(text.replace("\r\n", "\n").replace("\r", "\n"))
        if self.also is not None:
            self.also.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the file and the other stream."""
        for stream in (self._file, self.also):
            if stream is not None:
                stream.flush()

    def fileno(self) -> int:
        """Return the descriptor of the file, or of the null device, for subprocesses that a library starts."""
        return self._descriptor if self._file is None else self._file.fileno()

    def writable(self) -> bool:
        """Return True."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Always UTF-8."""
        return "utf-8"

    def release(self) -> None:
        """Close the file. Handlers that still hold this stream write to the null device afterwards."""
        if self._file is not None:
            self._file.close()
        self._file = None
        os.close(self._descriptor)
        self._descriptor = os.open(os.devnull, os.O_WRONLY)


@contextlib.contextmanager
def redirected(log: Log) -> Iterator[None]:
    """Redirect stdout, stderr and the logging handlers that write to them to `log` while the block runs."""
    moved = []
    for handler in every_handler():
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            stream = getattr(handler, "stream", None)
            if stream is None or isinstance(stream, io.StringIO):  # of pytest
                continue
            with contextlib.suppress(AttributeError, ValueError):  # a closed stream cannot be flushed
                moved.append((handler, stream))
                handler.stream = log
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            yield
        finally:
            for handler, stream in moved:
                with contextlib.suppress(AttributeError):
                    handler.stream = stream


def every_logger() -> list[logging.Logger]:
    """Return the root logger and all other existing loggers."""
    known = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]


def every_handler() -> list[logging.Handler]:
    """Return the handlers of all loggers."""
    return list({id(handler): handler for logger in every_logger() for handler in logger.handlers}.values())


@contextlib.contextmanager
def restored_state() -> Iterator[None]:
    """Restore environment variables, warning filters, loggers and `sys.argv` after the block."""
    environment, argv = dict(os.environ), list(sys.argv)
    loggers = {
        logger: (list(logger.handlers), logger.level, logger.propagate, logger.disabled) for logger in every_logger()
    }
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            sys.argv[:] = argv
            for logger, (handlers, level, propagate, disabled) in loggers.items():
                for handler in set(logger.handlers) - set(handlers):
                    handler.close()
                logger.handlers[:] = handlers
                logger.propagate, logger.disabled = propagate, disabled
                logger.setLevel(level)
