"""Summary rows to one table, and that table to the terminal, Markdown, LaTeX, CSV and HTML.

A table is built once (`plain_table`, `paper_table`) and only then rendered, so that all outputs say the same.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from hass_lightning.measure.records import BASELINE

Row = Mapping[str, Any]
EMPTY = "–"
KEYS = ("draft", "decoder", "temperature", "top_p", "top_k", "rule", "target")  # what makes a line, with the benchmark
HEADERS = {"temperature": "T", "top_p": "top-p", "top_k": "top-k"}
MEAN = "mean"  # the group of the columns that average over benchmarks
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "τ": r"$\tau$"}
_LATEX |= {"×": r"$\times$", EMPTY: "--"} | {each: "\\" + each for each in "&%$#_{}"}


def is_number(value: Any) -> bool:
    """Whether there is something to print: neither None nor nan."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Cell:
    """A value, with the ends of its 95 % interval where it has one."""

    value: Any = None
    low: float | None = None
    high: float | None = None

    @property
    def has_interval(self) -> bool:
        """Whether both ends are known and differ (a baseline against itself has no spread)."""
        if self.low is None or self.high is None or not is_number(self.low) or not is_number(self.high):
            return False
        return not math.isclose(self.low, self.high)


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        header: what stands above it. name: its name in the CSV. group: a common header of neighbours ("" for none).
        digits: decimals. unit: behind the number. numeric: right-aligned, and intervals have CSV columns of their own.
    """

    header: str
    name: str
    group: str = ""
    digits: int = 2
    unit: str = ""
    numeric: bool = True
    interval: bool = False

    def number(self, cell: Cell) -> str:
        """The value alone."""
        if not self.numeric:
            return EMPTY if cell.value in (None, "") else str(cell.value)
        if not is_number(cell.value):
            return EMPTY
        least = 10**-self.digits
        if 0 < cell.value < least / 2:  # a p-value of 0.000 would be a claim
            return f"<{least:.{self.digits}f}{self.unit}"
        return f"{cell.value:.{self.digits}f}{self.unit}"

    def ends(self, cell: Cell) -> str:
        """The interval in brackets, or nothing."""
        if not cell.has_interval:
            return ""
        return f"[{cell.low:.{self.digits}f}, {cell.high:.{self.digits}f}]"

    def text(self, cell: Cell) -> str:
        """Value and interval."""
        return f"{self.number(cell)} {self.ends(cell)}".rstrip()


@dataclass(frozen=True)
class Table:
    """Columns and lines of cells, ready to be rendered."""

    columns: list[Column]
    lines: list[list[Cell]]
    caption: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Neighbouring columns with a common header: (header, number of columns)."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found

    @property
    def wide(self) -> bool:
        """Whether intervals stand below their values, for want of room."""
        return sum(column.interval for column in self.columns) > 3

    def _headers(self) -> list[str]:
        return [f"{column.group} {column.header}".lstrip() for column in self.columns]

    def rich(self) -> RichTable:
        """For the terminal; intervals stand below their values where the table is wide."""
        table = RichTable(title=self.caption or None, caption="\n".join(self.notes) or None, title_justify="left")
        for column in self.columns:
            header = f"{column.group}\n{column.header}" if column.group else column.header
            table.add_column(Text(header), justify="right" if column.numeric else "left", overflow="fold")
        for line in self.lines:
            texts = []
            for column, cell in zip(self.columns, line, strict=True):
                ends = column.ends(cell)
                between = "" if not ends else "\n" if self.wide else " "
                texts.append(Text.assemble(column.number(cell), between, (ends, "dim")))
            table.add_row(*texts)
        return table

    def markdown(self) -> str:
        """A GitHub table."""

        def line(cells: Sequence[str]) -> str:
            escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
            return f"| {' | '.join(escaped)} |"

        rule = [("---:" if column.numeric else "---") for column in self.columns]
        body = [line([c.text(cell) for c, cell in zip(self.columns, cells, strict=True)]) for cells in self.lines]
        return "\n".join([line(self._headers()), f"| {' | '.join(rule)} |", *body, *self._below()]) + "\n"

    def _below(self) -> list[str]:
        return ["", *self.notes] if self.notes else []

    def latex(self) -> str:
        """A booktabs tabular (`\\usepackage{booktabs}`); intervals are set small."""
        spec = "".join("r" if column.numeric else "l" for column in self.columns)
        head, rules, start = [], [], 1
        for name, width in self.groups:
            head.append(f"\\multicolumn{{{width}}}{{c}}{{{latex(name)}}}" if name else " & ".join([""] * width))
            if name:
                rules.append(f"\\cmidrule(lr){{{start}-{start + width - 1}}}")
            start += width
        lines = [f"\\begin{{tabular}}{{{spec}}}", r"\toprule"]
        if rules:
            lines += [" & ".join(head) + r" \\", " ".join(rules)]
        lines += [" & ".join(latex(column.header) for column in self.columns) + r" \\", r"\midrule"]
        for cells in self.lines:
            texts = []
            for column, cell in zip(self.columns, cells, strict=True):
                ends = column.ends(cell)
                texts.append(latex(column.number(cell)) + (f" {{\\scriptsize {ends}}}" if ends else ""))
            lines.append(" & ".join(texts) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in self.notes)]) + "\n"

    def csv(self) -> str:
        """Unrounded numbers; the ends of an interval are columns of their own."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names: list[str] = []
        lines: list[list[Any]] = [[] for _ in self.lines]
        for index, column in enumerate(self.columns):
            name = f"{column.group}_{column.name}".lstrip("_")
            names += [name, f"{name}_low", f"{name}_high"] if column.interval else [name]
            for line, cells in zip(lines, self.lines, strict=True):
                cell = cells[index]
                values = [cell.value, cell.low, cell.high] if column.interval else [cell.value]
                line += ["" if isinstance(v, float) and math.isnan(v) else v for v in values]
        writer.writerow(names)
        writer.writerows(lines)
        return out.getvalue()


def latex(text: str) -> str:
    """Escape a text for LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)


def line_keys(rows: Sequence[Row]) -> list[str]:
    """The keys that tell lines apart: the decoder always, others only where they differ."""

    def differs(key: str) -> bool:
        if key == "draft":  # a decoder without a head has none: that alone is no reason for a column
            seen = {row.get(key) for row in rows if row.get("draft")}
        elif key == "rule":  # greedy at temperature 0, of course
            seen = {row.get(key) for row in rows if row.get("temperature") and row.get("decoder") != BASELINE}
        else:
            seen = {row.get(key) for row in rows}
        return len(seen) > 1

    return [key for key in KEYS if key == "decoder" or differs(key)]


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows by temperature, then the baseline, decoders without a head, and the heads by name.

    A benchmark measures in random order, so that the order of its rows means nothing. Benchmarks stay as they come.
    """

    def place(row: Row) -> tuple:
        sampling = (row.get("temperature") or 0.0, row.get("top_p") or 1.0, row.get("top_k") or 0)
        decoder = str(row.get("decoder", ""))
        return (str(row.get("target") or ""), *sampling, decoder != BASELINE, str(row.get("draft") or ""), decoder)

    return sorted(rows, key=place)


def line_label(row: Row, keys: Sequence[str]) -> str:
    """`hass · dynamic_tree · T=1`: a line's name in a plot."""
    parts = []
    for key in keys:
        value = row.get(key)
        if value in (None, ""):
            continue
        named = key in HEADERS
        parts.append(f"{HEADERS[key]}={value:g}" if named and is_number(value) else str(value))
    return " · ".join(parts)


def _key_columns(keys: Sequence[str]) -> list[Column]:
    return [Column(HEADERS.get(key, key), key, numeric=False) for key in keys]


def _key_cells(row: Row, keys: Sequence[str]) -> list[Cell]:
    return [Cell(f"{row[key]:g}" if is_number(row.get(key)) else row.get(key)) for key in keys]


def value_cell(row: Row, name: str) -> Cell:
    """`row[name]` with `row[name_low]` and `row[name_high]`."""
    return Cell(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high"))


def share(num: Any, of: Any) -> str | None:
    """`6/6`, or None where nothing was compared."""
    return f"{num}/{of}" if is_number(num) and of else None


def plain_table(rows: Sequence[Row], caption: str = "") -> Table:
    """One line a row: τ, speedup, tokens per second, prompts, identical answers."""
    rows = in_order(rows)
    keys = line_keys(rows)
    if len({row.get("benchmark") for row in rows}) > 1:
        keys = [*keys, "benchmark"]
    columns = [
        *_key_columns(keys),
        Column("τ", "acceptance_length", interval=True),
        Column("speedup", "speedup", unit="×", interval=True),
        Column("tokens/s", "tokens_per_second", digits=1),
        Column("prompts", "num_prompts", digits=0),
    ]
    checks: dict[str, Callable[[Row], str | None]] = {
        "identical": lambda row: share(row.get("num_identical"), row.get("num_compared", row.get("num_prompts"))),
        "identical (fp32)": lambda row: share(row.get("num_fp32_identical"), row.get("num_checked")),
    }
    shown = {header: check for header, check in checks.items() if any(check(row) for row in rows)}
    columns += [Column(header, header.strip(")").replace(" (", "_"), numeric=False) for header in shown]
    lines = [
        [
            *_key_cells(row, keys),
            value_cell(row, "acceptance_length"),
            value_cell(row, "speedup"),
            Cell(row.get("tokens_per_second")),
            Cell(row.get("num_prompts")),
            *(Cell(check(row)) for check in shown.values()),
        ]
        for row in rows
    ]
    return Table(columns, lines, caption, ["τ: tokens per target forward, bonus token counted; [95 % interval]"])


def mean_cell(cells: Sequence[Cell]) -> Cell:
    """The mean over benchmarks, whose questions are independent: half-widths add in squares (MOVER).

    Zou and Donner 2008: the distance of the mean to its interval's end is the root of the summed squares of the parts'
    distances, over their number. One missing part leaves nothing: a mean over other benchmarks is another number.
    """
    n = len(cells)
    if not n or not all(is_number(cell.value) for cell in cells):
        return Cell()
    mean = sum(cell.value for cell in cells) / n
    if not all(is_number(cell.low) and is_number(cell.high) for cell in cells):
        return Cell(mean)
    below = math.sqrt(sum((cell.value - cell.low) ** 2 for cell in cells)) / n
    above = math.sqrt(sum((cell.high - cell.value) ** 2 for cell in cells)) / n
    return Cell(mean, mean - below, mean + above)


def paper_table(rows: Sequence[Row], caption: str = "") -> Table:
    """The paper's layout: a line a draft, decoder and temperature; speedup and τ of each benchmark and their mean."""
    benchmarks = list(dict.fromkeys(str(row.get("benchmark", "")) for row in rows))
    rows = in_order(rows)
    keys = line_keys(rows)
    names = ("speedup", "acceptance_length")
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row.get(key) for key in keys), {})[str(row.get("benchmark", ""))] = row
    groups = [*benchmarks, MEAN] if len(benchmarks) > 1 else benchmarks
    columns = _key_columns(keys)
    for group in groups:
        columns.append(Column("speedup", "speedup", group, unit="×", interval=True))
        columns.append(Column("τ", "acceptance_length", group, interval=True))
    body = []
    for by_benchmark in lines.values():
        cells = {(b, name): value_cell(by_benchmark.get(b, {}), name) for b in benchmarks for name in names}
        cells |= {(MEAN, name): mean_cell([cells[b, name] for b in benchmarks]) for name in names}
        first = next(iter(by_benchmark.values()))
        body.append([*_key_cells(first, keys), *(cells[group, name] for group in groups for name in names)])
    return Table(columns, body, caption, ["τ: tokens per target forward, bonus token counted; [95 % interval]"])
