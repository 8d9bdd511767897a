"""Given questions, answered by the target, or with their given answers for comparison.

Every answer depends only on (seed, id of its conversation, turn) and is written to a file, so an interrupted run
resumes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hass_lightning.data.corpus import Corpus
from hass_lightning.data.dialogues import Dialogue, DialogueWriter, template_hash
from hass_lightning.data.order import split_validation, with_distinct_ids
from hass_lightning.data.prompts import read_conversations
from hass_lightning.data.skipped import Skipped, SkippedConversation
from hass_lightning.data.tokens import encode_prompt
from hass_lightning.data.values import check_flag, check_number, check_numbers, check_whole
from hass_lightning.runs.lock import file_lock
from hass_lightning.target_model.model import TargetModel
from hass_lightning.types import Conversation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """The user turns of the conversations of `source`, answered by the target (`own`) or as given (`given`).

    Args:
        source: an object with `load(target) -> conversations`. For `own` they need no answers.
        output_dir: folder of the generated answers and of the corpus.
        num_questions: conversations, in the order of the source (None: all). num_turns: of each at most (None: all).
        only_answered: leave out turns without a given answer, as `given` does. Both then have the same questions.
        temperature: of the generated answers, 0 is greedy. Several are used in turn. Validation is always greedy.
        max_tokens: longest answer. A longer one is truncated and ends its conversation.
        max_length: a conversation ends before an answer that might not fit into so many tokens.
        num_validation: conversations to hold out if the data have no splits (as the data module would choose).

    Raises:
        ValueError: a value is out of range.
    """

    source: Any
    output_dir: str
    answers: Literal["given", "own"] = "own"
    num_questions: int | None = None
    num_turns: int | None = None
    only_answered: bool = False
    temperature: float | Sequence[float] = 0.0
    max_tokens: int = 256
    max_length: int = 2048
    num_validation: int = 0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answers not in ("given", "own"):
            raise ValueError(f"data.source.answers={self.answers} cannot be used: it is given or own.")
        check_whole("data.source.num_questions", self.num_questions, 1, null="all")
        check_whole("data.source.num_turns", self.num_turns, 1, null="all")
        for key, least in {"max_tokens": 1, "max_length": 2, "num_validation": 0, "batch_size": 1, "seed": 0}.items():
            check_whole(f"data.source.{key}", getattr(self, key), least)
        check_flag("data.source.only_answered", self.only_answered)
        if isinstance(self.temperature, Sequence):
            check_numbers("data.source.temperature", self.temperature)
        else:
            check_number("data.source.temperature", self.temperature)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures of the answers, used in turn."""
        return tuple(self.temperature) if isinstance(self.temperature, Sequence) else (self.temperature,)

    def most_tokens(self) -> tuple[None, int] | None:
        """Return (None, upper bound of answer tokens), or None if no answer is generated. For `plan=true`."""
        if self.answers == "given":
            return None
        if self.num_questions is not None and self.num_turns is not None:
            return None, self.num_questions * self.num_turns * self.max_tokens
        turns = sum(sum(m.role == "user" for m in c.messages) for c in self._asked(None))
        return None, turns * self.max_tokens

    def load(self, target: TargetModel) -> list[Conversation]:
        """Return the conversations. Both kinds of answers have the same questions in the same order.

        Raises:
            ValueError: the source cannot be read, or no question is left.
        """
        asked = self._asked(target)
        if not asked:
            raise ValueError(
                "data.source.source has no question that can be asked: see the warnings above, and the keys "
                "only_answered, max_tokens and max_length of data.source."
            )
        if self.num_validation:
            train, validation = split_validation(asked, self.num_validation)
            splits = dict.fromkeys((c.id for c in train), "train") | {c.id: "validation" for c in validation}
            asked = [replace(c, split=splits[c.id]) for c in asked if c.id in splits]
        return asked if self.answers == "given" else self._own(target, asked)

    def _asked(self, target: TargetModel | None) -> list[Conversation]:
        """Return the conversations cut to the turns that are asked, with their given answers."""
        asked: list[Conversation] = []
        dropped, refused = Counter[str](), Skipped()
        for conversation in with_distinct_ids(self.source.load(target)):
            if self.num_questions is not None and len(asked) >= self.num_questions:
                break
            cut = self._cut(conversation)
            try:
                if not cut.messages:
                    dropped["without an answer"] += 1
                elif self.answers == "own" and cut.tools:
                    dropped["with tools, which are not run here,"] += 1
                elif target is not None and not self._fits(target, cut):  # plan=true has no target
                    dropped["leave no room for an answer of data.source.max_tokens"] += 1
                else:
                    asked.append(cut)
            except SkippedConversation as refusal:
                refused.add(refusal, cut.place or cut.id)
        for reason, count in dropped.items():
            log.warning("%d questions %s: they are left out", count, reason)
        if refused:
            log.warning("%d questions are left out: %s", refused.counts.total(), refused)
        return asked

    def _cut(self, conversation: Conversation) -> Conversation:
        messages = conversation.messages
        starts = [number for number, message in enumerate(messages) if message.role == "user"]
        if self.num_turns is not None and len(starts) > self.num_turns:
            messages = messages[: starts[self.num_turns]]
        if self.only_answered or self.answers == "given":
            answered = [number for number, message in enumerate(messages, start=1) if message.role == "assistant"]
            messages = messages[: answered[-1]] if answered else ()
        finished = conversation.finished or len(messages) < len(conversation.messages)
        return replace(conversation, messages=messages, finished=finished)

    def _fits(self, target: TargetModel, conversation: Conversation) -> bool:
        first = next(number for number, message in enumerate(conversation.messages, start=1) if message.role == "user")
        prompt = encode_prompt(target.tokenizer, conversation.messages[:first], conversation.tools)
        return len(prompt) + self.max_tokens <= min(self.max_length, target.max_length)

    def _own(self, target: TargetModel, asked: Sequence[Conversation]) -> list[Conversation]:
        dialogues = []
        for number, conversation in enumerate(asked):
            greedy = conversation.split == "validation"
            temperature = 0.0 if greedy else self.temperatures[number % len(self.temperatures)]
            system = next((m for m in conversation.messages if m.role == "system"), None)
            turns = tuple(m.content for m in conversation.messages if m.role == "user")
            dialogues.append(Dialogue(conversation.id, turns, temperature, system))
        writer = DialogueWriter(target, self.max_tokens, self.max_length, batch_size=self.batch_size, seed=self.seed)
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = Corpus()
        with file_lock(folder / ".lock"):  # the jobs of a sweep start together: one generates, the others wait
            results = writer.write(dialogues, folder / "texts.jsonl", "answers")
            for conversation, dialogue, written in zip(asked, dialogues, results, strict=True):
                corpus.add(conversation.id, written, dialogue, conversation.category, conversation.split)
            path = corpus.write(folder, self._settings(target))
            log.info("wrote %s: %s", path, corpus.counts())
            return read_conversations(str(path))

    def _settings(self, target: TargetModel) -> dict[str, Any]:
        source = f"{type(self.source).__module__}.{type(self.source).__name__}"
        where: dict[str, Any] = {
            "target": target.name,
            "fingerprint": target.weights_fingerprint,
            "dtype": str(target.dtype),
        }
        where |= {"template": template_hash(target), "source": source, "path": str(getattr(self.source, "path", ""))}
        where |= {"temperature": self.temperatures}
        names = ("answers", "num_questions", "num_turns", "only_answered", "max_tokens", "max_length", "seed")
        return where | {name: getattr(self, name) for name in names}
