"""Checks of config values. Each error names the key, the value and what to give instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def check_whole(key: str, value: Any, least: int, null: str = "") -> None:
    """Refuse all but whole numbers from `least` on.

    Args:
        null: what null means, if it is accepted.

    Raises:
        ValueError: naming the key.
    """
    if value is None and null:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key}={_shown(value)} cannot be used: give a whole number of at least {least}{_or(null)}.")


def check_number(key: str, value: Any, least: float = 0.0, most: float = math.inf, above: bool = False) -> None:
    """Refuse all but finite numbers in [least, most], or in (least, most] with `above`.

    Raises:
        ValueError: naming the key.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most or (above and value == least):
        upper = f" and at most {most:g}" if most < math.inf else ""
        lower = f"{'above' if above else 'of at least'} {least:g}"
        raise ValueError(f"{key}={_shown(value)} cannot be used: give a number {lower}{upper}.")


def check_numbers(key: str, values: Any) -> None:
    """Refuse all but a list of numbers of at least 0.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{key}={_shown(values)} cannot be used: give a list of numbers, such as [0.0, 1.0].")
    for value in values:
        check_number(key, value)


def check_text(key: str, value: Any, null: str = "") -> None:
    """Refuse all but texts that are not empty.

    Raises:
        ValueError: naming the key.
    """
    if not (value is None and null) and not (isinstance(value, str) and value):
        raise ValueError(f"{key}={_shown(value)} cannot be used: give a text{_or(null)}.")


def check_flag(key: str, value: Any) -> None:
    """Refuse all but true and false.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{key}={_shown(value)} cannot be used: it is true or false.")


def _shown(value: Any) -> Any:
    return "null" if value is None else list(value) if isinstance(value, tuple) else value


def _or(null: str) -> str:
    return f", or null: {null}" if null else ""
