"""Error messages for invalid overrides, with suggestions: at most six lines each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from textwrap import shorten
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from hass_lightning.commands.conf_text import choices, find_key, groups_of
from hass_lightning.runs.config_folder import config_folder

CLOSE = 0.6  # similarity of difflib, from 0 to 1


def terminal_width() -> int:
    """Return the width of the terminal, at most 110; 110 without a terminal."""
    return min(110, shutil.get_terminal_size((110, 24)).columns)


def explain(command: str, words: Sequence[str], error: HydraException) -> str:
    """Return the message for an error in composing a config, without the prefix `error:`.

    Args:
        command: name of the command.
        words: the arguments of the command line.
        error: Hydra's error.
    """
    text = str(error)
    if isinstance(error, OverrideParseException):
        return unreadable(command, words, error.override)
    if isinstance(error, MissingConfigException):
        return missing_choice(command, words, str(error.missing_cfg_file), list(error.options or ()))
    if match := re.match(r"Ambiguous value for argument '(.+?)'\n", text):
        key, _, value = match[1].partition("=")
        return f"{match[1]} has several values.\n  one run per value: add -m\n  one run with a list: '{key}=[{value}]'"
    if match := re.match(r"Could not override '(.+?)'", text):
        return unknown_key(command, words, match[1])
    if match := re.match(r"Could not append to config. An item is already at '(.+?)'", text):
        return f"+{match[1]}: the key exists already: leave out the +."
    if match := re.match(r"Could not delete from config. '(.+?)' does not exist", text):
        return unknown_key(command, words, match[1], "~")
    return "\n  ".join(text.splitlines()[:6])


def unreadable(command: str, words: Sequence[str], override: str) -> str:
    """Return the message for an argument that is not a valid override."""
    key, equals, value = override.partition("=")
    if not equals:
        known = [*every_key(command, [word for word in words if word != key]), *groups_known(command)]
        near = likely(key, known)[:1]
        lines = [f"{override}: the value is missing: write {near[0] if near else key}=VALUE."]
        lines += [f"  {described(command, words, name)}" for name in near]
        return "\n".join([*lines, f"  all options: hass-{command} --help"])
    return (
        f"{override}: the value cannot be parsed: is a bracket or a quote missing?\n"
        f"""  put it in quotes: '{key}="{value.strip("'")}"'\n  a list: '{key}=[1,2]'"""
    )


def missing_choice(command: str, words: Sequence[str], place: str, options: list[str]) -> str:
    """Return the message for a value of a group that has no file.

    Args:
        command: name of the command.
        words: the arguments of the command line.
        place: the missing file, as `data/nothing`.
        options: Hydra's list of values, for a group that is not in conf/.
    """
    groups = [group for group in groups_known(command) if place.startswith(f"{group}/")]
    group = max(groups, key=len, default=place.rpartition("/")[0])
    wanted = place.removeprefix(f"{group}/")
    names = [name for name in choices(group) if name != "default"] if group in groups_known(command) else options
    near = get_close_matches(wanted, names, 1, CLOSE)
    meant = f": did you mean {group}={near[0]}?" if near else "."
    lines = [f"{group}={wanted}: conf/{group}/{wanted}.yaml does not exist{meant}"]
    if names:
        lines.append(f"  values: {shorten(', '.join(names), 2 * terminal_width() - 40, placeholder=' …')}")
        lines.append(f"  descriptions: hass-{command} --help {group}")
    return "\n".join(lines)


def unknown_key(command: str, words: Sequence[str], key: str, sign: str = "") -> str:
    """Return the message for a key or group that the config does not have.

    Args:
        command: name of the command.
        words: the arguments of the command line.
        key: the unknown key.
        sign: prefix of the override (`~` to delete a key).
    """
    others = [word for word in words if word.lstrip("+~").partition("=")[0] != key and not word.startswith("-")]
    typed = next((word for word in words if word.lstrip("+~").partition("=")[0] == key), f"{sign}{key}")
    typed = shorten(typed, 60, placeholder=" …")
    value = "".join(typed.partition("=")[1:])
    known = [*every_key(command, others), *groups_known(command)]
    near = likely(key, known)
    asked = f": did you mean {' or '.join(f'{sign}{name}{value}' for name in near)}?" if near else "."
    lines = [f"{typed}: unknown key of hass-{command}{asked}"]
    for name in near[:2]:
        lines.append(f"  {described(command, others, name)}")
    if not near and (parent := existing_parent(key, known)):
        keys = [name.removeprefix(f"{parent}.") for name in known if name.startswith(f"{parent}.")]
        direct = dict.fromkeys(name.partition(".")[0] for name in keys)
        lines.append(f"  keys of {parent}: {shorten(', '.join(direct), 2 * terminal_width() - 60, placeholder=' …')}")
    lines.append(f"  all keys: hass-{command} --cfg job")
    return "\n".join(lines)


def likely(key: str, known: Sequence[str]) -> list[str]:
    """Return up to three similar keys: with the same or a similar last part, or similar as a whole."""
    separator = "/" if "/" in key else "."
    last = key.rpartition(separator)[2]
    same = [name for name in known if name == last or name.endswith((f".{key}", f"/{key}"))]
    near = get_close_matches(key, known, 1, 0.8)
    if not near and not same:
        same = [name for name in known if name.endswith(f".{last}") and name.partition(".")[0] == key.partition(".")[0]]
        near = get_close_matches(key, known, 1, CLOSE)
    return list(dict.fromkeys([*near, *same]))[: 3 if same and not near else 1]


def described(command: str, others: Sequence[str], name: str) -> str:
    """Return file, line, default and comment of a key, or the values of a group."""
    if name in groups_known(command):
        values = ", ".join(each for each in choices(name) if each != "default")
        return f"conf/{name}/: {shorten(values, terminal_width() - 30, placeholder=' …')}"
    pairs = [word.partition("=")[::2] for word in others]
    chosen = tuple((group, value) for group, value in pairs if group in groups_known(command))
    found = find_key(command, name, chosen)
    if found is None:
        return f"{name} is a node of the composed config"
    place, key = found
    comment = f"   # {key.comment}" if key.comment else ""
    return shorten(
        f"conf/{place}.yaml, line {key.line}: {name}={key.value}{comment}", terminal_width() - 10, placeholder=" …"
    )


def groups_known(command: str) -> list[str]:
    """Return the groups of a command; empty for a config of another package."""
    try:
        return list(groups_of(command))
    except OSError:
        return []


def every_key(command: str, words: Sequence[str]) -> list[str]:
    """Return all dotted keys of the config that the valid arguments compose."""
    GlobalHydra.instance().clear()
    for chosen in (list(words), []):
        try:
            with initialize_config_dir(config_folder(), version_base="1.3"):
                config = compose(command, overrides=[word for word in chosen if "," not in word])
        except (HydraException, OSError):
            continue
        content: Any = OmegaConf.to_container(config, resolve=False)
        return list(dotted(content))
    return []


def dotted(content: dict[Any, Any], parent: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested dictionaries."""
    for name, value in content.items():
        key = f"{parent}{name}"
        yield key
        if isinstance(value, dict):
            yield from dotted(value, f"{key}.")


def existing_parent(key: str, known: Sequence[str]) -> str:
    """Return the longest prefix of a key that is a known key; empty if there is none."""
    parts = key.split(".")
    beginnings = [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
    return next((each for each in beginnings if each in known), "")
