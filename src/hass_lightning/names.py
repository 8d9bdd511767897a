"""File names from names (imported by every command at once, so it imports nothing heavy)."""

from __future__ import annotations

import re


def safe_name(name: str) -> str:
    """A name from outside as one file name: no separator, no leading dot, no control character."""
    return re.sub(r"[^\w.+=-]+", "_", name).lstrip(".") or "unnamed"
