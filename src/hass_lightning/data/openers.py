"""Beginnings of the questions that a target generates. They depend only on the number of the conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from hass_lightning.data.order import hash_of
from hass_lightning.target_model.source import local_path

PLAIN = "general"  # category of conversations without an opener


class Opener(NamedTuple):
    """The first words of a user turn (may be empty) and their category."""

    text: str
    category: str


def read_openers(path: str | None) -> dict[str, list[str]]:
    """Read beginnings by category from a YAML file (`package://`: a file of the package). None gives an empty dict.

    Raises:
        ValueError: the file is missing or has another structure.
    """
    if path is None:
        return {}
    file = local_path(path)
    if not file.is_file():
        raise ValueError(f"data.source.openers={path} does not exist: give a YAML file, or null for none.")
    found: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    lists = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(each, list) and each and all(isinstance(text, str) for text in each) for each in lists):
        raise ValueError(f"data.source.openers={path} must map each category to a list of texts.")
    openers: dict[str, list[str]] = found
    return openers


class Openers:
    """The opener of conversation 0, 1, 2, …: the categories alternate, and so do the lines of each, in a seeded order.

    Args:
        openers: beginnings by category. plain_share: share of conversations without an opener, spread evenly.
    """

    def __init__(self, openers: Mapping[str, Sequence[str]], plain_share: float, seed: int):
        self.plain_share = plain_share if openers else 1.0
        self._lines = [
            [Opener(text, name) for text in sorted(texts, key=lambda text: hash_of(seed, "opener", text))]
            for name, texts in openers.items()
        ]
        self._plain = Opener("", PLAIN if openers else "")

    def __getitem__(self, number: int) -> Opener:
        before, after = (int((number + n) * self.plain_share + 1e-9) for n in (0, 1))
        if after > before:
            return self._plain
        turn, category = divmod(number - before, len(self._lines))
        return self._lines[category][turn % len(self._lines[category])]


def num_turns(number: int, shares: Sequence[float], seed: int) -> int:
    """Return the random number of turns of conversation `number`: a share `shares[n]` of all has n + 1 turns."""
    drawn = hash_of(seed, "turns", number) / 2**56 * sum(shares)
    total = 0.0
    for count, share in enumerate(shares, start=1):
        total += share
        if drawn < total:
            return count
    return len(shares)
