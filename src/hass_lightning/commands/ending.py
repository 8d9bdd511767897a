"""Final output of a command on a terminal: its result, the locations of files, and suggested next commands."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hass_lightning.runs.ledger import Entry
from hass_lightning.runs.names import axes_of, cell_label, short_keys, words_of


def show_ending(command: str, result: Mapping[str, Any], places: Mapping[str, str], stdout: TextIO) -> None:
    """Print the result of a command, the locations of its files and suggested next commands.

    Args:
        command: name of the command.
        result: the result, which is printed as one line of JSON without a terminal.
        places: further names and locations, such as the W&B run.
        stdout: stream to print to.
    """
    console = Console(file=stdout, highlight=False)
    table = tables(command, result)
    console.print()
    if table is not None:
        console.print(table)
    lines = list((locations(command, result) | dict(places)).items())
    print_pairs(console, lines)
    following = next_commands(command, result)
    if following:
        console.print(Text("Next", "bold"))
        for line in following:
            console.print(Text(f"  {line}"), soft_wrap=True)


def tables(command: str, result: Mapping[str, Any]) -> Table | None:
    """Return the table of a result; None for a command whose `locations` are the whole result."""
    if command == "train" and "acceptance_length" in result:
        return run_table(result)
    if command == "benchmark":
        return rows_table(result["rows"])
    if command == "report" and "cells" in result:
        return cells_table(result["cells"], result["metric"])
    return None


def run_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a run: τ and speedup with their intervals, and the number of questions."""
    table = plain_table("", ">measured", ">95 % interval", "")
    table.add_row("acceptance length τ", number(result["acceptance_length"]), interval(result, "acceptance_length"),
                  "tokens per target forward")  # fmt: skip
    table.add_row("speedup", f"{number(result['speedup'])}×", interval(result, "speedup"), "over autoregressive")
    if result.get("num_checked"):
        same = f"{result['num_identical']} of {result['num_checked']}"
        table.add_row("identical in float32", same, "", "greedy answers")
    table.add_row("training", minutes(result.get("train_seconds")), "", f"{result['num_prompts']} questions measured")
    return table


def plain_table(*names: str) -> Table:
    """Return a table without borders and line wrapping. A column named `>…` is right-aligned."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in names:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of `hass-benchmark`, with the columns in which its rows differ."""
    keys = [key for key in ("draft", "decoder", "benchmark", "temperature") if len({str(r[key]) for r in rows}) > 1]
    keys = keys or ["decoder"]
    table = plain_table(*keys, ">τ", ">interval", ">speedup", ">interval", ">questions")
    for row in rows:
        speed = row["speedup"]
        table.add_row(
            *(brief(row[key]) for key in keys), number(row["acceptance_length"]), interval(row, "acceptance_length"),
            "" if speed is None else f"{number(speed)}×", interval(row, "speedup"), str(row["num_prompts"]),
        )  # fmt: skip
    return table


def cells_table(cells: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """Return the table of the cells of `hass-report`."""
    table = plain_table("cell", ">τ", ">interval", ">seeds")
    best = max((cell["tau"] or 0 for cell in cells), default=0)
    for cell in cells:
        mark = " *" if cell["tau"] == best else ""
        table.add_row(
            f"{brief(cell['cell'])}{mark}", number(cell["tau"]), interval(cell, "tau"), str(cell["num_seeds"])
        )
    return table


def sweep_table(entries: Collection[Entry]) -> Table:
    """Return the table of a sweep: axes, τ and speedup with intervals, and the status of each cell."""
    axes = axes_of([entry.overrides for entry in entries])
    table = plain_table(*short_keys(axes).values(), ">τ", ">interval", ">speedup", ">interval", "")
    best = max((entry.result.get("acceptance_length") or 0 for entry in entries), default=0)
    for entry in entries:
        values, result = words_of(entry.overrides), entry.result
        speed = result.get("speedup")
        if entry.status != "completed":
            state = entry.status
        else:
            state = "best" if best and result.get("acceptance_length") == best else ""
        table.add_row(
            *(brief(values.get(axis, ""), 20) for axis in axes), number(result.get("acceptance_length")),
            interval(result, "acceptance_length"), "" if speed is None else f"{number(speed)}×",
            interval(result, "speedup"), state,
        )  # fmt: skip
    return table


def show_sweep_ending(entries: Collection[Entry], folder: str, page: Path | None, stdout: TextIO) -> None:
    """Print the table of a sweep, the errors of failed cells, the locations of files and suggested next commands."""
    console = Console(file=stdout, highlight=False)
    console.print()
    console.print(sweep_table(entries))
    axes = axes_of([entry.overrides for entry in entries])
    for entry in entries:
        if entry.status == "failed":
            label = cell_label(entry.overrides, axes) or Path(entry.folder).name
            console.print(Text(f"✗ {label}: {brief_reason(entry.error)}", "red"))
    pairs = [("sweep", here(folder)), *([("report", here(page))] if page else []), ("log", f"{here(folder)}/log.txt")]
    print_pairs(console, pairs)
    done = [entry for entry in entries if entry.status == "completed" and "run_dir" in entry.result]
    if done:
        best = max(done, key=lambda entry: entry.result.get("acceptance_length") or 0)
        run, sweep = (shlex.quote(here(path)) for path in (best.folder, folder))
        console.print(Text("Next", "bold"))
        for line in (
            f"hass-benchmark 'drafts=[{here(folder)}]' replay=true",
            f"hass-benchmark draft={run}",
            f"hass-report runs={sweep}",
        ):
            console.print(Text(f"  {line}"), soft_wrap=True)


def brief_reason(reason: str | None) -> str:
    """Return the first line of an error message."""
    return ((reason or "unknown error").splitlines() or [""])[0][:200]


def locations(command: str, result: Mapping[str, Any]) -> dict[str, str]:
    """Return the locations of files; for a command without a table, all values of its result."""
    if command == "train" and "heads" in result:
        folder = here(result["run_dir"])
        return {name: f"{folder}/{name}/report.html" for name in result["heads"]} | {"log": f"{folder}/log.txt"}
    if command == "train" and "run_dir" in result:
        folder = here(result["run_dir"])
        return {"report": f"{folder}/report.html", "head": f"{folder}/draft", "log": f"{folder}/log.txt"}
    if command == "benchmark":
        return {"report": f"{here(result['run_dir'])}/report.html"}
    if command == "report" and "files" in result:
        return {"page": here(result["files"]["html"])}
    return {
        name.replace("_", " "): brief(value, 60)
        for name, value in result.items()
        if name not in ("findings", "why") and not isinstance(value, Mapping)
    }


def next_commands(command: str, result: Mapping[str, Any]) -> list[str]:
    """Return up to three commands that are useful after this result."""
    if command == "train" and "heads" in result:
        folders = ",".join(f"{here(result['run_dir'])}/{name}" for name in result["heads"])
        return [f"hass-benchmark {shlex.quote(f'drafts=[{folders}]')} replay=true"]
    if command == "train" and "run_dir" in result:
        run = shlex.quote(here(result["run_dir"]))
        return [
            f"hass-benchmark draft={run} 'benchmarks=[mt_bench]'",
            f"hass-export draft={run} format=vllm output_dir=served",
            "hass-train -m model/loss=eagle,hass model.alignment.depth=1,3",
        ]
    if command == "prepare" and "train_features" in result:
        return ["hass-doctor", "hass-train", "hass-prepare cache=list"]
    if command == "import":
        head = shlex.quote(here(result["draft"]))
        return [f"hass-benchmark draft={head}", f"hass-export draft={head} format=vllm output_dir=served",
                f"hass-train init_from={head}"]  # fmt: skip
    return []


def print_pairs(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    """Print one line per name and value, with aligned values."""
    column = max((len(name) for name, _ in pairs), default=0) + 2
    for name, value in pairs:
        console.print(Text.assemble((f"{name:<{column}}", "dim"), value), soft_wrap=True)


def number(value: Any) -> str:
    """Format a number with two decimals; a dash if it is unknown."""
    known = isinstance(value, int | float) and not math.isnan(value)
    return f"{value:.2f}" if known else "–"


def interval(values: Mapping[str, Any], name: str) -> str:
    """Format an interval as `[2.26, 2.62]`; empty if it is unknown."""
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    return f"[{number(low)}, {number(high)}]" if "–" not in (number(low), number(high)) else ""


def minutes(seconds: Any) -> str:
    """Format seconds as `12 s` or `20.7 min`."""
    if not isinstance(seconds, int | float):
        return "–"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def here(path: Any) -> str:
    """Return a path relative to the working directory if it is inside of it."""
    text = str(path)
    relative = os.path.relpath(text) if Path(text).is_absolute() else text
    return text if relative.startswith("..") else relative


def brief(value: Any, longest: int = 32) -> str:
    """Shorten a value for a table. The end is kept, because folders differ there."""
    text = str(value)
    return text if len(text) <= longest else "…" + text[-longest + 1 :]
