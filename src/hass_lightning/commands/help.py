"""Help texts of the commands, built from the comments in conf/. Imports neither Hydra nor torch."""

from __future__ import annotations

import io
import re
import shutil
import sys
from importlib import metadata
from textwrap import wrap

from hass_lightning.commands.conf_text import Key, choices, comment_of, default_value, find_key, groups_of, read_conf

COMMANDS = ("train", "benchmark", "prepare", "doctor", "export", "import", "report", "generate")
VERSIONS = ("hass-lightning", "torch", "lightning", "transformers", "hydra-core", "wandb", "deepspeed")
# The keys shown in the help of a command. Their defaults and descriptions are read from conf/.
KEYS = {
    "train": (
        "model.alignment.depth", "model.loss.terms.top_k.k", "model.optimizer.lr", "trainer.max_epochs",
        "trainer.devices", "data.max_answer_tokens", "data.batch_size", "seed", "fresh", "plan",
    ),
    "prepare": (
        "data.max_length", "data.max_answer_tokens", "data.last_turn_only", "data.num_validation",
        "data.eight_bit_cache", "target.device", "paths.cache_dir", "cache", "prune_days", "plan",
    ),
    "benchmark": (
        "draft", "drafts", "decoders", "benchmarks", "temperatures", "limit", "max_new_tokens", "num_checked",
        "replay", "tune",
    ),
    "export": ("draft", "format", "output_dir", "dtype", "upload", "private", "num_threads"),
    "import": ("path", "revision", "output_dir"),
    "doctor": (
        "draft", "benchmarks", "num_samples", "overfit_steps", "data.max_length", "data.batch_size",
        "model.alignment.depth", "trainer.devices", "trainer.precision", "num_threads",
    ),
    "generate": (
        "draft", "prompt", "temperature", "max_new_tokens", "compare", "baseline_tokens", "record", "seed", "top_p",
        "decoding.num_nodes",
    ),
    "report": ("runs", "records", "baseline", "decoder", "output_dir", "why", "wandb", "wandb_project"),
}  # fmt: skip
NOT_SHOWN = ("callbacks", "paths", "hydra", "hydra/job_logging", "hydra/launcher", "model", "local")
SCREEN_OPTIONS = (
    ("output=json", "one JSON object on stdout and nothing else"),
    ("verbose=true", "also print the output of libraries (always in <run folder>/log.txt)"),
)


def print_any_text() -> None:
    """Print characters that are not in the encoding of the terminal as `?` instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


def shown_groups(command: str) -> list[tuple[str, Key, list[str]]]:
    """Return the groups in the help of a command: name, default, values. Includes lists of names (`benchmarks`)."""
    found = [(group, key, named(group)) for group, key in groups_of(command).items() if group not in NOT_SHOWN]
    found = [(group, key, names) for group, key, names in found if len(names) > 1]
    for name in KEYS.get(command, ()):
        place = find_key(command, name)
        folder = re.match(r"names in conf/(\w+)", place[1].comment) if place else None
        if place and folder:
            found.append((name, place[1], named(folder[1])))
    return found


def named(group: str) -> list[str]:
    """Return the values of a group, without `default`."""
    return [name for name in choices(group) if name != "default"]


def help_text(command: str, width: int | None = None) -> str:
    """Return the output of `hass-<command> --help`.

    Args:
        command: name of the command.
        width: width in characters (None: that of the terminal, between 80 and 100).
    """
    width = width or max(80, min(100, shutil.get_terminal_size((80, 24)).columns))
    conf = read_conf(command)
    prose = " ".join(line for line in conf.header if not line.startswith("hass-"))
    lines = [f"hass-{command} [key=value | group=value] ...", *wrap(prose, width), "", "Examples"]
    longest = max((len(line) for line, _ in conf.examples if len(line) <= width // 2), default=0)
    for line, comment in conf.examples:
        text = f"  {line:{longest}}  {comment}".rstrip()
        lines.append(text if len(text) <= width else f"  {line}")
    groups = shown_groups(command)
    if groups:
        lines += ["", f"Groups (* is the default; `hass-{command} --help GROUP` explains the values)"]
        column = max(len(group) for group, _, _ in groups) + 2
        for group, key, names in groups:
            known = dict.fromkeys(re.sub("/.*", "/…", name) for name in names)  # a folder of files is one value
            marked = ", ".join(f"{name}*" if name in re.findall(r"[\w/]+", key.value) else name for name in known)
            comment = key.comment.partition(";")[0]
            lines += folded(f"  {group:{column}}", f"{comment}: {marked}" if comment else marked, width)
    lines += ["", "Most used keys"]
    rows = [(name, default_shown(command, name), meaning(command, name)) for name in KEYS[command]]
    first, second = (max(len(row[index]) for row in rows) + 2 for index in (0, 1))
    lines += [cut(f"  {name:{first}}{value:{second}}{comment}", width) for name, value, comment in rows]
    lines += ["", "All commands"]
    lines += [cut(f"  {option:14}{text}", width) for option, text in SCREEN_OPTIONS]
    lines += ["", f"Composed config: hass-{command} --cfg job; Hydra's options: --hydra-help."]
    lines += ["All keys are documented in conf/, common tasks in docs/tasks/."]
    return "\n".join(lines)


def group_text(command: str, group: str) -> str | None:
    """Return the values of a group, each with the first sentence of its file; None if the command has no such group."""
    found = {name: names for name, _, names in shown_groups(command)}
    if group not in found:
        return None
    folder = {"decoders": "decoding", "benchmarks": "benchmark"}.get(group, group)
    width = max(80, min(100, shutil.get_terminal_size((80, 24)).columns))
    names = found[group]
    column = max(len(name) for name in names) + 2
    return "\n".join(
        line for name in names for line in folded(f"  {name:{column}}", read_conf(f"{folder}/{name}").summary, width)
    )


def default_shown(command: str, name: str) -> str:
    """Return the default of a key as shown in the help: both values of `by_machine`, `required` for `???`."""
    value = default_value(command, name)
    value = re.sub(r"\$\{hass\.by_machine:(\S+?),(\S+?)\}", r"\1 or \2", value)
    value = re.sub(r"\$\{oc\.env:\w+,(\w+)\}", r"\1", value)
    return "required" if value == "???" else value or "(a node)"


def meaning(command: str, name: str) -> str:
    """Return the first clause of the comment of a key."""
    return re.split(r"; |\. ", comment_of(command, name))[0]


def folded(head: str, text: str, width: int) -> list[str]:
    """Wrap `text` after `head`, with a hanging indent."""
    first, *rest = wrap(text, max(20, width - len(head)), break_long_words=False) or [""]
    return [head + first, *(" " * len(head) + line for line in rest)]


def cut(line: str, width: int) -> str:
    """Shorten a line to `width` at a word boundary."""
    return line if len(line) <= width else line[: width - 1].rsplit(" ", 1)[0].rstrip(",;:") + "…"


def overview() -> str:
    """Return the output of `hass`: the commands and the versions."""
    lines = ["Train draft heads for speculative decoding with HASS and measure them.", ""]
    width = max(80, min(100, shutil.get_terminal_size((80, 24)).columns))
    for command in COMMANDS:
        lines += folded(f"  hass-{command:<11}", read_conf(command).summary, width)
    lines += ["", "`hass-train --help` shows the help of a command; `hass train …` is the same as `hass-train …`.", ""]
    return "\n".join([*lines, *wrap(versions(), width)])


def versions() -> str:
    """Return the versions of this package and its main dependencies in one line."""
    found = []
    for package in VERSIONS:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def answer(command: str, words: list[str]) -> str | None:
    """Return the output of `--help` or `--version`; None if the command line has neither."""
    if command not in COMMANDS:
        return None
    if "--version" in words:
        return versions()
    if "--help" in words or "-h" in words:
        groups = [text for word in words if (text := group_text(command, word)) is not None]
        return groups[0] if groups else help_text(command)
    return None
