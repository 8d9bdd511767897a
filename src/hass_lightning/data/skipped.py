"""Records that cannot be used: why, how many, and where they are."""

from __future__ import annotations

from collections import Counter

SHOWN = 5  # places that a summary names for each reason


class SkippedConversation(ValueError):
    """A record that cannot be used. Its message is the reason that the summary counts."""


class Skipped:
    """Skipped records, counted by reason, with the places of the first ones."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def add(self, reason: object, place: str) -> None:
        """Count one record.

        Args:
            reason: a SkippedConversation or its text. place: file and line, or whatever names the record.
        """
        self.counts[str(reason)] += 1
        places = self._places.setdefault(str(reason), [])
        if place and len(places) < SHOWN:
            places.append(place)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return ", ".join(f"{reason!r}: {count}{self._where(reason)}" for reason, count in self.counts.items())

    def _where(self, reason: str) -> str:
        places = self._places[reason]
        if not places:
            return ""
        more = self.counts[reason] - len(places)
        return f" ({', '.join(places)}{f' and {more} more' * bool(more)})"


def one_line(text: object, longest: int = 160) -> str:
    """The text on one line, cut to `longest` characters; lone surrogates, which cannot be printed, are escaped."""
    line = " ".join(str(text).encode(errors="backslashreplace").decode().split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
