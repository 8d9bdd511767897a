"""The YAML files of conf/ read as text: headers, keys with their comments, groups. Loads neither Hydra nor torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hass_lightning.runs.config_folder import config_folder

_KEY = re.compile(r"^(?P<indent> *)(?:- )?(?P<key>[\w/@~ ]+?):(?: +(?P<rest>.*))?$")
_COMMENT = re.compile(r"(?:^|\s)#\s*(.*)$")
_QUOTED = re.compile(r"""(?<=[\s\[{,])(?:'[^']*'|"[^"]*")""")


@dataclass(frozen=True)
class Key:
    """A key of a file with its literal value and trailing comment."""

    name: str  # dotted, from the top of the file
    value: str
    comment: str
    line: int  # from 1


@dataclass
class ConfFile:
    """A YAML file: its header comment, its keys, and the groups of its defaults list."""

    path: Path
    header: list[str] = field(default_factory=list)
    keys: dict[str, Key] = field(default_factory=dict)
    defaults: dict[str, Key] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first sentence of the header."""
        text = " ".join(line for line in self.header if line and not line.startswith(("hass-", "@package")))
        return re.split(r"(?<=[.?!])\s+(?=[A-Z`])", text, maxsplit=1)[0]

    @property
    def examples(self) -> list[tuple[str, str]]:
        """The example commands of the header, each with its comment."""
        lines = [line for line in self.header if line.startswith("hass-")]
        return [(command.strip(), text.strip()) for command, _, text in (line.partition(" # ") for line in lines)]


@cache
def read_conf(name: str) -> ConfFile:
    """Read `conf/<name>.yaml`.

    Raises:
        OSError: if there is no such file.
    """
    path = Path(config_folder()) / f"{name}.yaml"
    return parse_conf(path, path.read_text(encoding="utf-8"))


def parse_conf(path: Path, text: str) -> ConfFile:
    """Parse the text of a YAML file, line by line."""
    found = ConfFile(path)
    parents: list[tuple[int, str]] = []  # (indentation, key) of the parents of the current line
    in_header = True
    for number, line in enumerate(text.splitlines(), 1):
        if in_header and line.startswith("#"):
            found.header.append(line.lstrip("# ").rstrip())
            continue
        in_header = False
        comment = _COMMENT.search(_QUOTED.sub(lambda text: "_" * len(text[0]), line))  # a quoted # is no comment
        code = line[: comment.start()].rstrip() if comment else line.rstrip()
        match = _KEY.match(code)
        if not match or code.lstrip().startswith("#"):
            continue
        indent, key, value = len(match["indent"]), match["key"], (match["rest"] or "").strip()
        while parents and parents[-1][0] >= indent:
            parents.pop()
        words = line[comment.start(1) :].strip() if comment else ""
        if parents and parents[0][1] == "defaults":
            group = re.sub(r"^(override|optional) ", "", key).lstrip("/")
            found.defaults[group] = Key(group, value, words, number)
            continue
        parents.append((indent, key))
        if key != "defaults":
            dotted = ".".join(each for _, each in parents)
            found.keys[dotted] = Key(dotted, value, words, number)
    return found


def choices(group: str) -> list[str]:
    """Return the values of a group, without files that only other files include."""
    folder = Path(config_folder()) / group
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    sub_groups = {path.name for path in folder.iterdir() if path.is_dir()} if group != "experiment" else set()
    return sorted(name for name in names if name.split("/")[0] not in sub_groups and name.split("/")[-1] != "base")


@cache
def groups_of(command: str) -> dict[str, Key]:
    """Return the config groups of a command, including nested ones (`model/loss`), with default value and comment."""
    found: dict[str, Key] = {}
    for group, key in read_conf(command).defaults.items():
        if not (Path(config_folder()) / group).is_dir():
            continue
        found[group] = key
        if (Path(config_folder()) / group / "default.yaml").exists() and key.value == "default":
            for sub, below in read_conf(f"{group}/default").defaults.items():
                if (Path(config_folder()) / group / sub).is_dir():
                    found[f"{group}/{sub}"] = below
    for line in re.findall(r"^  - (\w+)", read_conf(command).path.read_text(), re.MULTILINE):
        if line != command and (Path(config_folder()) / f"{line}.yaml").exists() and line not in found:
            found = groups_of(line) | found  # `- train`: this command has the groups of that one
    return found


@cache
def find_key(command: str, name: str, chosen: tuple[tuple[str, str], ...] = ()) -> tuple[str, Key] | None:
    """Return the file of conf/ that defines a key of a command (as `model/default`) and the key; None if unknown.

    Args:
        command: name of the command.
        name: dotted config key.
        chosen: groups with their values, where these are not the defaults.
    """
    places = [command, *(["train"] if "experiment" in groups_of(command) else [])]
    for place in places:
        if (key := read_conf(place).keys.get(name)) is not None:
            return place, key
    values = {group: key.value for group, key in groups_of(command).items()} | dict(chosen)
    for group, value in sorted(values.items(), key=lambda item: -len(item[0])):
        prefix = group.replace("/", ".") + "."
        if name.startswith(prefix) and (found := _below(group, value, name.removeprefix(prefix))):
            return found
    return None


def comment_of(command: str, name: str, chosen: tuple[tuple[str, str], ...] = ()) -> str:
    """Return the comment of a key, with arguments as in `find_key`; empty for a key or config outside of conf/."""
    try:
        found = find_key(command, name, chosen)
    except OSError:
        return ""
    return found[1].comment if found else ""


def default_value(command: str, name: str) -> str:
    """Return the literal default of a key: that of the default experiment, or else of its definition."""
    experiment = groups_of(command).get("experiment")
    own = read_conf(f"experiment/{experiment.value}").keys.get(name) if experiment else None
    found = find_key(command, name)
    return own.value if own else found[1].value if found else ""


def _below(group: str, value: str, rest: str) -> tuple[str, Key] | None:
    """Find a key in `conf/<group>/<value>.yaml` or in the files that it includes."""
    place = f"{group}/{value}"
    if not (Path(config_folder()) / f"{place}.yaml").exists():
        return None
    conf = read_conf(place)
    if rest in conf.keys:
        return place, conf.keys[rest]
    text = conf.path.read_text()
    for name in re.findall(r"^  - (\w+)\s*(?:#.*)?$", text, re.MULTILINE):
        if name != "_self_" and (found := _below(group, name, rest)):
            return found
    return None
