"""Tables for the terminal, Markdown, LaTeX, CSV and HTML.

A table is built once (see summary_tables.py, record_tables.py and study/tables.py) and then rendered, so all outputs
agree.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from hass_lightning.measure.statistics import Interval

Row = Mapping[str, Any]
EMPTY = "–"
_LATEX: dict[str, str | int | None] = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "τ": r"$\tau$",
}
_LATEX |= {"×": r"$\times$", EMPTY: "--"} | {each: "\\" + each for each in "&%$#_{}"}


def is_number(value: Any) -> bool:
    """Return whether there is something to print: neither None nor nan."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Cell:
    """A value, with the ends of its 95 % interval if it has one."""

    value: Any = None
    low: float | None = None
    high: float | None = None

    @property
    def has_interval(self) -> bool:
        """Whether both ends are known and differ (the baseline compared with itself has no spread)."""
        return is_number(self.low) and is_number(self.high) and not math.isclose(self.low, self.high)  # type: ignore[arg-type]


def value_cell(row: Row, name: str) -> Cell:
    """Return `row[name]`: a cell, an `Interval`, or a value with its ends in `row[name_low]` and `row[name_high]`."""
    value = row.get(name)
    if isinstance(value, Interval):
        return Cell(value.value, value.low, value.high)
    return value if isinstance(value, Cell) else Cell(value, row.get(f"{name}_low"), row.get(f"{name}_high"))


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        header: the header.
        name: name in the CSV.
        group: common header of adjacent columns ("" for none).
        digits: number of decimals.
        unit: unit after the number.
        numeric: whether the column is right-aligned and has separate CSV columns for intervals.
    """

    header: str
    name: str
    group: str = ""
    digits: int = 2
    unit: str = ""
    numeric: bool = True
    interval: bool = False

    @property
    def key(self) -> str:
        """The key of this column's value in a row, and its header in the CSV."""
        return f"{self.group}_{self.name}".lstrip("_")

    def number(self, cell: Cell) -> str:
        """Return the value without its interval."""
        if not self.numeric:
            return EMPTY if cell.value in (None, "") else plain(cell.value)
        if not is_number(cell.value):
            return EMPTY
        least = 10**-self.digits
        if 0 < cell.value < least / 2:  # a p-value of 0.000 would be wrong
            return f"<{least:.{self.digits}f}{self.unit}"
        return f"{cell.value:.{self.digits}f}{self.unit}"

    def ends(self, cell: Cell) -> str:
        """Return the interval in brackets, or ""."""
        return f"[{cell.low:.{self.digits}f}, {cell.high:.{self.digits}f}]" if cell.has_interval else ""

    def text(self, cell: Cell) -> str:
        """Return value and interval."""
        return f"{self.number(cell)} {self.ends(cell)}".rstrip()

    def csv(self, cell: Cell) -> list[Any]:
        """Return the unrounded value, and the ends of its interval if the column has intervals."""
        values = [cell.value, cell.low, cell.high] if self.interval else [cell.value]
        if not self.numeric and cell.value is not None:
            values = [plain(cell.value)]
        return ["" if isinstance(value, float) and math.isnan(value) else value for value in values]


def plain(value: Any) -> str:
    """Return a value of a text column: `0.7`, not `0.70`."""
    return f"{value:g}" if is_number(value) else str(value)


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells."""

    columns: list[Column]
    lines: list[list[Cell]]
    caption: str = ""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, columns: list[Column], rows: Sequence[Row], caption: str = "", notes: Sequence[str] = ()) -> Table:
        """Build a table from rows, with the row's value under each column's key (see `value_cell`)."""
        lines = [[value_cell(row, column.key) for column in columns] for row in rows]
        return cls(columns, lines, caption, list(notes))

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Return adjacent columns with a common header: (header, number of columns)."""
        return [(name, len(list(columns))) for name, columns in groupby(column.group for column in self.columns)]

    @property
    def wide(self) -> bool:
        """Whether intervals are printed below their values to save width."""
        return sum(column.interval for column in self.columns) > 3

    def texts(self) -> list[list[tuple[str, str]]]:
        """Return number and interval of each cell."""
        return [
            [(column.number(cell), column.ends(cell)) for column, cell in zip(self.columns, line, strict=True)]
            for line in self.lines
        ]

    def rich(self) -> RichTable:
        """Render for the terminal; in a wide table, intervals are below their values."""
        table = RichTable(title=self.caption or None, caption="\n".join(self.notes) or None, title_justify="left")
        for column in self.columns:
            header = f"{column.group}\n{column.header}".lstrip()
            table.add_column(Text(header), justify="right" if column.numeric else "left", overflow="fold")
        between = "\n" if self.wide else " "
        for line in self.texts():
            table.add_row(*(Text.assemble(number, between if ends else "", (ends, "dim")) for number, ends in line))
        return table

    def markdown(self) -> str:
        """Render as a GitHub table."""

        def line(cells: Sequence[str]) -> str:
            escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
            return f"| {' | '.join(escaped)} |"

        header = line([f"{column.group} {column.header}".lstrip() for column in self.columns])
        rule = line(["---:" if column.numeric else "---" for column in self.columns])
        body = [line([f"{number} {ends}".rstrip() for number, ends in cells]) for cells in self.texts()]
        return "\n".join([header, rule, *body, *([""] if self.notes else []), *self.notes]) + "\n"

    def latex(self) -> str:
        """Render as a booktabs tabular (`\\usepackage{booktabs}`); intervals are small."""
        head, rules, start = [], [], 1
        for name, width in self.groups:
            head.append(f"\\multicolumn{{{width}}}{{c}}{{{latex(name)}}}" if name else " & ".join([""] * width))
            rules += [f"\\cmidrule(lr){{{start}-{start + width - 1}}}"] if name else []
            start += width
        body = [
            [latex(number) + (f" {{\\scriptsize {ends}}}" if ends else "") for number, ends in cells]
            for cells in self.texts()
        ]
        lines = [
            f"\\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in self.columns)}}}",
            r"\toprule",
            *([" & ".join(head) + r" \\", " ".join(rules)] if rules else []),
            " & ".join(latex(column.header) for column in self.columns) + r" \\",
            r"\midrule",
            *(" & ".join(cells) + r" \\" for cells in body),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join([*lines, *(f"% {note}" for note in self.notes)]) + "\n"

    def csv(self) -> str:
        """Render unrounded numbers; the ends of intervals are separate columns."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        ends = {False: ("",), True: ("", "_low", "_high")}
        writer.writerow([f"{column.key}{end}" for column in self.columns for end in ends[column.interval]])
        for line in self.lines:
            writer.writerow([v for column, cell in zip(self.columns, line, strict=True) for v in column.csv(cell)])
        return out.getvalue()


def latex(text: str) -> str:
    """Escape a text for LaTeX."""
    return text.translate(str.maketrans(_LATEX))
