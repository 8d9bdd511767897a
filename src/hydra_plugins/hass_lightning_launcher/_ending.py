"""End of a sweep: print the table of its cells, write its report and, without a terminal, print one line of JSON.

The module name starts with an underscore so that Hydra's plugin scan skips it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from hass_lightning.runs.ledger import LAUNCH, Entry, Ledger
from hass_lightning.runs.screen import Screen, current_screen

from ._submission import ALIVE

log = logging.getLogger(__name__)


_watched: set[str] = set()  # cells that this launch waits for, including those that another launch submitted


def watch(cells: Iterable[str]) -> None:
    """Count failures of these cells as failures of this launch."""
    _watched.update(cells)


def end_sweep(folder: Path) -> bool:
    """Write the report of a sweep and print its table. Without a terminal, the last line is one JSON object.

    Returns:
        Whether a cell of this launch failed.
    """
    ledger = Ledger(folder)
    latest = ledger.latest()
    if not latest:
        return False  # another launcher, which writes no ledger
    touched = {entry.cell for entry in ledger.entries() if entry.launch == LAUNCH} | _watched
    failed = sum(latest[cell].status == "failed" for cell in touched)
    completed = sum(entry.status == "completed" for entry in latest.values())
    result = {"sweep_dir": str(folder.absolute()), "num_completed": completed, "num_failed": failed}
    if left := sum(entry.job is not None and entry.status in ALIVE for entry in latest.values()):
        result["num_queued_or_running"] = left
    screen = current_screen()
    if screen is None:
        print(json.dumps(result), flush=True)
    else:
        show_sweep(screen, folder, latest.values(), result)
    return failed > 0


def show_sweep(screen: Screen, folder: Path, entries: Collection[Entry], result: dict[str, Any]) -> None:
    """Print the table on a terminal; without one, print the table on stderr and a line of JSON on stdout."""
    from hass_lightning.commands.ending import here, show_sweep_ending, sweep_table

    page = write_report(folder, entries, screen)
    screen.stop()
    if screen.ends_with_table:
        show_sweep_ending(entries, str(folder), page, screen.stdout)
        return
    if len(entries) > 1:
        screen.table(sweep_table(entries))
    if page is not None:
        log.info("report: %s", here(page))
    print(json.dumps(result), file=screen.stdout, flush=True)


def write_report(folder: Path, entries: Collection[Entry], screen: Screen) -> Path | None:
    """Write the page of `hass-report runs=<folder>` and return its path; None if no cell was measured."""
    if not any(entry.status == "completed" and "run_dir" in entry.result for entry in entries):
        return None
    from hass_lightning.report.study import load_runs, study_report
    from hass_lightning.report.study.analysis import analyse

    try:
        with screen.stage("report"), screen.without_tables():
            return study_report(analyse(load_runs(str(folder))), folder / "report", folder.name)["html"]
    except ValueError as error:
        log.warning("no report of the sweep: %s", error)
        return None
