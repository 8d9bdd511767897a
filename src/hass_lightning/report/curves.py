"""Training curves from the sparse CSV that Lightning's CSVLogger writes."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

Curve = list[tuple[int, float]]  # (step, value), steps ascending
STEP = re.compile(r"(?P<stem>.+)/(?:step|depth)(?P<number>\d+)$")


def read_curves(run_dir: Path) -> dict[str, Curve]:
    """Every logged metric as a curve; cells that are empty or no finite number are left out.

    All `csv/**/metrics*.csv` are read, oldest first: a resumed run may have put the part before the kill aside, and
    where both hold a step the newer file wins.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    files = sorted((run_dir / "csv").glob("**/metrics*.csv"), key=lambda path: (path.stat().st_mtime, path.name))
    for file in files:
        with file.open(newline="", encoding="utf-8", errors="replace") as lines:
            for row in csv.DictReader(lines):
                step = _number(row.get("step"))
                if step is None:
                    continue
                for name, text in row.items():
                    if name and name not in ("step", "epoch") and (value := _number(text)) is not None:
                        found[name][int(step)] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def by_step(curves: dict[str, Curve], stem: str) -> dict[int, Curve]:
    """The curves `<stem>/step1`, `<stem>/step2`, … by their number."""
    found = {}
    for name, curve in curves.items():
        match = STEP.fullmatch(name)
        if match and match["stem"] == stem:
            found[int(match["number"])] = curve
    return dict(sorted(found.items()))


def loss_terms(curves: dict[str, Curve]) -> list[str]:
    """Names of the loss terms that were logged by alignment step, in the order of the file."""
    names: dict[str, None] = {}
    for name in curves:
        match = STEP.fullmatch(name)
        split, _, term = match["stem"].partition("/") if match else ("", "", "")
        if split in ("train", "val") and term and term not in ("accuracy", "forced_accuracy", "survival"):
            names[term] = None
    return list(names)


def thin(curve: Curve, limit: int = 1500) -> Curve:
    """At most about `limit` points, the last one among them: a page need not hold every step of a long run."""
    stride = -(-len(curve) // limit)
    return curve if stride <= 1 else [*curve[:-1:stride], curve[-1]]


def smooth(curve: Curve, window: int) -> Curve:
    """Centred moving average over `window` points (fewer at the ends)."""
    half = max(0, window // 2)
    sums = [0.0, *accumulate(value for _, value in curve)]
    result = []
    for index, (step, _) in enumerate(curve):
        start, end = max(0, index - half), min(len(curve), index + half + 1)
        result.append((step, (sums[end] - sums[start]) / (end - start)))
    return result
