"""Conversations from JSON lines or a Hugging Face data set, in the ShareGPT or the OpenAI shape.

Anything that is not a conversation is skipped and counted by reason, never guessed at.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hass_lightning.target.model import TargetModel
from hass_lightning.target.source import local_path
from hass_lightning.types import Conversation, Message

log = logging.getLogger(__name__)
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
}
# a question, its answer, and any number of tool results, each row of them followed by what the assistant makes of it
ORDER = re.compile("(?:ut*a(?:t+a)*t*)*(?:ut*)?")


class SkippedConversation(ValueError):
    """A record that cannot be used; the message is the reason that the summary counts."""


def parse_conversation(record: Any, default_id: str) -> Conversation:
    """One record in the ShareGPT (`conversations`) or OpenAI (`messages`) shape.

    Raises:
        SkippedConversation: malformed, an unknown role, an empty message, or roles out of order.
    """
    if not isinstance(record, dict):
        raise SkippedConversation("not a JSON object")
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise SkippedConversation("no `messages` or `conversations` list")
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise SkippedConversation("a message is not an object")
        name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise SkippedConversation(f"unknown role {name!r}")
        calls = parse_tool_calls(turn.get("tool_calls")) if role == "assistant" else ()
        if content is None and calls:
            content = ""
        if not isinstance(content, str) or not (content.strip() or calls):
            raise SkippedConversation("an empty message")
        messages.append(Message(role, content, calls))  # type: ignore[arg-type]
    order = "".join(message.role[0] for message in messages if message.role != "system")
    if any(role == "system" for role in (m.role for m in messages[1:])):
        raise SkippedConversation("a system message after the first")
    if not order or not ORDER.fullmatch(order):
        raise SkippedConversation("roles out of order")
    return Conversation(
        id=str(record.get("id", default_id)),
        messages=tuple(messages),
        category=str(record.get("category", "")),
        finished=bool(record.get("finished", True)),
        split=str(record.get("split", "")),
    )


def parse_tool_calls(calls: Any) -> tuple[dict[str, Any], ...]:
    """OpenAI's `tool_calls`, the arguments as an object: templates write them as JSON themselves.

    Raises:
        SkippedConversation: another shape.
    """
    try:
        functions = [dict(call["function"]) for call in calls or ()]
        for function in functions:
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
        return tuple({"type": "function", "function": function} for function in functions)
    except (TypeError, KeyError, ValueError) as error:
        raise SkippedConversation("malformed tool_calls") from error


def open_text(path: Path):
    """A text file for reading, gzip or not."""
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def read_json_lines(path: str | Path) -> Iterator[Any]:
    """The records of a .jsonl, .jsonl.gz or .json file (a list); a line that is no JSON comes as None.

    Raises:
        ValueError: the file does not exist or cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"the data file {path} does not exist: set data.source.path (or benchmark.path) to a file.")
    try:
        with open_text(path) as file:
            if path.name.removesuffix(".gz").endswith(".json"):
                yield from json.load(file)
                return
            for line in file:
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError:
                        yield None
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the data file {path} cannot be read ({error}): is it {path.suffix}, whole, in UTF-8?"
        ) from error


def parse_all(records: Iterable[Any], where: str, limit: int | None = None) -> list[Conversation]:
    """All usable conversations of `records`; the skipped ones are counted in one log line.

    Raises:
        ValueError: nothing usable is left.
    """
    kept: list[Conversation] = []
    skipped: Counter[str] = Counter()
    for number, record in enumerate(records):
        if limit is not None and len(kept) >= limit:
            break
        try:
            kept.append(parse_conversation(record, f"{where}:{number}"))
        except SkippedConversation as reason:
            skipped[str(reason)] += 1
    if skipped:
        log.warning("%s: kept %d conversations, skipped %s", where, len(kept), dict(skipped))
    if not kept:
        raise ValueError(
            f"{where} holds no usable conversation ({dict(skipped) or 'it is empty'}). Expected one object a line with "
            "`messages` [{role, content}, …] or `conversations` [{from, value}, …]."
        )
    return kept


def with_system_prompt(conversations: list[Conversation], text: str | None) -> list[Conversation]:
    """The same conversations, led by a system message where they have none (None: as they are)."""
    if text is None:
        return conversations
    first = Message("system", text)
    return [c if c.messages[0].role == "system" else replace(c, messages=(first, *c.messages)) for c in conversations]


@dataclass(frozen=True)
class JsonLines:
    """Conversations of a JSON lines file (`path`; `package://` names a file shipped inside hass_lightning)."""

    path: str
    limit: int | None = None
    system_prompt: str | None = None

    def load(self, target: TargetModel) -> list[Conversation]:
        """Read and check the file."""
        path = local_path(self.path)
        return with_system_prompt(parse_all(read_json_lines(path), path.name, self.limit), self.system_prompt)


@dataclass(frozen=True)
class HubDataset:
    """Conversations of a Hugging Face data set (`pip install hass-lightning[data]`), or of a local folder of one."""

    path: str
    split: str = "train"
    revision: str | None = None
    limit: int | None = None
    system_prompt: str | None = None

    def load(self, target: TargetModel) -> list[Conversation]:
        """Read the data set through the `datasets` library.

        Raises:
            ValueError: it is not installed, or the data set cannot be reached.
        """
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "data from the hub needs the `datasets` library: pip install 'hass-lightning[data]'"
            ) from error
        from hass_lightning.target.source import _hub_answers

        offline = not Path(self.path).exists() and not _hub_answers()
        if offline:
            datasets.config.HF_HUB_OFFLINE = True  # what an earlier run left in the cache, without minutes of retries
        try:
            records = datasets.load_dataset(self.path, split=self.split, revision=self.revision)
        except OSError as error:
            if not offline:
                raise
            raise ValueError(
                f"the data set {self.path} is neither a local folder nor in the cache, and the Hugging Face hub cannot "
                "be reached: download it elsewhere and set data.source.path to the folder, or use data=jsonl with a "
                "file."
            ) from error
        return with_system_prompt(parse_all(records, self.path, self.limit), self.system_prompt)
