"""Where τ comes from: acceptance by property of the cycle, drift of the head's features, calibration of its confidence.

Everything is computed from the records of a benchmark and one forward of the target over each answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.measure.acceptance_factors import FACTORS, Cycle, Group, cycles_of, groups_of, repetitions
from hass_lightning.measure.benchmark_cells import turn_messages
from hass_lightning.measure.calibration import Bin, auroc_interval, calibration_error, reliability
from hass_lightning.measure.draft_trace import DepthTrace, entropies, trace_drafts
from hass_lightning.measure.record import BASELINE, Question, Record, group_by
from hass_lightning.measure.statistics import Interval, ratio_interval
from hass_lightning.measure.verdicts import metric_interval
from hass_lightning.runs.progress import progress_bar
from hass_lightning.types import Conversation, Message

DEPTH = 5  # draft depths that are traced
Answer = tuple[Question, int, Any, tuple[int, ...]]  # question, turn, sampling, tokens


@dataclass(frozen=True)
class Drift:
    """One draft depth, averaged over all positions where the draft before it is accepted."""

    depth: int
    num_positions: int
    norm: Interval  # ‖predicted feature‖ / ‖target's feature‖
    cosine: float
    own: Interval  # share of the attention on predicted features


@dataclass(frozen=True)
class Calibration:
    """The draft tokens of one depth, or of all depths (0)."""

    depth: int
    num_tokens: int
    accuracy: float
    error: float  # expected calibration error
    auroc: Interval


@dataclass(frozen=True)
class Explanation:
    """One head, decoder and sampling. Drift and calibration do not depend on the decoder."""

    draft: str
    decoder: str
    temperature: float
    num_questions: int
    acceptance_length: Interval
    factors: dict[str, list[Group]]
    drift: list[Drift]
    calibration: list[Calibration]  # all depths, then each depth
    reliability: list[Bin]  # all depths

    @property
    def label(self) -> str:
        """Name in plots and tables."""
        return f"{self.draft} · {self.decoder}" + (f" · T={self.temperature:g}" if self.temperature else "")


def explain(
    models: Mapping[str, DecodingModels],
    prompts: Mapping[str, Sequence[Conversation]],
    records: Sequence[Record],
    depth: int = DEPTH,
) -> list[Explanation]:
    """Explain the acceptance length of every head, decoder and sampling.

    Args:
        models: models by the heads' labels, as in `run_benchmark`.
        prompts: prompts by benchmark.
        records: records of these prompts, with the autoregressive ones of prompts with several turns.
        depth: number of draft depths to trace.

    Raises:
        ValueError: no decoder drafted with a head, or the records are of other prompts.
    """
    drafting = [record for record in records if record.draft and any(record.drafted)]
    if not drafting:
        raise ValueError("explain=true needs a head and a decoder that uses it, e.g. decoders=[autoregressive,chain].")
    read = _Reading(models, prompts, records, depth)
    cycles: dict[Any, list[Cycle]] = {}
    answers = group_by(drafting, _answer)
    with progress_bar("explain", len(answers), "answer") as bar:
        for group in answers.values():  # one forward of the target for all heads and decoders
            for series, found in read.cycles(group):
                cycles.setdefault(series, []).extend(found)
            bar.update(1)
    series_of = group_by(drafting, _series)
    return [_explanation(group, cycles[key], read.traces[_head(group[0])]) for key, group in series_of.items()]


def _answer(record: Record) -> Answer:
    return record.question, record.turn, record.sampling, tuple(record.token_ids)


def _head(record: Record) -> tuple[Any, ...]:
    return record.draft, record.sampling


def _series(record: Record) -> tuple[Any, ...]:
    return record.draft, record.decoder, record.rule, record.sampling


class _Reading:
    """Reads the answers with the target and the heads, and collects the traces of each head and sampling."""

    def __init__(
        self,
        models: Mapping[str, DecodingModels],
        prompts: Mapping[str, Sequence[Conversation]],
        records: Sequence[Record],
        depth: int,
    ):
        self.models, self.depth = models, depth
        self.prompts = {(name, prompt.id): prompt for name, group in prompts.items() for prompt in group}
        self.answers = {(*r.question, r.turn, r.sampling): r.token_ids for r in records if r.decoder == BASELINE}
        self.traces: dict[Any, list[tuple[Question, list[DepthTrace]]]] = {}

    def cycles(self, group: Sequence[Record]) -> list[tuple[Any, list[Cycle]]]:
        """Return series and cycles of the records of one answer, and trace the drafts of their heads."""
        first = group[0]
        prompt, answer = self._prompt(first), first.token_ids
        repeated = repetitions(prompt, answer)
        features: dict[tuple[int, ...], torch.Tensor] = {}  # by the layers that a head reads
        for draft in dict.fromkeys(record.draft for record in group):
            models = self.models[draft]
            target = models.target
            if target.feature_layers not in features:
                tokens = torch.tensor([[*prompt, *answer]], device=target.device)
                features[target.feature_layers] = target.encode(tokens)[0]
            read = features[target.feature_layers]
            traced = trace_drafts(models, prompt, answer, read, self.depth)
            self.traces.setdefault((draft, first.sampling), []).append((first.question, traced))
        entropy = entropies(models, read[len(prompt) - 1 : -1]).tolist()
        return [(_series(record), cycles_of(record, repeated, entropy)) for record in group]

    def _prompt(self, record: Record) -> list[int]:
        """Return the token ids of the prompt of a record, with the answers to the turns before it."""
        conversation = self.prompts[record.question]
        tokenizer = next(iter(self.models.values())).target.tokenizer
        said: tuple[Message, ...] = ()
        for turn, added in enumerate(turn_messages(conversation)[: record.turn + 1]):
            said += added
            if turn < record.turn:
                before = self.answers[(*record.question, turn, record.sampling)]
                said += (Message("assistant", tokenizer.decode(before, skip_special_tokens=True)),)
        ids = encode_prompt(tokenizer, said, conversation.tools)
        if len(ids) != record.num_prompt_tokens:
            raise ValueError(
                f"the record of prompt {record.prompt_id} of {record.benchmark} has {record.num_prompt_tokens} prompt "
                f"tokens, the prompt {len(ids)}: the records are of another version of the benchmark or template."
            )
        return ids


def _explanation(
    records: Sequence[Record], cycles: Sequence[Cycle], traces: Sequence[tuple[Question, list[DepthTrace]]]
) -> Explanation:
    first, depth = records[0], len(traces[0][1])
    unit = [_unit(traces, k) for k in range(depth)]
    confidence = [_kept(traces, k, "confidence") for k in range(depth)]
    hits = [_kept(traces, k, "hit") for k in range(depth)]
    every = np.concatenate(confidence), np.concatenate(hits), np.concatenate(unit)
    parts = [every, *zip(confidence, hits, unit, strict=True)]
    return Explanation(
        draft=first.draft,
        decoder=first.decoder,
        temperature=first.temperature,
        num_questions=len({record.question for record in records}),
        acceptance_length=metric_interval(records),
        factors={name: groups_of(cycles, name) for name in FACTORS},
        drift=[_drift(traces, k, unit[k]) for k in range(depth) if len(unit[k])],
        calibration=[_calibration(number, *part) for number, part in enumerate(parts) if len(part[0])],
        reliability=reliability(every[0], every[1], every[2].tolist()),
    )


def _kept(traces: Sequence[tuple[Question, list[DepthTrace]]], depth: int, name: str) -> NDArray[Any]:
    """Return one column of the traces at the positions that a draft reaches."""
    return np.concatenate([getattr(each[depth], name)[each[depth].reached].cpu().numpy() for _, each in traces])


def _unit(traces: Sequence[tuple[Question, list[DepthTrace]]], depth: int) -> NDArray[Any]:
    """Return the number of the question at each position of `_kept`."""
    numbers = {question: number for number, question in enumerate(dict.fromkeys(question for question, _ in traces))}
    counts = [int(each[depth].reached.sum()) for _, each in traces]
    return np.repeat([numbers[question] for question, _ in traces], counts)


def _drift(traces: Sequence[tuple[Question, list[DepthTrace]]], depth: int, unit: NDArray[Any]) -> Drift:
    _, unit = np.unique(unit, return_inverse=True)  # the questions whose drafts reach this depth
    counts = np.bincount(unit)

    def mean(name: str) -> Interval:
        values = _kept(traces, depth, name)
        sums = np.bincount(unit, weights=values)
        if not sums.any():
            return Interval(0.0, 0.0, 0.0)  # no predicted feature at depth 1
        return ratio_interval(sums, counts)

    cosine = float(_kept(traces, depth, "cosine").mean())
    return Drift(depth + 1, int(counts.sum()), mean("norm"), cosine, mean("own"))


def _calibration(depth: int, confidence: NDArray[Any], hits: NDArray[Any], unit: NDArray[Any]) -> Calibration:
    area = auroc_interval(confidence, hits, unit.tolist())
    return Calibration(depth, len(hits), float(hits.mean()), calibration_error(confidence, hits), area)
