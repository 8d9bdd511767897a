"""A finding: what was checked, the result, and how to fix a problem."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)
COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Args:
        check: name of the check, the same in every run.
        status: `ok`; `warning` if the run may be wrong; `error` if it will be.
        message: what was found, with numbers.
        cure: the command or key that fixes it (empty when ok, or if it is part of the message).
    """

    check: str
    status: Literal["ok", "warning", "error"]
    message: str
    cure: str = ""

    def line(self) -> dict[str, str]:
        """Return the finding for the JSON at the end."""
        return {"check": self.check, "status": self.status, "message": self.message, "cure": self.cure}


def ok(check: str, message: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check, "ok", message)


def warning(check: str, message: str, cure: str) -> Finding:
    """Return a finding that may make the run wrong."""
    return Finding(check, "warning", message, cure)


def error(check: str, message: str, cure: str = "") -> Finding:
    """Return a finding that will make the run wrong."""
    return Finding(check, "error", message, cure)


def run_check(check: Callable[..., Any], *args: Any, **options: Any) -> list[Finding]:
    """Return the findings of a check as a flat list; an exception becomes a finding, so that other checks still run.

    An exception for the user (`ValueError`, `OSError`) is an error. Any other exception is a warning, because it says
    that the check itself failed, not that the run will.
    """
    name = getattr(check, "__name__", "check").removeprefix("check_")
    try:
        found = check(*args, **options)
    except (ValueError, OSError) as failure:
        return [error(name, str(failure))]
    except Exception as failure:
        log.debug("traceback of the check %s", name, exc_info=True)
        return [
            warning(
                name, f"the check itself failed: {one_line(failure)}", "please report it; the other checks were run."
            )
        ]
    return [found] if isinstance(found, Finding) else list(found)


def one_line(failure: BaseException) -> str:
    """Return an exception with its type on one line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Return the number of findings by status."""
    found = Counter(finding.status for finding in findings)
    return {"num_ok": found["ok"], "num_warnings": found["warning"], "num_errors": found["error"]}


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings; errors and warnings with their fixes."""
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
