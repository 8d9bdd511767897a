"""What a benchmark writes: one JSON line per prompt, turn and decoder, and sums over such lines.

The metrics read from them are in `records.py`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hass_lightning.types import DecodeResult, Sampling

BASELINE = "autoregressive"  # the decoder that every speedup and every identity check is measured against
Question = tuple[str, str]  # (benchmark, prompt id)


@dataclass
class Record:
    """One answer of one decoder: what identifies it, and the trace of `DecodeResult`.

    `draft` is "" for decoders that use no draft head. `identical` compares with the autoregressive answer in the same
    dtype (None: sampled, or the baseline itself); `difference` then holds the `position` of the first differing token,
    both tokens and the gap between the target's two greatest logits there, in this decoder and in the baseline.
    `fp32_identical` is the same comparison, both decoded again in fp32 (None: not one of the checked prompts).
    """

    benchmark: str
    prompt_id: str
    turn: int
    draft: str
    decoder: str
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    max_new_tokens: int = 0
    category: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # of the decoder: the size of its tree, …
    rule: str = ""  # how drafted tokens are accepted (field.md §3.5: a number at T > 0 means nothing without it)
    target: str = ""  # name and dtype
    num_prompt_tokens: int = 0
    num_tokens: int = 0  # new tokens, end token included, cut at the limit
    token_ids: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)  # draft tokens accepted, per cycle
    drafted: list[int] = field(default_factory=list)  # greatest depth offered, per cycle
    nodes: list[int] = field(default_factory=list)  # draft tokens verified, per cycle
    seconds: dict[str, float] = field(default_factory=dict)  # prefill, draft, verify, bookkeeping
    proposals: list[list[int]] = field(default_factory=list)  # drafted token ids, per cycle
    identical: bool | None = None
    difference: dict[str, float] | None = None
    fp32_identical: bool | None = None

    @property
    def question(self) -> Question:
        """The unit of every average over prompts and of all resampling."""
        return self.benchmark, self.prompt_id

    @property
    def sampling(self) -> Sampling:
        """How its tokens were drawn."""
        return Sampling(self.temperature, self.top_p, self.top_k)

    @property
    def key(self) -> tuple:
        """What a resumed run recognises a finished line by."""
        decoder = (self.draft, self.decoder, json.dumps(self.settings, sort_keys=True), self.rule)
        name = (self.target, self.benchmark, self.prompt_id, self.turn, *decoder)
        return (*name, self.temperature, self.top_p, self.top_k, self.max_new_tokens)

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds of the answer, prefill included."""
        return sum(self.seconds.values())

    @property
    def decode_seconds(self) -> float:
        """Wall-clock seconds without the prefill."""
        return self.total_seconds - self.seconds.get("prefill", 0.0)

    def add_result(self, result: DecodeResult, keep_proposals: bool = True) -> Record:
        """Take over the trace of a decoded answer."""
        self.token_ids, self.num_tokens = list(result.token_ids), len(result.token_ids)
        self.accepted, self.drafted, self.nodes = list(result.accepted), list(result.drafted), list(result.nodes)
        self.seconds = dict(result.seconds)
        self.proposals = [list(ids) for ids in result.proposals] if keep_proposals else []
        return self

    def to_json(self) -> str:
        """One line, without the line end."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read a line back; keys of a newer version are ignored.

        Raises:
            ValueError: no JSON object, or one that names no prompt and decoder.
        """
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError(f"not a record: {line[:80]!r}")
        known = {item.name for item in fields(cls)}
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except TypeError as error:
            raise ValueError(f"not a record ({error}): {line[:80]!r}") from error


def read_records(path: str | Path) -> list[Record]:
    """The records of a file; a last line that a kill cut short is dropped.

    Raises:
        ValueError: the file is missing, or a line before the last is damaged (it is named).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there are no records at {path}: run hass-benchmark first.")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line))
        except ValueError as error:
            if number < len(lines):  # a complete line ends with a line end, so that an empty string follows it
                raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def select(records: Iterable[Record], **values: Any) -> list[Record]:
    """The records whose fields have these values: `select(records, decoder="chain", temperature=0.0)`."""
    return [record for record in records if all(getattr(record, key) == value for key, value in values.items())]


@dataclass
class Totals:
    """Sums over the turns of one question, or over several questions."""

    verified_tokens: int = 0  # Σ (accepted + 1)
    forwards: int = 0  # cycles
    num_tokens: int = 0
    decoded_tokens: int = 0  # num_tokens without the one that each prefill yields
    seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, record: Record) -> None:
        """Count one answer."""
        self.verified_tokens += sum(record.accepted) + len(record.accepted)
        self.forwards += len(record.accepted)
        self.num_tokens += record.num_tokens
        self.decoded_tokens += max(record.num_tokens - 1, 0)
        self.seconds += record.total_seconds
        self.decode_seconds += record.decode_seconds


def totals(records: Iterable[Record]) -> Totals:
    """Sums over all records."""
    result = Totals()
    for record in records:
        result.add(record)
    return result


def totals_by_question(records: Iterable[Record]) -> dict[Question, Totals]:
    """Sums per question, both turns together: the unit of resampling (field.md §6.2)."""
    result: dict[Question, Totals] = defaultdict(Totals)
    for record in records:
        result[record.question].add(record)
    return dict(result)


def matched(records: Iterable[Record], baseline: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """The records of both sides that answer the same turn of the same question under the same sampling."""

    def keyed(side: Iterable[Record]) -> dict[tuple, Record]:
        return {(*record.question, record.turn, record.sampling): record for record in side}

    ours, theirs = keyed(records), keyed(baseline)
    common = [key for key in ours if key in theirs]
    return [ours[key] for key in common], [theirs[key] for key in common]
