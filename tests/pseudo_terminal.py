"""A command in a pseudo-terminal, and what its screen shows."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time

import pyte


class PseudoTerminal:
    """A process in a terminal of `columns` × 40; lines that leave the screen are kept."""

    def __init__(self, command, env, cwd, columns=80, rows=40):
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self.stream = pyte.ByteStream(self.screen)
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        env = {**env, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows)}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=cwd, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 (Ctrl-C is SIGINT)
        )  # fmt: skip
        os.close(theirs)
        self.file = ours

    def lines(self):
        """The text of all lines, those above the screen as well."""
        above = ["".join(line[at].data for at in range(self.screen.columns)) for line in self.screen.history.top]
        return [line.rstrip() for line in [*above, *self.screen.display]]

    def cursor_line(self):
        """The text of the line with the cursor."""
        return self.screen.display[self.screen.cursor.y]

    def read(self, seconds):
        """Read what the process writes for at most so long; False at its end."""
        if not select.select([self.file], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.file, 65536)
        except OSError:  # the other end is closed
            return False
        self.stream.feed(data)
        return bool(data)

    def wait_for(self, condition, seconds=150):
        """Read until `condition(lines)` holds."""
        end = time.monotonic() + seconds
        while not condition(self.lines()):
            assert time.monotonic() < end, "\n".join(self.lines())
            assert self.read(0.2) or condition(self.lines()), "\n".join(self.lines())

    def type(self, text):
        """Type on the keyboard."""
        os.write(self.file, text.encode())

    def close(self, seconds=60):
        """Wait for the end of the process; its exit code."""
        end = time.monotonic() + seconds
        while self.read(0.2) and time.monotonic() < end:
            pass
        code = self.process.wait(timeout=seconds)
        os.close(self.file)
        return code
