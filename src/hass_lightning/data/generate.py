"""Self-distillation: the target writes the questions, then the answers (paper §4, "model-generated data").

Every text depends on (seed, index) alone, so that an interrupted run resumes where it stopped and any batch size gives
the same corpus up to rounding. Shapes: B slots of the running batch (types.py has the legend).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from hass_lightning import __version__
from hass_lightning.data.prompts import parse_all, read_json_lines
from hass_lightning.data.tokens import as_dicts, encode_prompt
from hass_lightning.progress import progress_bar
from hass_lightning.target.model import TargetModel
from hass_lightning.types import Conversation, Message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One text to be written: prompt ids, its index (which seeds it) and its sampling temperature (0 = greedy)."""

    index: int
    prompt: Sequence[int]
    temperature: float


@dataclass
class _Slot:
    request: Request
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)


def _row_seed(seed: int, index: int, stage: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{stage}:{index}".encode()).digest()[:7], "big")


def _sample(logits: Tensor, slots: list[_Slot], top_k: int | None) -> Tensor:
    """One token a row [B]: the argmax at temperature 0, else the inverse CDF at the row's own uniform number."""
    chosen = logits.max(-1).indices  # argmax is slow in bf16 on a CPU
    rows = [row for row, slot in enumerate(slots) if slot.request.temperature > 0]
    if rows:
        picked = logits[rows].float()
        picked /= torch.tensor([slots[row].request.temperature for row in rows], device=logits.device)[:, None]
        token_ids = None
        if top_k is not None:
            picked, token_ids = picked.topk(min(top_k, picked.shape[-1]))
        cumulative = picked.softmax(-1).cumsum(-1)
        uniform = torch.tensor([float(torch.rand((), generator=slots[row].generator)) for row in rows])
        threshold = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[-1] - 1)
        chosen[rows] = (index if token_ids is None else token_ids.gather(1, index))[:, 0]
    return chosen


@torch.inference_mode()
def write_texts(
    target: TargetModel,
    requests: Sequence[Request],
    max_new_tokens: int,
    seed: int,
    batch_size: int,
    stage: str = "",
    top_k: int | None = None,
) -> Iterator[tuple[Request, list[int], bool]]:
    """Continuous batching: finished rows leave, waiting requests take their slots.

    Yields:
        (request, token ids without the end token, whether the end token was written), as they finish.
    """
    waiting = sorted(requests, key=lambda request: len(request.prompt))[::-1]  # similar lengths are prefilled together
    if not waiting:
        return
    capacity = max(len(request.prompt) for request in waiting) + max_new_tokens
    if capacity > target.max_length:
        raise ValueError(
            f"a prompt and {max_new_tokens} new tokens are {capacity} tokens, but target {target.name} takes "
            f"{target.max_length}: write less, or leave the prompt out."
        )
    batch_size = min(batch_size, len(waiting))
    cache = target.new_cache(batch_size, capacity)
    slots: list[_Slot | None] = [None] * batch_size
    lengths = torch.zeros(batch_size, dtype=torch.int64, device=target.device)
    last = torch.zeros(batch_size, dtype=torch.int64, device=target.device)

    def finished(row: int, token: int) -> tuple[Request, list[int], bool] | None:
        slot = slots[row]
        assert slot is not None
        ended = token in target.eos_token_ids
        if not ended:
            slot.token_ids.append(token)
        if ended or len(slot.token_ids) >= max_new_tokens:
            slots[row] = None
            return slot.request, slot.token_ids, ended
        return None

    while waiting or any(slot is not None for slot in slots):
        free = [row for row, slot in enumerate(slots) if slot is None]
        if waiting and (len(free) >= min(max(1, batch_size // 8), len(waiting)) or len(free) == batch_size):
            chunk = [waiting.pop() for _ in range(min(len(free), len(waiting), 32))]
            rows = torch.tensor(free[: len(chunk)])
            longest = max(len(request.prompt) for request in chunk)
            prompts = torch.zeros(len(chunk), longest, dtype=torch.int64)
            for number, request in enumerate(chunk):
                prompts[number, : len(request.prompt)] = torch.tensor(request.prompt)
            fresh = target.new_cache(len(chunk), longest)
            features = target.forward(prompts.to(target.device), fresh)
            cache.write_rows(rows, fresh, longest)
            ends = torch.tensor([len(request.prompt) for request in chunk], device=target.device)
            logits = target.head.logits(features[torch.arange(len(chunk)), ends - 1])
            for row, request in zip(rows.tolist(), chunk, strict=True):
                generator = torch.Generator().manual_seed(_row_seed(seed, request.index, stage))
                slots[row] = _Slot(request, generator)
            tokens = _sample(logits, [slots[row] for row in rows.tolist()], top_k)  # type: ignore[misc]
            lengths[rows], last[rows] = ends, tokens
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                if done := finished(row, token):
                    yield done
            continue
        if not waiting and len(free) > max(4, len(slots) // 4):  # the tail: shrink the batch
            keep = torch.tensor([row for row, slot in enumerate(slots) if slot is not None])
            if len(keep):
                cache.select_rows(keep)
                slots, lengths, last = [slots[row] for row in keep.tolist()], lengths[keep], last[keep]
        active = [row for row, slot in enumerate(slots) if slot is not None]
        if not active:
            continue
        cache.slots = lengths[:, None]
        cache.read_length = int(lengths[active].max()) + 1
        lengths.clamp_(max=cache.read_length - 1)  # an idle row must not write past what is read
        cache.slots = lengths[:, None]
        mask = (
            torch.arange(cache.read_length, device=target.device)[None, None, None, :] <= lengths[:, None, None, None]
        )
        features = target.forward(last[:, None], cache, positions=lengths[:, None], mask=mask)
        logits = target.head.logits(features[active, 0])
        tokens = _sample(logits, [slots[row] for row in active], top_k)  # type: ignore[misc]
        lengths[active] += 1
        last[active] = tokens
        for row, token in zip(active, tokens.tolist(), strict=True):
            if done := finished(row, token):
                yield done


@dataclass(frozen=True)
class SelfDistillation:
    """How a corpus is written. `answer_temperatures` are used in turn (0 = greedy)."""

    output_dir: str
    num_questions: int
    num_validation: int
    question_temperature: float = 1.0
    question_top_k: int | None = 100
    question_max_tokens: int = 96
    answer_temperatures: tuple[float, ...] = (0.0,)
    answer_max_tokens: int = 256
    keep_unfinished_questions: bool = False
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "answer_temperatures", tuple(self.answer_temperatures))
        if self.num_questions <= self.num_validation:
            raise ValueError(
                f"num_questions={self.num_questions} must exceed num_validation={self.num_validation}: raise the first."
            )

    def load(self, target: TargetModel) -> list[Conversation]:
        """Write the corpus where it is not written yet, and read it."""
        corpus = self.write(target)
        return parse_all(read_json_lines(corpus), corpus.name)

    def write(self, target: TargetModel) -> Path:
        """Write `corpus.jsonl` and `manifest.json` to `output_dir`; an interrupted call resumes.

        Validation answers are greedy whatever `answer_temperatures` says, since acceptance is simulated on them.

        Raises:
            ValueError: the folder holds a corpus made with other settings; the target repeats itself.
        """
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # the jobs of a sweep start together: one writes, the others wait
            return self._write(target, folder)

    def _write(self, target: TargetModel, folder: Path) -> Path:
        settings = {"target": target.name, "fingerprint": target.fingerprint, "dtype": str(target.dtype)}
        settings |= {"template": hashlib.sha256((target.tokenizer.chat_template or "").encode()).hexdigest()}
        settings |= {key: value for key, value in asdict(self).items() if key not in ("batch_size", "output_dir")}
        settings = json.loads(json.dumps(settings))
        settings_file = folder / "settings.json"
        before = json.loads(settings_file.read_text()) if settings_file.exists() else settings
        if changed := [key for key in settings if key != "num_questions" and before.get(key) != settings[key]]:
            raise ValueError(
                f"{folder} holds a corpus that was begun with another {', '.join(changed)}: set data.source.output_dir "
                "to a new folder (only num_questions may change: a corpus can grow or be cut)."
            )
        settings_file.write_text(json.dumps(settings, indent=2))
        manifest = folder / "manifest.json"
        if manifest.exists() and json.loads(manifest.read_text())["settings"] == settings:
            return folder / "corpus.jsonl"
        manifest.unlink(missing_ok=True)  # it says that the corpus beside it is whole
        questions = self._questions(target, folder / "questions.jsonl")
        answers = self._answers(target, questions, folder / "answers.jsonl")
        return self._assemble(questions, answers, folder, settings)

    def _questions(self, target: TargetModel, path: Path) -> dict[int, str]:
        """Distinct questions by index: sampled after the empty user header of the target's own template."""
        marker = "\u0001question\u0001"
        text = target.tokenizer.apply_chat_template(as_dicts([Message("user", marker)]), tokenize=False)
        prompt = target.tokenizer(text[: text.index(marker)], add_special_tokens=False)["input_ids"]
        done, min_words = read_done(path), 1 if self.keep_unfinished_questions else 3
        kept, first = _distinct(done, min_words)
        with progress_bar("questions", self.num_questions, "question") as bar, path.open("a") as file:
            bar.update(min(len(kept), self.num_questions))
            barren = 0
            while len(kept) < self.num_questions:
                missing, before = self.num_questions - len(kept), len(kept)
                indices = [index for index in range(first, first + missing + 64) if index not in done]
                requests = [Request(index, prompt, self.question_temperature) for index in indices]
                for request, ids, ended in write_texts(
                    target,
                    requests,
                    self.question_max_tokens,
                    self.seed,
                    self.batch_size,
                    "question",
                    self.question_top_k,
                ):
                    text = target.tokenizer.decode(ids, skip_special_tokens=True).strip()
                    text = text if ended or self.keep_unfinished_questions else ""
                    done[request.index] = {"index": request.index, "text": text}
                    file.write(json.dumps(done[request.index]) + "\n")
                    if text:
                        bar.update(1)
                kept, first = _distinct(done, min_words)
                file.flush()
                barren = barren + 1 if requests and len(kept) - before < 0.02 * len(requests) else 0
                if barren == 3:
                    raise ValueError(
                        f"{target.name} repeats itself: {len(kept)} distinct questions, {self.num_questions} wanted. "
                        "Raise data.source.question_temperature or question_top_k, or lower num_questions."
                    )
        return dict(sorted(kept.items())[: self.num_questions])

    def _answers(self, target: TargetModel, questions: dict[int, str], path: Path) -> dict[int, dict]:
        done = read_done(path)
        validation = set(list(questions)[: self.num_validation])
        requests = []
        for number, (index, question) in enumerate(questions.items()):
            if index not in done:
                greedy = index in validation
                temperature = 0.0 if greedy else self.answer_temperatures[number % len(self.answer_temperatures)]
                requests.append(
                    Request(index, encode_prompt(target.tokenizer, [Message("user", question)]), temperature)
                )
        with progress_bar("answers", len(questions), "answer") as bar, path.open("a") as file:
            bar.update(len(questions) - len(requests))
            # chunks in corpus order, so that what is written first is a usable corpus by itself
            for start in range(0, len(requests), 8 * self.batch_size):
                chunk = requests[start : start + 8 * self.batch_size]
                for request, ids, ended in write_texts(
                    target, chunk, self.answer_max_tokens, self.seed, self.batch_size, "answer"
                ):
                    text = target.tokenizer.decode(ids, skip_special_tokens=True)
                    record = {"index": request.index, "text": text, "finished": ended, "num_tokens": len(ids)}
                    done[request.index] = record | {"temperature": request.temperature}
                    file.write(json.dumps(done[request.index]) + "\n")
                    file.flush()
                    bar.update(1)
        return done

    def _assemble(self, questions: dict[int, str], answers: dict[int, dict], folder: Path, settings: dict) -> Path:
        corpus = folder / "corpus.jsonl"
        counts = {"train": 0, "validation": 0, "empty_answers": 0, "answer_tokens": 0}
        validation = set(list(questions)[: self.num_validation])
        with corpus.open("w") as file:
            for index, question in questions.items():
                answer = answers[index]
                if not answer["text"].strip():
                    counts["empty_answers"] += 1
                    continue
                split = "validation" if index in validation else "train"
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer["text"]}]
                record = {"id": f"{split}-{index}", "split": split, "messages": messages}
                record |= {"finished": answer["finished"], "temperature": answer["temperature"]}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                counts[split] += 1
                counts["answer_tokens"] += answer["num_tokens"]
        manifest = {"settings": settings, "counts": counts, "version": __version__}
        manifest["sha256"] = hashlib.sha256(corpus.read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        log.info("wrote %s: %s", corpus, counts)
        return corpus


def read_done(path: Path) -> dict[int, dict]:
    """Finished lines by index; a line cut by a kill is dropped from the file, so that appending stays safe."""
    if not path.exists():
        return {}
    records = {record["index"]: record for record in read_json_lines(path) if isinstance(record, dict)}
    path.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
    return records


def _distinct(done: dict[int, dict], min_words: int) -> tuple[dict[int, str], int]:
    """Questions by index without repeats (case and white space aside) and without those of fewer than `min_words`.

    Only those before the first index that is not written yet, which is returned, too: the choice must not depend on
    which of the later ones a killed run had finished.
    """
    seen: set[str] = set()
    kept: dict[int, str] = {}
    index = 0
    while index in done:
        text = done[index]["text"]
        key = " ".join(text.lower().split())
        if len(key.split()) >= min_words and key not in seen:
            seen.add(key)
            kept[index] = text
        index += 1
    return kept, index
