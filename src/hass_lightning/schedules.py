"""Schedules for numbers that change during training, such as a loss weight, K or the alignment depth.

Wherever a config accepts such a number, it also accepts a mapping from progress to value: `{0: 0, 0.8: 1}` is 0 for the
first 80 % of the run and 1 afterwards; `{0: 0, 0.5: 1, shape: linear}` increases linearly until the middle. Progress is
the optimizer step divided by the total number of steps, so a resumed run continues exactly as if uninterrupted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scheduled:
    """A number as a function of progress, constant or linear between points (progress, value)."""

    points: tuple[tuple[float, float], ...]
    linear: bool = False
    whole: bool = False  # round to an int

    def at(self, progress: float) -> float:
        """Return the value at `progress` in [0, 1]; constant before the first point and after the last."""
        position = bisect_right(self.points, progress, key=lambda point: point[0]) - 1
        start, value = self.points[max(0, position)]
        if self.linear and 0 <= position < len(self.points) - 1:
            end, following = self.points[position + 1]
            value += (following - value) * (progress - start) / (end - start)
        return round(value) if self.whole else value

    @property
    def values(self) -> tuple[float, ...]:
        """Values at the points; all other values lie between them."""
        return tuple(value for _, value in self.points)


def scheduled(key: str, value: Any, least: float | None = None, whole: bool = False) -> Scheduled:
    """Convert a number, or a mapping from progress to numbers, to `Scheduled`.

    Args:
        key: the config key, for error messages.
        value: the number or mapping.
        least: the smallest allowed value.
        whole: whether values must be integers.

    Raises:
        ValueError: if `value` is neither, a progress lies outside [0, 1], or a value is too small or not an integer.
    """
    points, shape = value, "steps"
    if isinstance(value, Mapping):
        points = dict(value)
        shape = str(points.pop("shape", "steps"))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        points = {0: value}
    try:
        pairs = sorted((float(progress), float(number)) for progress, number in points.items())
    except (AttributeError, TypeError, ValueError):
        pairs = []
    if not pairs or shape not in ("steps", "linear") or not all(0 <= progress <= 1 for progress, _ in pairs):
        raise ValueError(
            f"{key}={value} is neither a number nor a schedule such as {{0: 0, 0.8: 1}} or "
            "{0: 0, 0.5: 1, shape: linear} (progress from 0 to 1, then the value)."
        )
    for _, number in pairs:
        if least is not None and number < least:
            raise ValueError(f"{key}={value} must {'be at least ' + str(least) if least else 'not be negative'}.")
        if whole and number != int(number):
            raise ValueError(f"{key}={value} must be a whole number.")
    return Scheduled(tuple(pairs), shape == "linear", whole)
