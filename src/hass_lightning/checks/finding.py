"""A finding: what was checked, how it stands, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        check: its name, the same in every run. status: `error` will spoil the run, `warning` may. message: what was
            found, with numbers. cure: the command or key that mends it (empty when ok, or when the message says it).
    """

    check: str
    status: Literal["ok", "warning", "error"]
    message: str
    cure: str = ""

    def line(self) -> dict[str, str]:
        """The finding in the JSON at the end."""
        return {"check": self.check, "status": self.status, "message": self.message, "cure": self.cure}


def ok(check: str, message: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", message)


def warning(check: str, message: str, cure: str) -> Finding:
    """May spoil the run."""
    return Finding(check, "warning", message, cure)


def error(check: str, message: str, cure: str = "") -> Finding:
    """Will spoil the run."""
    return Finding(check, "error", message, cure)


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """How many findings have each status."""
    found = Counter(finding.status for finding in findings)
    return {"num_ok": found["ok"], "num_warnings": found["warning"], "num_errors": found["error"]}


def show(findings: Sequence[Finding], console: Console) -> None:
    """The list, errors and warnings with their cures."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.message)
        if finding.cure:
            text.append(f"\n→ {finding.cure}", style="bold")
        table.add_row(Text(finding.status, style=COLOURS[finding.status]), Text(finding.check), text)
    console.print(table)
