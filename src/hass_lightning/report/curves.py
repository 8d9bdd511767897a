"""Training curves from the sparse CSV that Lightning's CSVLogger writes."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

Curve = list[tuple[int, float]]  # (step, value), in the order of steps
STEP = re.compile(r"(?P<stem>.+)/(?:step|depth)(?P<number>\d+)$")


def read_curves(run_dir: Path) -> dict[str, Curve]:
    """Return every logged metric as a curve, without cells that are empty or not finite.

    All `csv/**/metrics*.csv` are read, oldest first: a resumed run may have moved the part before the interruption to
    another file. If both contain a step, the newer file takes precedence.
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
    """Return the curves `<stem>/step1`, `<stem>/step2`, … by number."""
    matches = ((STEP.fullmatch(name), curve) for name, curve in curves.items())
    return dict(sorted((int(match["number"]), curve) for match, curve in matches if match and match["stem"] == stem))


def loss_terms(curves: dict[str, Curve]) -> list[str]:
    """Return the names of the loss terms logged by alignment step, in the order of the file."""
    names: dict[str, None] = {}
    for name in curves:
        match = STEP.fullmatch(name)
        split, _, term = match["stem"].partition("/") if match else ("", "", "")
        if split in ("train", "val") and term and term not in ("accuracy", "forced_accuracy", "survival"):
            names[term] = None
    return list(names)


def thin(curve: Curve, limit: int = 1500) -> Curve:
    """Return at most about `limit` points including the last one, to limit the size of a page."""
    stride = -(-len(curve) // limit)
    return curve if stride <= 1 else [*curve[:-1:stride], curve[-1]]


def smooth(curve: Curve, window: int) -> Curve:
    """Return the centered moving average over `window` points (fewer at the ends)."""
    kernel = np.ones(2 * max(0, min(window, len(curve) - 1) // 2) + 1)
    values = np.array([value for _, value in curve])
    means = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
    return [(step, value) for (step, _), value in zip(curve, means.tolist(), strict=True)]
