"""Generation and selection of the first question of each self-distilled conversation."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hass_lightning.data.continuous_batching import write_texts
from hass_lightning.data.dialogues import read_texts, unfit
from hass_lightning.data.generation_requests import Request
from hass_lightning.data.openers import Openers
from hass_lightning.data.order import hash_of
from hass_lightning.data.overlap import BenchmarkOverlap, NearDuplicates
from hass_lightning.data.tokens import encode_user_prompt
from hass_lightning.runs.progress import progress_bar
from hass_lightning.target_model.model import TargetModel


class ChosenQuestions:
    """Selects the first `wanted` questions that are complete, new and in no benchmark, and counts the others.

    Questions are checked in the order of their numbers, up to the first that is not generated yet. So the selection
    does not depend on which later questions an interrupted run had finished.
    """

    def __init__(
        self, wanted: int, duplicates: NearDuplicates, overlap: BenchmarkOverlap, keep_unfinished: bool = False
    ):
        self.wanted, self.duplicates, self.overlap = wanted, duplicates, overlap
        self.keep_unfinished = keep_unfinished
        self.kept: dict[int, str] = {}
        self.dropped: Counter[str] = Counter()
        self.next = 0

    def read(self, done: Mapping[int, Mapping[str, Any]]) -> None:
        """Check the questions that are new since the last call."""
        while len(self.kept) < self.wanted and self.next in done:
            record = done[self.next]
            if reason := self._reason(record["text"], record["finished"]):
                self.dropped[reason] += 1
            else:
                self.kept[self.next] = record["text"]
            self.next += 1

    def _reason(self, question: str, finished: bool) -> str:
        if reason := unfit(question, finished or self.keep_unfinished, min_words=1 if self.keep_unfinished else 3):
            return reason
        if found := self.overlap.find(question):
            return f"words of {found}"
        return "" if self.duplicates.keep(question) else "a near-duplicate"


def write_questions(
    target: TargetModel,
    openers: Openers,
    chosen: ChosenQuestions,
    path: Path,
    limits: tuple[int, float, int | None],
    seed: int,
    batch_size: int,
) -> None:
    """Generate questions into `path` until enough are selected, from the empty user header of the chat template.

    Args:
        limits: longest question in tokens, temperature, top-k.

    Raises:
        ValueError: too few of the questions are distinct.
    """
    tokenizer, done, barren = target.tokenizer, read_texts(path, "index"), 0
    chosen.read(done)
    with progress_bar("questions", chosen.wanted, "question") as bar, path.open("a") as file:
        bar.update(len(chosen.kept))
        while (missing := chosen.wanted - len(chosen.kept)) > 0:
            before = len(chosen.kept)
            expected = missing * (chosen.next + 1) / (before + 1)  # extrapolated from the rate so far
            indices = range(chosen.next, chosen.next + math.ceil(1.1 * min(expected, 4 * missing)) + 8)
            requests = [
                Request(
                    index,
                    encode_user_prompt(tokenizer, [], openers[index].text),
                    *limits,
                    hash_of(seed, "question", index),
                )
                for index in indices
                if index not in done
            ]
            requests.sort(key=lambda request: len(request.prompt))
            for text in write_texts(target, requests, batch_size):
                index, prompt = text.request.key, text.request.prompt
                given = tokenizer.decode(prompt, skip_special_tokens=True)
                whole = tokenizer.decode([*prompt, *text.token_ids], skip_special_tokens=True)
                question = (openers[index].text + whole[len(given) :]).strip()
                done[index] = {"index": index, "text": question, "finished": text.ended}
                file.write(json.dumps(done[index]) + "\n")
                file.flush()
                bar.update(bar.done < chosen.wanted)
            chosen.read(done)
            barren = barren + 1 if requests and len(chosen.kept) - before < 0.02 * len(requests) else 0
            if barren == 3:
                raise ValueError(
                    f"{target.name} repeats itself: {len(chosen.kept)} distinct questions of {chosen.wanted}. "
                    "Raise data.source.question_temperature or question_top_k, or lower num_questions."
                )
