"""Config and provenance of a run, read from its folder, without the paths of the machine on which it ran."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hass_lightning.runs.files import read_json

# an absolute path (or one under ~, or with a drive letter), but not the end of a URL, a relative path or an
# interpolation
_PATH = re.compile(r"(?<![\w.:/~\\}-])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\",;:\])}/\\]+[/\\])*([^\s'\",;:\])}/\\]*)")
_BLOCK = re.compile(r"^(paths|hydra):")


def without_paths(text: str) -> str:
    """Return the text with absolute paths reduced to their last part: `/home/me/runs/x` becomes `…/x`."""
    return _PATH.sub(lambda match: f"…/{match[1]}" if match[1] else "…", text)


def read_config(run_dir: Path) -> str:
    """Return `.hydra/config.yaml` without its paths; empty if there is none."""
    file = run_dir / ".hydra" / "config.yaml"
    if not file.is_file():
        return ""
    kept, skipping = [], False
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if line and not line[0].isspace():
            skipping = bool(_BLOCK.match(line))
        if not skipping:
            kept.append(without_paths(line))
    return "\n".join(kept).strip()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys; lists become tuples, so that every value can be compared and hashed."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flatten(value, f"{name}.")
        elif isinstance(value, list):
            found[name] = tuple(json.dumps(each) if isinstance(each, dict | list) else each for each in value)
        else:
            found[name] = value
    return found


def read_provenance(run_dir: Path) -> dict[str, str]:
    """Return `provenance.json` as text by name, without its paths and without None."""
    texts = {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in flatten(read_json(run_dir / "provenance.json")).items()
        if value is not None
    }
    return {name: without_paths(text) for name, text in texts.items()}
