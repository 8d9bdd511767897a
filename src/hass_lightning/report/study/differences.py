"""The differences between two runs in one line: config keys, code, data."""

from __future__ import annotations

from typing import Any

from hass_lightning.report.provenance_text import without_paths
from hass_lightning.report.study.runs import StudyRun, differing


def why_line(a: StudyRun, b: StudyRun) -> str:
    """Return `a and b differ in model.alignment.depth (1 → 3); code: the same commit …; data: the same features.`"""
    keys = differing([{**a.settings, "seed": a.seed}, {**b.settings, "seed": b.seed}])
    named = [f"{key} ({_short(one)} → {_short(other)})" for key, (one, other) in keys.items()]
    settings = f"differ in {', '.join(named)}" if named else "have the same config"
    return f"{a.name} and {b.name} {settings}; code: {_code(a, b)}; data: {_data(a, b)}."


def _short(value: Any) -> str:
    text = without_paths(str(value))
    return text if len(text) <= 60 else f"{text[:57]}…"


def _code(a: StudyRun, b: StudyRun) -> str:
    commits: list[Any] = [run.provenance.get("git_commit") for run in (a, b)]
    if None in commits:
        found = "commit not recorded for both"
    elif commits[0] == commits[1]:
        found = f"the same commit {commits[0][:10]}"
    else:
        found = f"commit {commits[0][:10]} → {commits[1][:10]}"
    dirty = [run.name for run in (a, b) if run.provenance.get("git_dirty")]
    if dirty:
        found += f" (with uncommitted changes: {', '.join(dirty)})"
    places = [
        {
            **(run.provenance.get("versions") or {}),
            "python": run.provenance.get("python"),
            "device": run.provenance.get("device"),
        }
        for run in (a, b)
    ]
    changed = [f"{name} {one} → {other}" for name, (one, other) in differing(places).items()]
    return f"{found}, {', '.join(changed)}" if changed else found


def _data(a: StudyRun, b: StudyRun) -> str:
    keys: list[Any] = [run.provenance.get("features") for run in (a, b)]
    if not all(keys):
        return "not recorded for both"
    changed = [f"{split} {one} → {other}" for split, (one, other) in differing(keys).items()]
    return f"other features ({', '.join(changed)})" if changed else "the same features"
