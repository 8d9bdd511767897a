"""Colors of an answer in a terminal: text is colored by the number of tokens that its target forward produced."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

from hass_lightning.runs.files import write_whole
from hass_lightning.runs.names import counted
from hass_lightning.types import DecodeResult

STYLES = ("", "cyan", "green", "yellow", "bold magenta")  # for 1, 2, 3, 4 and 5 or more tokens
SVG_WIDTH = 90  # columns


def style_of(num_tokens: int) -> str:
    """Return the style of text whose target forward produced `num_tokens` tokens."""
    return STYLES[min(max(num_tokens, 1), len(STYLES)) - 1]


def shown(text: str) -> str:
    """Replace control characters, with which a model's answer could control the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", text)


def legend() -> Text:
    """Return the line that explains the colors."""
    text = Text("")
    text.append("tokens that came in one forward of the target: ", style="dim")
    for number, style in enumerate(STYLES, start=1):
        text.append(f" {number}{'+' if number == len(STYLES) else ''} ", style=style)
    return text


class Writer:
    """Writes colored text as it arrives. In a terminal, lines are wrapped at word boundaries."""

    def __init__(self, console: Console):
        self.console, self.column = console, 0
        self._word: list[tuple[str, str]] = []

    def write(self, text: str, style: str) -> None:
        """Write `text`. Its last word is held back until the word is complete."""
        if not self.console.is_terminal:
            self._print(text, "")
            return
        for part in re.split(r"(\s)", text):
            if part.isspace():
                self.flush()
                self._break() if part == "\n" or self.column >= self.console.width - 1 else self._print(part, "")
            elif part:
                self._word.append((part, style))

    def flush(self) -> None:
        """Write the word that is held back."""
        width = sum(cell_len(text) for text, _ in self._word)
        if self.column and self.column + width > self.console.width - 1:
            self._break()
        for text, style in self._word:
            self._print(text, style)
        self._word = []

    def end(self) -> None:
        """Write the rest and a newline."""
        self.flush()
        self._break()

    def _break(self) -> None:
        self.console.print()
        self.column = 0

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style), end="", soft_wrap=True)
        self.console.file.flush()
        self.column += cell_len(text)


def describe(decoder: Any) -> str:
    """Return the name and the settings of a decoder: `dynamic_tree, num_nodes 16, depth 4, width 4`."""
    settings = asdict(decoder) if is_dataclass(decoder) and not isinstance(decoder, type) else {}
    parts = [f"{key} {len(value) if isinstance(value, tuple | list) else value}" for key, value in settings.items()]
    return ", ".join([decoder.name, *parts])


def summary(result: DecodeResult, baseline: DecodeResult | None, decoder: Any) -> list[Text]:
    """Return the lines below an answer: τ, speed with and without the head, number of forwards, draft tree."""
    speed = f"{_number(result.tokens_per_second, 1)} tokens/s"
    if baseline is not None and not math.isnan(baseline.tokens_per_second):
        ratio = result.tokens_per_second / baseline.tokens_per_second
        speed += f", {_number(baseline.tokens_per_second, 1)} without the head ({_number(ratio, 2)}×)"
    count = f"{counted(len(result.token_ids), 'token')} in {counted(len(result.accepted) + 1, 'forward')}"
    lines = [f"τ {_number(result.acceptance_length, 2)} · {speed}", f"{count} · {describe(decoder)}"]
    return [Text(line, style="dim") for line in lines]


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def save_svg(path: str | Path, parts: Sequence[RenderableType], title: str) -> None:
    """Write a session as an SVG image of a terminal. The image refers to no external font."""
    console = Console(record=True, width=SVG_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for part in parts:
        console.print(part, highlight=False)
    svg = console.export_svg(title=title)
    write_whole(path, re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))
