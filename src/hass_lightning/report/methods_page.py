"""The page of all methods, `experiments/heads.md`, from their result files (methods.py)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hass_lightning.measure.statistics import Interval
from hass_lightning.report.tables import Column, Table
from hass_lightning.runs.files import read_json_object, write_whole

Content = Mapping[str, Any]
INTRODUCTION = """# Heads

One line a method, from the result files in `experiments/heads/`. `hass-report table=experiments/heads` writes this
page; `CONTRIBUTING.md` says how to add a method.
"""


def write_methods_page(folder: Path) -> Path:
    """Write the page of all result files of a folder next to it: `experiments/heads.md` of `experiments/heads`."""
    path = folder.with_name(f"{folder.name}.md")
    write_whole(path, methods_page(folder))
    return path


def methods_page(folder: Path) -> str:
    """Return the page of the result files of a folder, as Markdown.

    Raises:
        ValueError: a file is damaged.
    """
    files = sorted(folder.glob("*.json"))
    methods = [read_json_object(path, "write it again with hass-report") for path in files]
    if not methods:
        return f"{INTRODUCTION}\nNo method has a result yet.\n"
    sections: dict[tuple[Any, ...], None] = {}
    for method in methods:
        for result in method["results"]:
            sections.setdefault(_section(result))
    parts = [INTRODUCTION]
    for section in sorted(sections, key=lambda each: (each[0], "tree" not in each[1], *map(str, each[1:]))):
        target, decoder, temperature, top_p, top_k = section
        cut = "".join(
            f", {name}={value:g}" for name, value in (("top-p", top_p), ("top-k", top_k)) if value not in (1, None)
        )
        parts += [f"## {target}, {decoder}, T={temperature:g}{cut}\n", _section_table(methods, section).markdown()]
    return "\n".join([*parts, "## Methods\n", _methods_table(methods).markdown()])


def _section(result: Content) -> tuple[Any, ...]:
    return tuple(result[key] for key in ("target", "decoder", "temperature", "top_p", "top_k"))


def _section_table(methods: Sequence[Content], section: tuple[Any, ...]) -> Table:
    """Return the methods that were measured in this way, the greatest mean τ first."""
    measured = []
    for method in methods:
        own = {each["benchmark"]: each for each in method["results"] if _section(each) == section}
        if own:
            measured.append((method, own))
    benchmarks = sorted({name for _, own in measured for name in own})
    conditions = [_conditions(method, own, benchmarks) for method, own in measured]
    usual = {key: Counter(each[key] for each in conditions).most_common(1)[0][0] for key in conditions[0]}
    lines = []
    for (method, own), mine in zip(measured, conditions, strict=True):
        taus = [own[name]["tau"][0] for name in benchmarks if name in own]
        line = {
            "method": method["method"],
            "seeds": len(method["seeds"]),
            "rows": method["rows"] and method["rows"] / 1e3,
            "tflops": method["flops"] and method["flops"] / 1e12,
            "mean": sum(taus) / len(taus) if len(taus) == len(benchmarks) else None,
            "differs": ", ".join(f"other {key}" for key, value in mine.items() if value != usual[key]),
        }
        for name in own:
            line |= {f"{name}_tau": _interval(own[name]["tau"]), f"{name}_speedup": _interval(own[name]["speedup"])}
        lines.append(line)
    lines.sort(key=lambda line: (line["mean"] is None, -(line["mean"] or 0), line["method"]))
    columns = [
        Column("method", "method", numeric=False),
        Column("mean τ", "mean"),
        *(Column(f"{name} τ", f"{name}_tau", interval=True) for name in benchmarks),
        *(
            Column(f"{name} speedup", f"{name}_speedup", unit="×", interval=True)
            for name in benchmarks
            if any(own[name]["speedup"] for _, own in measured if name in own)
        ),
        Column("seeds", "seeds", digits=0),
        Column("rows (k)", "rows", digits=0),
        Column("TFLOPs", "tflops"),
        Column("not comparable", "differs", numeric=False),
    ]
    counts = ", ".join(f"{name} {_counts([own[name] for _, own in measured if name in own])}" for name in benchmarks)
    notes = [
        "τ: tokens per target forward, bonus token counted; [95 % interval], over seeds if there are two or more, else "
        f"over questions (and then of these heads only). Questions: {counts}. Rows: loss positions read in training. "
        "Not comparable: what differs from most of the methods in this table. Speedups are comparable on one processor "
        "only."
    ]
    return Table.of(columns, lines, notes=notes)


def _conditions(method: Content, own: Mapping[str, Content], benchmarks: Sequence[str]) -> dict[str, str]:
    """Return what must be equal for two methods to be compared."""

    def of(*keys: str) -> str:
        return str([[own[name][key] for key in keys] for name in benchmarks if name in own])

    return {
        "rows": str(method["rows"]),
        "training data": str(method["data"]),
        "benchmarks": str(sorted(own)),
        "questions": of("questions"),
        "answer length": of("max_new_tokens"),
        "draft tree": of("settings"),
    }


def _counts(results: Sequence[Content]) -> str:
    numbers = sorted({result["num_questions"] for result in results})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _interval(values: Sequence[float | None] | None) -> Interval:
    return Interval(*(math.nan if value is None else value for value in values or [None] * 3))


def _methods_table(methods: Sequence[Content]) -> Table:
    """Return how each method was trained and measured."""
    lines = [
        {
            "method": method["method"],
            "command": " ".join(method["overrides"]),
            "seeds": ", ".join(map(str, method["seeds"])),
            "commit": ", ".join(method["commit"]),
            "processor": ", ".join(method["processor"]),
            "date": method["date"],
        }
        for method in methods
    ]
    names = ("method", "command", "seeds", "commit", "processor", "date")
    return Table.of(
        [Column(name if name != "command" else "hass-train …", name, numeric=False) for name in names], lines
    )
