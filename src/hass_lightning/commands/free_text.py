"""Free text and paths on the command line: quoted for Hydra, so that a question or a folder may have commas."""

from __future__ import annotations

import re
from pathlib import Path

FREE_TEXT = ("prompt", "system", "record")  # keys of hass-generate


def quoted(argument: str) -> str:
    """An override with free text, quoted for Hydra unless it already is: `prompt=Why, and how?`."""
    key, _, value = argument.partition("=")
    if key not in FREE_TEXT or value in ("", "null") or re.fullmatch(r"(['\"]).*\1", value, re.DOTALL):
        return argument
    value = re.sub(r'(\\*)"', r'\1\1\\"', value.replace("${", "\\${"))
    value += "\\" * (len(value) - len(value.rstrip("\\")))  # before the closing quote a backslash counts half
    return f'{key}="{value}"'


def quoted_path(argument: str) -> str:
    """An override whose value is an existing file or folder with a comma: `draft=runs/sweeps/x/loss=hass,depth=3`."""
    key, _, value = argument.partition("=")
    if "," not in value or not key.isidentifier() or re.search(r"[\"'\[\]{}$\\]", value) or not Path(value).exists():
        return argument
    return f'{key}="{value}"'
