"""Atomic writing of files, and reading of JSON objects and logs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, which replaces `path` on success and is removed on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str, errors: str = "strict") -> None:
    """Write a UTF-8 text file atomically; `errors` as in `str.encode`."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: str | Path, content: Any) -> Any:
    """Write `content` as JSON, with null for nan and infinity, which JSON does not have. Return what was written."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_whole(path, json.dumps(plain, indent=2) + "\n")
    return plain


def read_tail(path: Path, size: int, start: int = 0) -> str:
    """Return the last `size` bytes of a text file, but nothing before the offset `start`."""
    with open(path, "rb") as file:
        file.seek(max(start, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_object(file: Path, fix: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: the file.
        fix: how to fix a damaged file, as the end of the error message.

    Raises:
        ValueError: the content is not valid JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): {fix}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains a {type(content).__name__} instead of an object: {fix}.")
    return content
