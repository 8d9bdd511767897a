"""Names of files and run folders. Imported by every command at startup, so it must import nothing slow."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

LONGEST_NAME = 100  # in characters; file systems allow 255 bytes
# Keys that locate, log or repeat a cell of a sweep, or name the sweep; they are not part of the name of a cell's
# folder.
NOT_IN_CELL = ("study", "hparams_search", "fresh", "logger", "paths", "plan", "status", "estimate")
NO_LABEL = (
    "experiment",
    "name",
    "study",
    "budget",
    "hparams_search",
    "fresh",
    "logger",
    "paths",
    "trainer",
    "callbacks",
)

MAX_NAME = 120  # in bytes; file systems allow 255, and names get suffixes


def safe_name(name: str) -> str:
    """Convert a name from outside to a file name without separator, leading dot or control character."""
    return re.sub(r"[^\w.+=-]+", "_", name).lstrip(".") or "unnamed"


def split_overrides(overrides: str) -> list[str]:
    """Split an override_dirname at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in overrides:
        if character in "\"'" and quote in ("", character):
            quote = "" if quote else character
        depth += 0 if quote else (character in "[{(") - (character in "]})")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def short(name: str) -> str:
    """Return a name of at most `MAX_NAME` characters; a longer one is truncated and made unique by a hash."""
    if len(name.encode()) <= MAX_NAME:
        return name
    return f"{name.encode()[: MAX_NAME - 9].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_name(overrides: str) -> str:
    """Return the name of a run folder, given its overrides: `<experiment>-<hash>`, the same for the same command."""
    parts = split_overrides(overrides)
    chosen = dict(part.lstrip("+").split("=", 1) for part in parts if "=" in part)
    given = "" if chosen.get("name") == "null" else chosen.get("name")
    stem = short(safe_name(Path(given or chosen.get("experiment") or "quickstart").name))
    rest = ",".join(
        sorted(part for part in parts if not part.startswith(("name=", "fresh=", "plan=", "status=", "estimate.")))
    )
    if rest in ("", f"experiment={stem}"):
        return stem
    return f"{stem}-{hashlib.sha256(rest.encode()).hexdigest()[:8]}"


def run_label(name: object, overrides: str) -> str:
    """Return a readable name such as `smoke loss=hass depth=3 seed=0`, with the last parts of the keys of overrides."""
    words = [] if name is None else [str(name)]
    for part in split_overrides(overrides):
        key, _, value = part.partition("=")
        if key.split(".")[0] not in NO_LABEL:
            words.append(f"{re.split('[./@]', key)[-1]}={value}" if value else key)
    return " ".join(words)[:120] or "run"


def counted(number: int, noun: str) -> str:
    """Return a count with its noun: `1 run`, `2 runs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shortened(name: str, content: Iterable[str]) -> str:
    """Return `name`, or its beginning and a hash of `content` if it is longer than `LONGEST_NAME`."""
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256("\n".join(content).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9].rstrip(',_')}-{digest}"


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return each key's last part, or as many last parts as make it unique among these keys: `model/loss` is `loss`."""
    parts = {key: re.split("[./@]", key) for key in keys}
    short = {}
    for key, own in parts.items():
        lengths = range(1, len(own) + 1)
        unique = (n for n in lengths if sum(other[-n:] == own[-n:] for other in parts.values()) == 1)
        short[key] = ".".join(own[-next(unique, len(own)) :])
    return short


def words_of(overrides: Iterable[str]) -> dict[str, str]:
    """Return the values of overrides by their keys, without the `+` of an added key."""
    return {key: value for key, _, value in (override.lstrip("+").partition("=") for override in overrides)}


def axes_of(cells: Iterable[Sequence[str]]) -> list[str]:
    """Return the keys in which the overrides of the cells of a sweep differ."""
    words = [words_of(overrides) for overrides in cells]
    keys = dict.fromkeys(key for each in words for key in each)
    return [key for key in keys if len({each.get(key) for each in words}) > 1]


def cell_label(overrides: Sequence[str], axes: Sequence[str]) -> str:
    """Return the values of a cell on the axes of its sweep: `loss=hass,depth=3`; empty without axes."""
    words, short = words_of(overrides), short_keys(axes)
    return ",".join(f"{short[axis]}={words.get(axis, '')}" for axis in axes)


def cell_folder(overrides: Sequence[str]) -> str:
    """Return the folder name of a sweep's cell, from its task overrides in their order: `loss=hass,depth=3,seed=0`.

    Letters, digits and `.+-` of values are kept; any other sequence of characters becomes one underscore:
    `step_weights=[1.0,0.8]` is `step_weights=1.0_0.8`. A deleted key is `no_<key>`. A name that is too long is
    truncated and ends in a hash.
    """
    named = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if re.split("[./@]", key)[0] not in NOT_IN_CELL:
            named.append((override, key, value))
    short = short_keys(dict.fromkeys(key for _, key, _ in named))
    words = []
    for override, key, value in named:
        if override.startswith("~"):
            words.append(f"no_{short[key]}")
        else:
            words.append(f"{short[key]}=" + re.sub(r"[^A-Za-z0-9.+-]+", "_", value).strip("_"))
    return shortened(",".join(words) or "defaults", overrides)
