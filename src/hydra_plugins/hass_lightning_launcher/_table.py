"""Status table of a sweep: status, job, node and result of each cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hass_lightning.runs.ledger import Entry, Ledger

if TYPE_CHECKING:
    from ._pool import Cell

HEADER = ("cell", "status", "job", "node", "metric", "minutes", "")
LONGEST_REMARK = 100


def status_of(entry: Entry | None, cell: Cell) -> str:
    """Return the status of a cell's last entry; `missing` if there is none, or if it has another config."""
    if entry is None:
        return "missing"
    return "missing" if entry.config_hash != cell.config_hash and entry.status == "completed" else entry.status


def status_table(ledger: Ledger, cells: Iterable[Cell]) -> str:
    """Return one line per cell with aligned columns."""
    latest = ledger.latest()
    rows = [HEADER]
    for cell in cells:
        entry = latest.get(cell.id)
        metric = f"{entry.metric:.4g}" if entry and isinstance(entry.metric, int | float) else ""
        minutes = f"{entry.seconds / 60:.1f}" if entry and entry.seconds else ""
        remark = (entry.error or "").splitlines()[0][:LONGEST_REMARK] if entry and entry.error else ""
        place = (entry.job or "", entry.node or "") if entry else ("", "")
        rows.append((cell.folder.name, status_of(entry, cell), *place, metric, minutes, remark))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    used = [column for column in range(len(HEADER)) if any(row[column] for row in rows[1:])]
    lines = ("  ".join(row[column].ljust(widths[column]) for column in used).rstrip() for row in rows)
    return "\n".join(lines)


def status_counts(ledger: Ledger, cells: Mapping[str, Cell]) -> dict[str, Any]:
    """Return the number of cells with each status."""
    latest = ledger.latest()
    counts = Counter(status_of(latest.get(cell.id), cell) for cell in cells.values())
    return {"sweep_dir": str(ledger.folder.absolute()), "num_cells": len(cells)} | {
        f"num_{status}": number for status, number in sorted(counts.items())
    }
