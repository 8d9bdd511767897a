"""The answers shown on a page: the worst ones and the best one of each series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hass_lightning.measure.metrics import acceptance_length
from hass_lightning.measure.record import Record
from hass_lightning.measure.token_kinds import Piece, pieces_of


@dataclass(frozen=True)
class Answer:
    """An answer for the report; `place` is "worst 1", …, or "best" among the answers of its series."""

    label: str
    place: str
    record: Record
    question: str
    pieces: list[Piece]

    @property
    def prompt_id(self) -> str:
        """The id of its prompt."""
        return self.record.prompt_id

    @property
    def tau(self) -> float:
        """Its tokens per target forward."""
        return acceptance_length([self.record])


def worst_answers(
    series: Mapping[str, Sequence[Record]],
    tokenizer: Any = None,
    prompts: Mapping[str, str] | None = None,
    num_worst: int = 3,
) -> list[Answer]:
    """Return the answers of each series with the fewest tokens per target forward, and its best one for comparison.

    Args:
        series: records by label.
        tokenizer: with `decode(ids)`; None shows token ids.
        prompts: text by prompt id.
        num_worst: number of worst answers per series.
    """
    found = []
    for label, records in series.items():
        drafted = [record for record in records if any(record.drafted) and record.token_ids]
        ranked = sorted(drafted, key=lambda record: acceptance_length([record]))
        chosen = [(record, f"worst {rank}") for rank, record in enumerate(ranked[:num_worst], start=1)]
        for record, place in [*chosen, *((record, "best") for record in ranked[num_worst:][-1:])]:
            question = (prompts or {}).get(record.prompt_id, "")
            found.append(Answer(label, place, record, question, pieces_of(record, tokenizer)))
    return found
