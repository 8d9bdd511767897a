"""Files that must be whole or absent, whatever is killed in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` when all went well, else it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str, errors: str = "strict") -> None:
    """A text file in UTF-8; `errors` as in `str.encode`."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors=errors)
