"""The one place where speed is measured: drafts × decoders × samplings on the same prompts, interleaved.

The callback, the command and the tests all call `run_benchmark`, so a number means the same everywhere.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import torch

from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding.models import Decoder, DecodingModels
from hass_lightning.measure.cells import Cell, plan_cells, seed_of, turn_messages
from hass_lightning.measure.identity import Auditor
from hass_lightning.measure.known_answer import RULE, KnownAnswer
from hass_lightning.measure.records import acceptance_length, speedup
from hass_lightning.measure.summary import summarize
from hass_lightning.measure.trace import BASELINE, Record, read_records
from hass_lightning.progress import Bar, progress_bar
from hass_lightning.types import Conversation, Message, Sampling

__all__ = ["run_benchmark", "summarize"]

log = logging.getLogger(__name__)
WARMUP_TOKENS = 16


def run_benchmark(
    models: Mapping[str, DecodingModels],
    decoders: Mapping[str, Decoder],
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    samplings: Sequence[Sampling] = (Sampling(),),
    benchmark: str = "prompts",
    seed: int = 0,
    records_path: str | Path | None = None,
    checked_prompts: int = 0,
    fp32_models: Mapping[str, DecodingModels] | None = None,
    on_record: Callable[[Record], None] | None = None,
    num_warmup: int = 1,
    keep_proposals: bool = True,
    replay: bool = False,
) -> list[Record]:
    """Decode every prompt with every (draft, decoder, sampling), in an order drawn anew for each turn of each prompt.

    A prompt with several user messages and no answers is asked turn by turn; the autoregressive answer of the same
    sampling goes into the next turn of *all* decoders, so that they are measured on the same prompts. At temperature 0
    every answer is compared with the autoregressive one (identity.py). Prompts that are empty or leave no room for an
    answer are skipped and counted in the log.

    Args:
        models: label to models; the label is `Record.draft`. decoders: label to decoder; the one named
            `autoregressive` is the baseline. prompts: with distinct ids. max_new_tokens: longest answer.
        seed: of the order and of the sampled tokens (which depend on prompt, turn and sampling, not on the order).
        records_path: file to append to, line by line; what stands there already is not decoded again.
        checked_prompts: so many prompts are decoded again in fp32 with `fp32_models` (the same labels), untimed, where
            answers must be identical. on_record: called with each new record. num_warmup: short untimed runs of each
            cell before the first measured one. keep_proposals: store the drafted token ids (most of the file).
        replay: decode autoregressively alone and replay the others on its answers (known_answer.py): the same τ for a
            tenth of the time, and no speed.

    Returns:
        the records of this benchmark by prompt, turn and cell, those found in the file included.

    Raises:
        ValueError: models that do not fit, repeated prompt ids, several turns or `checked_prompts` without an
            autoregressive decoder; `replay` above temperature 0 or without one.
    """
    cells = plan_cells(models, decoders, samplings)
    if replay:
        if not any(cell.is_baseline for cell in cells) or any(sampling.temperature for sampling in samplings):
            raise ValueError(
                f"benchmark {benchmark}: replay=true needs the {BASELINE} decoder, whose answers are replayed, and "
                "temperatures=[0]: sampled answers depend on what was drafted."
            )
        checked_prompts, num_warmup = 0, 0  # nothing is decoded that could be checked or timed
    repeated = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise ValueError(f"benchmark {benchmark} has several prompts with the id {repeated[0]!r}: ids must differ.")
    turns = [turn_messages(prompt) for prompt in prompts]
    greedy = next((cell for cell in cells if cell.is_baseline and cell.sampling.temperature == 0), None)
    if not any(cell.is_baseline for cell in cells) and (checked_prompts or any(len(each) > 1 for each in turns)):
        raise ValueError(
            f"benchmark {benchmark}: add the {BASELINE} decoder (second turns and checks need its answers)."
        )
    if checked_prompts and fp32_models is None:
        if cells[0].models.target.dtype != torch.float32:
            raise ValueError("checked_prompts needs fp32_models: answers are identical for certain in fp32 alone.")
        fp32_models = models
    with ExitStack() as stack:
        done: dict[tuple, Record] = {}
        file = None
        if records_path is not None:
            done, file = open_records(Path(records_path))
            stack.enter_context(file)
        bar = stack.enter_context(progress_bar(benchmark, len(cells) * sum(map(len, turns)), "answer"))
        run = _Run(cells, benchmark, max_new_tokens=max_new_tokens, seed=seed, done=done, file=file, bar=bar)
        run.auditor = Auditor(greedy, fp32_models, max_new_tokens) if greedy else None
        run.on_record, run.num_warmup, run.keep_proposals = on_record, num_warmup, keep_proposals
        run.replay = replay
        num_left = checked_prompts
        for prompt, added in zip(prompts, turns, strict=True):
            num_left -= run.ask(prompt, added, in_fp32=num_left > 0)
    if run.skipped:
        log.warning("%s: %d prompts asked, skipped %s", benchmark, len(prompts), dict(run.skipped))
    return run.records


class _Run:
    """The state of one `run_benchmark`."""

    def __init__(
        self,
        cells: list[Cell],
        benchmark: str,
        *,
        max_new_tokens: int,
        seed: int,
        done: dict[tuple, Record],
        file: TextIO | None,
        bar: Bar,
    ):
        self.cells, self.benchmark, self.max_new_tokens, self.seed = cells, benchmark, max_new_tokens, seed
        self.done, self.file, self.bar = done, file, bar
        self.target = cells[0].models.target
        self.target_name = f"{self.target.name}/{str(self.target.dtype).removeprefix('torch.')}"
        self.records: list[Record] = []
        self.groups: dict[tuple, list[Record]] = defaultdict(list)  # for the running numbers beside the bar
        self.skipped: Counter[str] = Counter()
        self.auditor: Auditor | None = None
        self.on_record: Callable[[Record], None] | None = None
        self.num_warmup, self.keep_proposals = 1, True
        self.replay = False

    def ask(self, prompt: Conversation, turns: list[tuple[Message, ...]], in_fp32: bool) -> int:
        """All turns of one prompt with all cells; 1, or 0 where the prompt is skipped."""
        if not turns or not all(message.content.strip() for added in turns for message in added):
            self.skipped["an empty prompt"] += 1
            self.bar.update(len(self.cells) * len(turns))
            return 0
        history: dict[Sampling, tuple[Message, ...]] = {cell.sampling: () for cell in self.cells}
        for turn, added in enumerate(turns):
            inputs: dict[Sampling, list[int]] = {}
            for sampling, messages in list(history.items()):
                history[sampling] = messages + added
                ids = encode_prompt(self.target.tokenizer, history[sampling])
                if len(ids) < self.target.max_length:
                    inputs[sampling] = ids
                else:
                    self.skipped[f"turn {turn + 1} longer than the target's context"] += 1
                    del history[sampling]
            answers = self._turn(prompt, turn, inputs, in_fp32)
            for sampling, answer in answers.items():
                text = self.target.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
                history[sampling] += (Message("assistant", text),)
            if not inputs:
                self.bar.update(len(self.cells) * (len(turns) - turn - 1))
                return int(turn > 0)
        return 1

    def _turn(
        self, prompt: Conversation, turn: int, inputs: dict[Sampling, list[int]], in_fp32: bool
    ) -> dict[Sampling, Record]:
        """One turn with all cells; the baseline's record of each sampling."""
        order = list(self.cells)
        random.Random(seed_of(self.seed, self.benchmark, prompt.id, turn)).shuffle(order)
        if self.replay:
            order.sort(key=lambda cell: not cell.is_baseline)  # its answer is what the others replay
        known: KnownAnswer | None = None
        expected = {cell.sampling for cell in order if cell.is_baseline}
        answers: dict[Sampling, Record] = {}
        waiting: list[tuple[Cell, Record]] = []
        finished: dict[int, Record] = {}  # by id of the cell, so that the result does not depend on the order
        for cell in order:
            sampling = cell.sampling
            if sampling in inputs:
                record = self._blank(cell, prompt, turn, len(inputs[sampling]))
                found = self.done.get(record.key)
                if found is not None:
                    record = found
                    self._count(cell, record)
                else:
                    self._warm_up(inputs[sampling])
                    drawn = seed_of(self.seed, self.benchmark, prompt.id, turn, sampling)
                    run = cell
                    if self._replays(cell):
                        known = known or KnownAnswer(self.target, inputs[sampling], answers[sampling].token_ids)
                        run = cell.on(known)
                    record.add_result(run.decode(inputs[sampling], self.max_new_tokens, drawn), self.keep_proposals)
                    if self._replays(cell):
                        record.seconds = {}
                    waiting.append((cell, record))
                finished[id(cell)] = record
                if cell.is_baseline:
                    answers[sampling] = record
                # a line is written as soon as the answer it is compared with is known
                ready = [each for each in waiting if each[0].sampling in answers or each[0].sampling not in expected]
                for each, complete in ready:
                    answer = answers.get(each.sampling)
                    compared = each.sampling.temperature == 0 and not each.is_baseline and not self._replays(each)
                    if self.auditor and answer and compared:
                        self.auditor.judge(each, complete, answer, inputs[each.sampling], in_fp32)
                    self._write(complete)
                    self._count(each, complete)
                waiting = [each for each in waiting if each not in ready]
            self.bar.update(1)
        self.records += [finished[id(cell)] for cell in self.cells if id(cell) in finished]
        return answers

    def _replays(self, cell: Cell) -> bool:
        """Whether a cell runs on the baseline's answer instead of the target."""
        return self.replay and not cell.is_baseline

    def _blank(self, cell: Cell, prompt: Conversation, turn: int, num_prompt_tokens: int) -> Record:
        return Record(
            benchmark=self.benchmark,
            prompt_id=prompt.id,
            turn=turn,
            draft=cell.draft,
            decoder=cell.label,
            temperature=cell.sampling.temperature,
            top_p=cell.sampling.top_p,
            top_k=cell.sampling.top_k,
            max_new_tokens=self.max_new_tokens,
            category=prompt.category,
            settings=cell.settings,
            rule=RULE if self._replays(cell) else cell.rule,
            target=self.target_name,
            num_prompt_tokens=num_prompt_tokens,
        )

    def _warm_up(self, prompt: list[int]) -> None:
        for cell in self.cells if self.num_warmup else []:
            for _ in range(self.num_warmup):
                cell.decode(prompt, min(self.max_new_tokens, WARMUP_TOKENS))
        self.num_warmup = 0

    def _write(self, record: Record) -> None:
        if self.file is not None:
            self.file.write(record.to_json() + "\n")
            self.file.flush()
        if self.on_record is not None:
            self.on_record(record)

    def _count(self, cell: Cell, record: Record) -> None:
        group = self.groups[cell.draft, cell.label, cell.sampling]
        group.append(record)
        base = self.groups["", BASELINE, cell.sampling]
        if not cell.is_baseline:
            name = f"{cell.draft} {cell.label} τ {acceptance_length(group):.2f}".strip()
            self.bar.note(f"{name} speedup {speedup(group, base):.2f}×" if base and not self.replay else name)


def open_records(path: Path) -> tuple[dict[tuple, Record], TextIO]:
    """Finished records by key, and the file to append to; a line that a kill cut short is taken out of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done: dict[tuple, Record] = {}
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
        done = {record.key: record for record in read_records(path)}
    return done, path.open("a", encoding="utf-8")
