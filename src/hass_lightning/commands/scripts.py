"""The console scripts. Each answers `--help` and `--version`, and reads its config before torch is imported.

`python -m hass_lightning.commands.train` does the same, with the imports first.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from hass_lightning.commands.help import COMMANDS, answer, overview, print_any_text, versions

MODULES = {"import": "import_head"}  # of the commands whose name is a keyword


def start(command: str) -> None:
    """Run a command, importing its module when its config is composed."""
    print_any_text()
    if (text := answer(command, sys.argv[1:])) is not None:
        print(text)  # before Hydra is imported
        return
    from hass_lightning.commands.command import launch
    from hass_lightning.runs.screen import stage

    module = f"hass_lightning.commands.{MODULES.get(command, command)}"

    def task(config: Any) -> Any:
        with stage("starting"):
            with_imports: Any = importlib.import_module(module)
        return with_imports.main.task(config)

    task.__module__ = module  # the sweep launcher starts its jobs as `python -m <module>`
    launch(command, task)


def train() -> None:
    """`hass-train`."""
    start("train")


def prepare() -> None:
    """`hass-prepare`."""
    start("prepare")


def benchmark() -> None:
    """`hass-benchmark`."""
    start("benchmark")


def export() -> None:
    """`hass-export`."""
    start("export")


def import_head() -> None:
    """`hass-import`."""
    start("import")


def doctor() -> None:
    """`hass-doctor`."""
    start("doctor")


def report() -> None:
    """`hass-report`."""
    start("report")


def generate() -> None:
    """`hass-generate`."""
    start("generate")


def hass() -> None:
    """`hass`: the commands and versions; `hass train …` is `hass-train …`."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        sys.argv[:] = [f"hass-{words[0]}", *words[1:]]
        start(words[0])
    elif not words or words[0] in ("--help", "-h", "help"):
        print(overview())
    elif words[0] == "--version":
        print(versions())
    else:
        print(f"error: hass {words[0]}: there is no such command; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(1)
