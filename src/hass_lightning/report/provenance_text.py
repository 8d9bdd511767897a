"""What a run was made from, read from its folder, without the paths of the machine it ran on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# an absolute path (or one under ~, or with a drive letter), not the tail of a URL, a relative path or an interpolation
_PATH = re.compile(r"(?<![\w.:/~\\}-])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\",;:\])}/\\]+[/\\])*([^\s'\",;:\])}/\\]*)")
_BLOCK = re.compile(r"^(paths|hydra):")


def without_paths(text: str) -> str:
    """Absolute paths cut to their last part: `/home/me/runs/x` becomes `…/x`."""
    return _PATH.sub(lambda match: f"…/{match[1]}" if match[1] else "…", text)


def read_config(run_dir: Path) -> str:
    """`.hydra/config.yaml` without its paths; empty where there is none."""
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


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where it is missing or damaged (a report must not fail for it)."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
