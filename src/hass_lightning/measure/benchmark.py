"""Benchmark of drafts × decoders × samplings on the same prompts, interleaved. All speed is measured here.

The callback, the command and the tests all call `run_benchmark`. A prompt is asked turn by turn (`_ask`), and every
cell decodes each turn, in random order (`_measure_turn`).
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from hass_lightning.data.skipped import SkippedConversation
from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding.models import Decoder, DecodingModels
from hass_lightning.measure.benchmark_cells import Cell, plan_cells, seed_of, turn_messages
from hass_lightning.measure.decoder_replay import RULE, KnownAnswer
from hass_lightning.measure.journal import Journal, open_records
from hass_lightning.measure.lossless import Auditor
from hass_lightning.measure.metrics import acceptance_length, speedup
from hass_lightning.measure.record import BASELINE, Record, select
from hass_lightning.measure.summary import summarize
from hass_lightning.runs.progress import progress_bar
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
    """Decode every prompt with every (draft, decoder, sampling), in a new random order for each turn of each prompt.

    A prompt with several user messages and no answers is asked turn by turn. The autoregressive answer of the same
    sampling becomes part of the next turn of *all* decoders, so that they are measured on the same prompts. At
    temperature 0 every answer is compared with the autoregressive one (lossless.py). Prompts that are empty or too long
    for an answer are skipped, and their number is logged.

    Args:
        models: models by label; the label is `Record.draft`.
        decoders: decoders by label; the one named `autoregressive` is the baseline.
        prompts: prompts with distinct ids.
        max_new_tokens: maximum number of tokens per answer.
        samplings: the samplings.
        benchmark: name of the benchmark in the records.
        seed: seed of the order and of the sampled tokens (which depend on prompt, turn and sampling, not on the order).
        records_path: file to which records are appended, one per line; those already in it are not decoded again.
        checked_prompts: number of prompts that are decoded again with `fp32_models`, without timing; these answers must
            be identical.
        fp32_models: models in fp32 with the labels of `models`.
        on_record: called with each new record.
        num_warmup: number of short runs of each cell without timing before the first measured one.
        keep_proposals: whether to store the ids of draft tokens (most of the size of the file).
        replay: whether to decode only autoregressively and replay the other decoders on these answers
            (decoder_replay.py). τ is the same in a tenth of the time, and no speed is measured.

    Returns:
        the records of this benchmark by prompt, turn and cell, including those found in the file.

    Raises:
        ValueError: models that do not fit; repeated prompt ids; several turns or `checked_prompts` without an
            autoregressive decoder; `replay` above temperature 0 or without an autoregressive decoder.
    """
    cells = plan_cells(models, decoders, samplings)
    turns = [turn_messages(prompt) for prompt in prompts]
    has_baseline = any(cell.is_baseline for cell in cells)
    if replay:
        if not has_baseline or any(sampling.temperature for sampling in samplings):
            raise ValueError(
                f"benchmark {benchmark}: replay=true needs the {BASELINE} decoder, whose answers are replayed, and "
                "temperatures=[0], because sampled answers depend on the draft tokens."
            )
        checked_prompts, num_warmup = 0, 0  # a replay has nothing to check or time
    repeated = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise ValueError(f"benchmark {benchmark} has several prompts with the id {repeated[0]!r}: ids must differ.")
    if not has_baseline and (checked_prompts or any(len(each) > 1 for each in turns)):
        raise ValueError(
            f"benchmark {benchmark}: add the {BASELINE} decoder (second turns and checks need its answers)."
        )
    if checked_prompts and fp32_models is None:
        if cells[0].models.target.dtype != torch.float32:
            raise ValueError("checked_prompts needs fp32_models: identical answers are guaranteed only in fp32.")
        fp32_models = models
    greedy = next((cell for cell in cells if cell.is_baseline and cell.sampling.temperature == 0), None)
    auditor = Auditor(greedy, fp32_models, max_new_tokens) if greedy and not replay else None
    plan = _Plan(benchmark, cells, max_new_tokens, seed, num_warmup, keep_proposals, replay, auditor)
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(benchmark, len(cells) * sum(map(len, turns)), "answer"))
        done, file = open_records(Path(records_path)) if records_path else ({}, None)
        if file:
            stack.enter_context(file)
        journal = Journal(done, file, on_record, bar)
        for prompt, added in zip(prompts, turns, strict=True):
            checked_prompts -= _ask(plan, journal, prompt, added, in_fp32=checked_prompts > 0)
    if journal.skipped:
        log.warning("%s: %d prompts asked, skipped %s", benchmark, len(prompts), dict(journal.skipped))
    if journal.skipped and not journal.records:
        raise ValueError(f"benchmark {benchmark}: no prompt can be used ({dict(journal.skipped)}): give other prompts.")
    return journal.records


@dataclass(frozen=True)
class _Plan:
    """What to measure, and how."""

    benchmark: str
    cells: list[Cell]
    max_new_tokens: int
    seed: int
    num_warmup: int
    keep_proposals: bool
    replay: bool
    auditor: Auditor | None

    @property
    def has_baseline(self) -> bool:
        """Whether autoregressive answers are decoded."""
        return any(cell.is_baseline for cell in self.cells)


def _ask(plan: _Plan, journal: Journal, prompt: Conversation, turns: list[tuple[Message, ...]], in_fp32: bool) -> bool:
    """Ask all turns of one prompt with all cells. Return False if the prompt is skipped."""
    if not turns or not all(message.content.strip() for added in turns for message in added):
        journal.skipped["an empty prompt"] += 1
        journal.bar.update(len(plan.cells) * len(turns))
        return False
    target = plan.cells[0].models.target
    history: dict[Sampling, tuple[Message, ...]] = {cell.sampling: () for cell in plan.cells}
    for turn, added in enumerate(turns):
        history = {sampling: messages + added for sampling, messages in history.items()}
        try:
            inputs = {each: encode_prompt(target.tokenizer, said, prompt.tools) for each, said in history.items()}
        except SkippedConversation as reason:
            journal.skipped[f"turn {turn + 1}: {reason}"] += 1
            inputs = {}
        for sampling in [sampling for sampling, ids in inputs.items() if len(ids) >= target.max_length]:
            journal.skipped[f"turn {turn + 1} longer than the target's context"] += 1
            del inputs[sampling]
        if not inputs:
            journal.bar.update(len(plan.cells) * (len(turns) - turn))
            return turn > 0
        records = _measure_turn(plan, journal, prompt, turn, inputs, in_fp32)
        answers = {record.sampling: record.token_ids for record in records if record.decoder == BASELINE}
        for sampling, ids in answers.items():
            history[sampling] += (Message("assistant", target.tokenizer.decode(ids, skip_special_tokens=True)),)
        history = {sampling: history[sampling] for sampling in answers}
        journal.records += records
        journal.bar.note(_running_numbers(journal.records, plan.replay))
    return True


def _measure_turn(
    plan: _Plan, journal: Journal, prompt: Conversation, turn: int, inputs: dict[Sampling, list[int]], in_fp32: bool
) -> list[Record]:
    """Decode one turn with all cells in random order, compare and write the records, and return them by cell.

    Args:
        plan: what to measure.
        journal: the records so far.
        prompt: the prompt.
        turn: number of the turn.
        inputs: token ids of the prompt by sampling; cells of other samplings are left out.
        in_fp32: whether to compare in fp32 also.
    """
    order = list(range(len(plan.cells)))
    random.Random(seed_of(plan.seed, plan.benchmark, prompt.id, turn)).shuffle(order)
    if plan.replay:
        order.sort(key=lambda place: not plan.cells[place].is_baseline)  # its answer is replayed by the others
    records: dict[int, Record] = {}
    answers: dict[Sampling, Record] = {}
    waiting: list[int] = []  # a record is written once the answer that it is compared with is known
    known: dict[tuple[int, ...], KnownAnswer] = {}  # by the layers that a head reads
    for place in order:
        cell = plan.cells[place]
        ids = inputs.get(cell.sampling)
        if ids is not None:
            record = _new_record(plan, cell, prompt, turn, len(ids))
            if record.key in journal.done:
                record = journal.done[record.key]
            else:
                if not journal.num_new and not waiting:
                    _warm_up(plan, ids)
                waiting.append(place)
                if plan.replay and not cell.is_baseline:
                    layers = cell.models.target.feature_layers
                    if layers not in known:
                        known[layers] = KnownAnswer(cell.models.target, ids, answers[cell.sampling].token_ids)
                    cell = cell.on(known[layers])
                drawn = seed_of(plan.seed, plan.benchmark, prompt.id, turn, cell.sampling)
                record.add_result(cell.decode(ids, plan.max_new_tokens, drawn), plan.keep_proposals)
                if plan.replay and not cell.is_baseline:
                    record.seconds = {}  # a replay is not timed
            records[place] = record
            if cell.is_baseline:
                answers[cell.sampling] = record
            for ready in [p for p in waiting if plan.cells[p].sampling in answers or not plan.has_baseline]:
                other = plan.cells[ready]
                answer = answers.get(other.sampling)
                if plan.auditor and answer and other.sampling.temperature == 0 and not other.is_baseline:
                    plan.auditor.judge(other, records[ready], answer, inputs[other.sampling], in_fp32)
                journal.write(records[ready])
                waiting.remove(ready)
        journal.bar.update(1)
    return [records[place] for place in sorted(records)]


def _new_record(plan: _Plan, cell: Cell, prompt: Conversation, turn: int, num_prompt_tokens: int) -> Record:
    """Return a record of the given cell and prompt, without a result."""
    target = cell.models.target
    return Record(
        benchmark=plan.benchmark,
        prompt_id=prompt.id,
        turn=turn,
        draft=cell.draft,
        decoder=cell.label,
        temperature=cell.sampling.temperature,
        top_p=cell.sampling.top_p,
        top_k=cell.sampling.top_k,
        max_new_tokens=plan.max_new_tokens,
        category=prompt.category,
        settings=cell.settings,
        rule=RULE if plan.replay and not cell.is_baseline else cell.rule,
        target=f"{target.name}/{str(target.dtype).removeprefix('torch.')}",
        num_prompt_tokens=num_prompt_tokens,
    )


def _warm_up(plan: _Plan, prompt: list[int]) -> None:
    for cell in plan.cells:
        for _ in range(plan.num_warmup):
            cell.decode(prompt, min(plan.max_new_tokens, WARMUP_TOKENS))


def _running_numbers(records: Sequence[Record], replay: bool) -> str:
    """Return τ and speedup so far of the most recent cell."""
    last = next((record for record in reversed(records) if record.decoder != BASELINE), None)
    if last is None:
        return ""
    group = [r for r in records if (r.draft, r.decoder, r.sampling) == (last.draft, last.decoder, last.sampling)]
    base = select(records, decoder=BASELINE, sampling=last.sampling)
    text = f"{last.draft} {last.decoder} τ {acceptance_length(group):.2f}".strip()
    return f"{text} speedup {speedup(group, base):.2f}×" if base and not replay else text
