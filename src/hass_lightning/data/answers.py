"""The same questions with given answers or with the target's own: the paper's question of self-distilled data.

Every answer depends on (seed, index) alone and stands in a file: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from hass_lightning.data.generate import Request, read_done, write_texts
from hass_lightning.data.tokens import encode_prompt
from hass_lightning.progress import progress_bar
from hass_lightning.target.model import TargetModel
from hass_lightning.types import Conversation, Message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstTurns:
    """The first question of each conversation of `source`, answered as it was or by the target.

    Args:
        source: anything with `load(target) -> conversations`. answers: `given` or `own`.
        num_questions: of them, in the source's order. output_dir: where the target's answers are kept.
        temperature: of the target's answers, 0 = greedy. max_tokens: an answer, which is cut there.
    """

    source: Any
    answers: Literal["given", "own"]
    output_dir: str
    num_questions: int = 2000
    temperature: float = 0.0
    max_tokens: int = 256
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.answers not in ("given", "own"):
            raise ValueError(f"data.source.answers={self.answers} is neither given nor own.")

    def load(self, target: TargetModel) -> list[Conversation]:
        """The conversations, all of one turn; both kinds of answers have the same questions in the same order."""
        given: list[Conversation] = []
        num_long = 0
        for conversation in self.source.load(target):
            roles = [message.role for message in conversation.messages]
            if "assistant" in roles and len(given) < self.num_questions:
                end = roles.index("assistant") + 1
                if target is not None:  # a plan has none
                    question = encode_prompt(target.tokenizer, conversation.messages[: end - 1])
                    if len(question) + self.max_tokens > target.max_length:
                        num_long += 1
                        continue
                given.append(replace(conversation, messages=conversation.messages[:end], finished=True))
        if num_long:
            log.warning("%d questions leave no room for an answer of data.source.max_tokens=%d in the target's context",
                        num_long, self.max_tokens)  # fmt: skip
        return given if self.answers == "given" else self._own(target, given)

    def _own(self, target: TargetModel, given: Sequence[Conversation]) -> list[Conversation]:
        prompts = [encode_prompt(target.tokenizer, conversation.messages[:-1]) for conversation in given]
        settings = [target.fingerprint, str(target.dtype), self.temperature, self.max_tokens, self.seed, prompts]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        path = Path(self.output_dir) / f"answers-{key}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"), progress_bar("own answers", len(given), "answer") as bar:
            done = read_done(path)
            bar.update(len(done))
            missing = [Request(n, ids, self.temperature) for n, ids in enumerate(prompts) if n not in done]
            with path.open("a") as file:
                for request, ids, ended in write_texts(
                    target, missing, self.max_tokens, self.seed, self.batch_size, "answer"
                ):
                    text = target.tokenizer.decode(ids, skip_special_tokens=True)
                    done[request.index] = {"index": request.index, "text": text, "finished": ended}
                    file.write(json.dumps(done[request.index]) + "\n")
                    file.flush()
                    bar.update(1)
        own = []
        for number, conversation in enumerate(given):
            answer = done[number]
            if answer["text"].strip():
                messages = (*conversation.messages[:-1], Message("assistant", answer["text"]))
                own.append(replace(conversation, messages=messages, finished=answer["finished"]))
        return own
