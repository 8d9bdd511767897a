"""Run commands in a pseudo-terminal, and compare their output as plain text with snapshots."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte

SCREENS = Path(__file__).with_name("screens")
LINES = 400  # height of the terminal, so that nothing is scrolled out
# output of libraries, which must not be on the screen of a run
FOREIGN = (
    "wandb:", "GPU available", "TPU available", "Tip:", "Warning", "validated against", "it/s", "Epoch", "v_num",
    "weights_only", "litlogger", "accelerator", "[INFO]", "Trainer.fit", "Loading weights", "FLOPs", "HYDRA",
    "Traceback",
)  # fmt: skip


def script(command):
    """Return the command that starts a console script in this interpreter."""
    return [sys.executable, "-c", f"from hass_lightning.commands import scripts; scripts.{command}()"]


def run_in_terminal(words, columns, *, cwd, env, timeout=2400, watch=None):
    """Run a command in a terminal of `columns` columns. Return the final content of the terminal and the exit code.

    `watch` is called with the content of the terminal whenever something was written.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    environment = {**env, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        words, cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    screen = pyte.Screen(columns, LINES)
    stream = pyte.ByteStream(screen)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            received = os.read(ours, 65536)
        except OSError:  # the last process with this terminal has ended
            break
        if not received:
            break
        stream.feed(received)
        if watch is not None and not select.select([ours], [], [], 0.02)[0]:  # between two frames
            watch(shown_on(screen))
    os.close(ours)
    code = process.wait(timeout=60)
    return shown_on(screen), code


def shown_on(screen):
    """The text on a screen, without empty lines at its ends."""
    return "\n".join(line.rstrip() for line in screen.display).strip("\n")


def masked(text):
    """Remove the parts of a text that differ between runs: numbers, intervals, hashes, and the spaces between cells."""
    text = re.sub(r"\b[a-p]{12}\b|offline-run-\S+|(?<=/features/)\w+", "HASH", text)
    text = re.sub(r"\d+([.,:]\d+)*(e[+-]\d+)?", "N", text)
    text = re.sub(r"\bN min\b", "N s", text)  # on a busy machine
    text = re.sub(r" *\[N, N\]", "", text)  # a figure that is equal for all prompts has none
    lines = [re.sub(r" {2,}", " ", line).rstrip() for line in text.splitlines()]
    return re.sub(r"[━╸╺]+( [━╸╺]+)*", "━", re.sub(r"─+", "─", "\n".join(lines))).strip() + "\n"


def check_snapshot(name, text):
    """Compare a text with `tests/screens/<name>.txt`, or write the file if UPDATE_SCREENS is set."""
    path = SCREENS / f"{name}.txt"
    if os.environ.get("UPDATE_SCREENS"):
        path.write_text(masked(text))
    assert masked(text) == path.read_text()


def wrapped_lines(text, columns):
    """The lines that reach the last column, where they were broken. Commands to paste may be longer."""
    return [line for line in text.splitlines() if len(line) >= columns and not line.startswith("  hass-")]


def foreign_lines(text):
    """Return the lines that a library printed."""
    return [line for line in text.splitlines() if any(word in line for word in FOREIGN)]
