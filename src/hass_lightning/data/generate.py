"""Self-distillation: the target writes the questions, then the answers (paper §4, "model-generated data").

Every text depends only on (seed, number of the conversation, turn), so that an interrupted run resumes where it
stopped and any batch size gives the same corpus up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hass_lightning.data.benchmarks import BenchmarkPrompts
from hass_lightning.data.corpus import Corpus
from hass_lightning.data.dialogues import Dialogue, DialogueWriter, template_hash
from hass_lightning.data.first_questions import ChosenQuestions, write_questions
from hass_lightning.data.openers import Openers, num_turns, read_openers
from hass_lightning.data.overlap import BenchmarkOverlap, NearDuplicates
from hass_lightning.data.prompts import read_conversations
from hass_lightning.data.values import check_number, check_numbers, check_whole
from hass_lightning.runs.lock import file_lock
from hass_lightning.target_model.model import TargetModel
from hass_lightning.types import Conversation

log = logging.getLogger(__name__)
NOT_THE_TEXTS = ("batch_size", "output_dir", "benchmarks")  # keys that do not change the texts
FREE = ("num_questions", "benchmarks")  # settings that may change: the corpus is assembled again


@dataclass(frozen=True)
class SelfDistillation:
    """Generates a corpus.

    Args:
        output_dir: folder of the corpus. num_questions: conversations; the first `num_validation` are held out.
        openers: YAML file of beginnings by category that the target completes (None: it generates whole questions).
        plain_share: share of conversations without an opener.
        turn_shares: shares of conversations with 1, 2, … turns. The target also generates the later questions.
        question_temperature, question_top_k: of the user turns. question_max_tokens: longer ones are dropped.
        answer_temperatures: used in turn, 0 is greedy. answer_max_tokens: a longer answer is truncated and ends its
            conversation.
        duplicate_similarity: questions with this Jaccard similarity of word trigrams to an earlier one are dropped.
        benchmarks: texts that share 13 consecutive words with a prompt of these are dropped, if their files exist.
        keep_unfinished_questions: for a target that rarely generates an end of turn.

    Raises:
        ValueError: a value is out of range.
    """

    output_dir: str
    num_questions: int
    num_validation: int
    openers: str | None = None
    plain_share: float = 0.1
    turn_shares: Sequence[float] = (1.0,)
    question_temperature: float = 1.0
    question_top_k: int | None = 100
    question_max_tokens: int = 96
    answer_temperatures: Sequence[float] = (0.0,)
    answer_max_tokens: int = 256
    duplicate_similarity: float = 0.7
    benchmarks: Mapping[str, BenchmarkPrompts] = field(default_factory=dict)
    keep_unfinished_questions: bool = False
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("answer_temperatures", "turn_shares"):
            check_numbers(f"data.source.{key}", getattr(self, key))
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for key in ("num_questions", "num_validation", "question_max_tokens", "answer_max_tokens", "batch_size"):
            check_whole(f"data.source.{key}", getattr(self, key), 0 if key == "num_validation" else 1)
        check_whole("data.source.question_top_k", self.question_top_k, 1, null="no top-k sampling")
        check_number("data.source.question_temperature", self.question_temperature)
        check_number("data.source.plain_share", self.plain_share, 0, 1)
        if self.num_questions <= self.num_validation:
            raise ValueError(
                f"data.source.num_questions={self.num_questions} must exceed "
                f"data.source.num_validation={self.num_validation}: raise the first."
            )
        if sum(self.turn_shares) <= 0:
            raise ValueError(f"data.source.turn_shares={list(self.turn_shares)}: give the shares of 1, 2, … turns.")

    def most_tokens(self) -> tuple[int, int]:
        """Return upper bounds of (question tokens, answer tokens). For `plan=true`."""
        turns = sum(number * share for number, share in enumerate(self.turn_shares, start=1)) / sum(self.turn_shares)
        count = math.ceil(self.num_questions * turns)
        return count * self.question_max_tokens, count * self.answer_max_tokens

    def load(self, target: TargetModel) -> list[Conversation]:
        """Generate the corpus if it does not exist yet, and read it."""
        corpus = self.write(target)
        return read_conversations(str(corpus))

    def write(self, target: TargetModel) -> Path:
        """Generate `corpus.jsonl` and `manifest.json` in `output_dir`. An interrupted call resumes.

        Validation answers are always greedy, because the acceptance length is simulated on them.

        Raises:
            ValueError: the folder has a corpus with other settings, or the target repeats itself.
        """
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / ".lock"):  # the jobs of a sweep start together: one generates, the others wait
            return self._write(target, folder)

    def _write(self, target: TargetModel, folder: Path) -> Path:
        prompts = {name: found for name, each in self.benchmarks.items() if (found := each.installed())}
        openers = read_openers(self.openers)
        settings = self._settings(target, openers) | {"benchmarks": sorted(prompts)}
        settings_file, manifest = folder / "settings.json", folder / "manifest.json"
        before = json.loads(settings_file.read_text()) if settings_file.exists() else settings
        if changed := [key for key in settings if key not in FREE and before.get(key) != settings[key]]:
            raise ValueError(
                f"{folder} has a corpus with another {', '.join(changed)}: set data.source.output_dir "
                "to a new folder (only num_questions may change: a corpus can grow or be cut)."
            )
        compared = set(prompts) <= set(before["benchmarks"])
        if manifest.exists() and compared and before["num_questions"] == self.num_questions:
            return folder / "corpus.jsonl"
        if self.benchmarks and not prompts:
            log.warning(
                "no file of the benchmarks was found (HASS_LIGHTNING_DATA): the corpus is not compared with them"
            )
        manifest.unlink(missing_ok=True)  # its existence means that the corpus is complete
        settings_file.write_text(json.dumps(settings, indent=2))
        overlap = BenchmarkOverlap({name: [m.content for c in found for m in c.messages if m.role == "user"]
                                    for name, found in prompts.items()})  # fmt: skip
        starts = Openers(openers, self.plain_share, self.seed)
        chosen = ChosenQuestions(
            self.num_questions, NearDuplicates(self.duplicate_similarity), overlap, self.keep_unfinished_questions
        )
        limits = (self.question_max_tokens, self.question_temperature, self.question_top_k)
        write_questions(target, starts, chosen, folder / "questions.jsonl", limits, self.seed, self.batch_size)
        return self._write_answers(target, starts, chosen, overlap, folder, settings)

    def _settings(self, target: TargetModel, openers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        settings: dict[str, Any] = {"target": target.name, "fingerprint": target.weights_fingerprint}
        settings |= {"dtype": str(target.dtype), "template": template_hash(target)}
        settings |= {each.name: getattr(self, each.name) for each in fields(self) if each.name not in NOT_THE_TEXTS}
        settings["openers"] = hashlib.sha256(json.dumps(openers).encode()).hexdigest() if openers else None
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def _write_answers(
        self, target: TargetModel, openers: Openers, chosen: ChosenQuestions, overlap: BenchmarkOverlap, folder: Path,
        settings: Mapping[str, Any],
    ) -> Path:  # fmt: skip
        writer = DialogueWriter(
            target, self.answer_max_tokens, target.max_length, self.question_max_tokens, self.question_temperature,
            self.question_top_k, self.batch_size, self.seed,
        )  # fmt: skip
        dialogues = []
        for place, (index, question) in enumerate(chosen.kept.items()):
            greedy = place < self.num_validation
            temperature = 0.0 if greedy else self.answer_temperatures[index % len(self.answer_temperatures)]
            later = [None] * (num_turns(index, self.turn_shares, self.seed) - 1)
            dialogues.append(Dialogue(str(index), (question, *later), temperature))
        corpus = Corpus()
        corpus.dropped += chosen.dropped
        for place, written in enumerate(writer.write(dialogues, folder / "texts.jsonl", "answers")):
            dialogue = dialogues[place]
            if found := next(filter(None, (overlap.find(message.content) for message in written.messages)), None):
                corpus.dropped[f"words of {found}"] += 1
                continue
            split = "validation" if place < self.num_validation else "train"
            category = openers[int(dialogue.id)].category
            corpus.add(f"{split}-{dialogue.id}", written, dialogue, category, split)
        path = corpus.write(folder, settings)
        log.info("wrote %s: %s", path, corpus.counts())
        return path
