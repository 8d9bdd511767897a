"""Conversations from JSON lines or a Hugging Face data set, in the layouts of layouts.py, or questions without answers.

A record that cannot be used is skipped, counted by reason and named by its line.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hass_lightning.data.hub import load_rows
from hass_lightning.data.layouts import check_columns, how_to_map, turns_of, with_columns
from hass_lightning.data.records import read_records
from hass_lightning.data.skipped import Skipped, SkippedConversation, one_line
from hass_lightning.data.turns import parse_tools, parse_turn
from hass_lightning.data.values import check_text, check_whole
from hass_lightning.target_model.model import TargetModel
from hass_lightning.target_model.source import local_path
from hass_lightning.types import Conversation, Message

log = logging.getLogger(__name__)
Columns = Mapping[str, str | None]
# a question, its answer, and any number of tool results, each row of them followed by what the assistant makes of it
ORDER = re.compile("(?:ut*a(?:t+a)*t*)*(?:ut*)?")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
}
NAMED_SPLITS = {word: split for split, words in SPLITS.items() for word in words}


def parse_conversation(record: Any, default_id: str, columns: Columns | None = None, place: str = "") -> Conversation:
    """One record to a conversation; a null value counts as not given.

    Args:
        default_id: the id of a record without one. columns: names of the columns to read (layouts.py). place: file and
            line, kept for messages.

    Raises:
        SkippedConversation: malformed, an unknown role, an empty message, or roles out of order.
    """
    if not isinstance(record, dict):
        raise SkippedConversation("not a JSON object")
    record = with_columns(record, columns)
    turns, only_questions = turns_of(record)
    messages = [parse_turn(turn) for turn in turns]
    if any(message.role == "system" for message in messages[1:]):
        raise SkippedConversation("a system message after the first")
    order = "".join(message.role[0] for message in messages if message.role != "system")
    if not order or not (only_questions or ORDER.fullmatch(order)):
        raise SkippedConversation("roles out of order")
    conversation = Conversation(
        id=_text(record, "id", default_id),
        messages=tuple(messages),
        category=_text(record, "category"),
        finished=_finished(record.get("finished")),
        split=_split(record.get("split")),
        tools=parse_tools(record.get("tools", record.get("functions"))),
        place=place,
    )
    if not _is_unicode(conversation):
        raise SkippedConversation("a lone surrogate (half of a character)")
    return conversation


def _is_unicode(conversation: Conversation) -> bool:
    """Whether all texts can be written as UTF-8: JSON escapes may hold half of a surrogate pair."""
    texts = [conversation.id, conversation.category]
    for message in conversation.messages:
        texts += [message.content, message.reasoning, message.tool_call_id, message.name]
    calls = [message.tool_calls for message in conversation.messages if message.tool_calls]
    if calls or conversation.tools:
        texts.append(json.dumps([calls, conversation.tools], ensure_ascii=False, default=str))
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(record: dict[str, Any], name: str, default: str = "") -> str:
    value = record.get(name)
    return default if value is None else str(value)


def _finished(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise SkippedConversation(f"finished={one_line(repr(value), 30)}, which is neither true nor false")


def _split(value: Any) -> str:
    """train, validation or test; "" if not given. `train_sft`, `valid` and the like are known."""
    if value is None or value == "":
        return ""
    word = re.split("[^a-z]", str(value).lower(), maxsplit=1)[0]
    if word not in NAMED_SPLITS:
        raise SkippedConversation(
            f"split={one_line(repr(value), 30)}, which is none of train, validation and test (ignore the column with "
            "'+data.source.columns={split: null}')"
        )
    return NAMED_SPLITS[word]


def parse_all(
    records: Iterable[tuple[str, Any]], where: str, limit: int | None = None, columns: Columns | None = None
) -> list[Conversation]:
    """All usable conversations. The skipped ones are counted by reason in one log line, with the first places of each.

    Args:
        records: (place, record), such as (`line 7`, {…}). where: name of the file. limit: conversations to read.

    Raises:
        ValueError: nothing usable is left.
    """
    kept: list[Conversation] = []
    skipped, first_skipped = Skipped(), None
    for number, (place, record) in enumerate(records):
        if limit is not None and len(kept) >= limit:
            break
        try:
            kept.append(parse_conversation(record, f"{where}:{number}", columns, f"{where} {place}"))
        except SkippedConversation as reason:
            skipped.add(reason, place)
            first_skipped = first_skipped or record
    if skipped:
        log.warning("%s: kept %d conversations, skipped %d: %s", where, len(kept), skipped.counts.total(), skipped)
    if not kept:
        raise ValueError(
            f"{where} holds no usable conversation ({skipped or 'it is empty'}). Expected one object a line with "
            "`messages` [{role, content}, …] or `conversations` [{from, value}, …]; for data=questions also with "
            f"`question` or `turns` [text, …].{how_to_map(first_skipped)}"
        )
    return kept


def with_system_prompt(conversations: list[Conversation], text: str | None) -> list[Conversation]:
    """The same conversations, led by a system message where they have none (None: as they are)."""
    if text is None:
        return conversations
    first = Message("system", text)
    return [c if c.messages[0].role == "system" else replace(c, messages=(first, *c.messages)) for c in conversations]


def read_conversations(path: str, limit: int | None = None, columns: Columns | None = None) -> list[Conversation]:
    """The conversations of a file of JSON lines or a JSON array.

    Raises:
        ValueError: the file cannot be read, or holds no usable conversation.
    """
    file = local_path(path)
    return parse_all(read_records(file), file.name, limit, columns)


def _check_source(source: JsonLines | HubDataset) -> None:
    check_text("data.source.path", source.path)
    check_whole("data.source.limit", source.limit, 1, null="all conversations")
    check_text("data.source.system_prompt", source.system_prompt, null="none")
    check_columns(source.columns)


@dataclass(frozen=True)
class JsonLines:
    """Conversations of a JSON lines file (`path`; `package://` names a file shipped inside hass_lightning).

    Args:
        limit: conversations to read (None: all). system_prompt: added to conversations without a system turn.
        columns: names of the columns to read, where the layout is not known: {prompt: question, response: answer},
            {messages: dialog, role: speaker, content: text}; a column that is null is not read.
    """

    path: str
    limit: int | None = None
    system_prompt: str | None = None
    columns: Columns | None = None

    def __post_init__(self) -> None:
        _check_source(self)

    def load(self, target: TargetModel) -> list[Conversation]:
        """Read and check the file."""
        return with_system_prompt(read_conversations(self.path, self.limit, self.columns), self.system_prompt)


@dataclass(frozen=True)
class HubDataset:
    """Conversations of a Hugging Face data set (`pip install hass-lightning[data]`), or of a local folder of one.

    Args:
        path: a hub id, a folder of files or of `save_to_disk`, or a Parquet file. split, revision, config: of it.
        limit, system_prompt, columns: as of `JsonLines`.
    """

    path: str
    split: str = "train"
    revision: str | None = None
    limit: int | None = None
    system_prompt: str | None = None
    columns: Columns | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        _check_source(self)
        check_text("data.source.split", self.split)

    def load(self, target: TargetModel) -> list[Conversation]:
        """Read the data set through the `datasets` library.

        Raises:
            ValueError: it is not installed, or the data set cannot be read.
        """
        rows = load_rows(self.path, self.split, self.revision, self.config)
        records = ((f"row {number}", row) for number, row in enumerate(rows))
        return with_system_prompt(parse_all(records, self.path, self.limit, self.columns), self.system_prompt)
