"""The records of a benchmark: one JSON line per prompt, turn and decoder, and sums over records.

`metrics.py` computes metrics from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from hass_lightning.types import DecodeResult, Sampling

BASELINE = "autoregressive"  # the decoder that speedups and identity checks compare with
Question = tuple[str, str]  # (benchmark, prompt id)
Key = TypeVar("Key")


@dataclass
class Record:
    """One answer of one decoder: its identity, and the trace in `DecodeResult`.

    `draft` is "" for decoders that use no draft head. `identical` is the comparison with the autoregressive answer in
    the same dtype (None: sampled, or the baseline itself). If it is false, `difference` contains the `position` of the
    first differing token, both tokens, and the gap between the target's two largest logits there, in this decoder and
    in the baseline. `fp32_identical` is the same comparison with both decoded again in fp32 (None: not one of the
    checked prompts).
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
    settings: dict[str, Any] = field(default_factory=dict)  # settings of the decoder, such as the size of its tree
    rule: str = ""  # acceptance rule of draft tokens (necessary to interpret results at T > 0)
    target: str = ""  # name and dtype
    num_prompt_tokens: int = 0
    num_tokens: int = 0  # new tokens, end token included, truncated at the limit
    token_ids: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)  # draft tokens accepted, per cycle
    drafted: list[int] = field(default_factory=list)  # maximum depth offered, per cycle
    nodes: list[int] = field(default_factory=list)  # draft tokens verified, per cycle
    seconds: dict[str, float] = field(default_factory=dict)  # prefill, draft, verify, bookkeeping
    proposals: list[list[int]] = field(default_factory=list)  # ids of draft tokens, per cycle
    identical: bool | None = None
    difference: dict[str, float] | None = None
    fp32_identical: bool | None = None

    @property
    def question(self) -> Question:
        """The question, which is the unit of all averages over prompts and of resampling."""
        return self.benchmark, self.prompt_id

    @property
    def sampling(self) -> Sampling:
        """The sampling of its tokens."""
        return Sampling(self.temperature, self.top_p, self.top_k)

    @property
    def key(self) -> tuple[Any, ...]:
        """The key by which a resumed run recognizes a finished record."""
        decoder = (self.draft, self.decoder, json.dumps(self.settings, sort_keys=True), self.rule)
        name = (self.target, self.benchmark, self.prompt_id, self.turn, *decoder)
        return (*name, self.temperature, self.top_p, self.top_k, self.max_new_tokens)

    @property
    def total_seconds(self) -> float:
        """Seconds of the answer, prefill included."""
        return sum(self.seconds.values())

    @property
    def decode_seconds(self) -> float:
        """Seconds of the answer without the prefill."""
        return self.total_seconds - self.seconds.get("prefill", 0.0)

    def add_result(self, result: DecodeResult, keep_proposals: bool = True) -> Record:
        """Add the trace of a decoded answer."""
        self.token_ids, self.num_tokens = list(result.token_ids), len(result.token_ids)
        self.accepted, self.drafted, self.nodes = list(result.accepted), list(result.drafted), list(result.nodes)
        self.seconds = dict(result.seconds)
        self.proposals = [list(ids) for ids in result.proposals] if keep_proposals else []
        return self

    def to_json(self) -> str:
        """Return the record as one line without line end."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read a record from a line; keys of newer versions are ignored.

        Raises:
            ValueError: not a JSON object, or without prompt and decoder.
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
    """Read the records of a file, without an incomplete last line.

    Raises:
        ValueError: the file is missing, or a line before the last is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no records at {path}: run hass-benchmark first.")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line))
        except ValueError as error:
            # the line is complete if it ends with a line end, after which `split` gives an empty string
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def select(records: Iterable[Record], **values: Any) -> list[Record]:
    """Return the records whose fields have these values: `select(records, decoder="chain", temperature=0.0)`."""
    return [record for record in records if all(getattr(record, key) == value for key, value in values.items())]


def group_by(records: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, list[Record]]:
    """Group records by a key, in the order of first appearance."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


@dataclass(frozen=True)
class Totals:
    """Sums over the turns of one question, or over several questions."""

    verified_tokens: int  # Σ (accepted + 1)
    forwards: int  # cycles
    num_tokens: int
    decoded_tokens: int  # num_tokens without the token of each prefill
    seconds: float
    decode_seconds: float


def totals(records: Iterable[Record]) -> Totals:
    """Return the sums over all records."""
    kept = list(records)
    return Totals(
        sum(sum(record.accepted) + len(record.accepted) for record in kept),
        sum(len(record.accepted) for record in kept),
        sum(record.num_tokens for record in kept),
        sum(max(record.num_tokens - 1, 0) for record in kept),
        sum(record.total_seconds for record in kept),
        sum(record.decode_seconds for record in kept),
    )


def totals_by_question(records: Iterable[Record]) -> dict[Question, Totals]:
    """Return the sums by question, both turns together: the unit of resampling."""
    return {question: totals(group) for question, group in group_by(records, lambda r: r.question).items()}


def matched(records: Iterable[Record], baseline: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records of both sides that answer the same turn of the same question under the same sampling."""

    def keyed(side: Iterable[Record]) -> dict[tuple[Any, ...], Record]:
        return {(*record.question, record.turn, record.sampling): record for record in side}

    ours, theirs = keyed(records), keyed(baseline)
    common = [key for key in ours if key in theirs]
    return [ours[key] for key in common], [theirs[key] for key in common]
