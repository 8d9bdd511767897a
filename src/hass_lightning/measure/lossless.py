"""Comparison of greedy answers with the autoregressive one.

In fp32 they must be equal. In bf16 a forward over a tree rounds differently from a forward over one token, so an answer
may differ if the target's two largest logits are nearly equal. Such differences are recorded with position and gap.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hass_lightning.decoding.models import DecodingModels
from hass_lightning.measure.benchmark_cells import Cell
from hass_lightning.measure.record import Record

log = logging.getLogger(__name__)


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Return the position of the first differing token; None for equal answers."""
    for position, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return position
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


class Auditor:
    """Fills `identical`, `difference` and `fp32_identical` of greedy records, outside the timed code.

    Args:
        baseline: the greedy autoregressive cell.
        fp32_models: models by draft label; None: no check in fp32.
    """

    def __init__(self, baseline: Cell, fp32_models: Mapping[str, DecodingModels] | None, max_new_tokens: int):
        self.baseline, self.fp32_models, self.max_new_tokens = baseline, fp32_models, max_new_tokens
        self._prompt: list[int] = []
        self._known: dict[str, list[Any]] = {}  # gaps and fp32 answer of the baseline for the current prompt

    def judge(self, cell: Cell, record: Record, answer: Record, prompt: list[int], in_fp32: bool) -> None:
        """Compare `record` with the baseline's `answer` to the same prompt."""
        if prompt is not self._prompt:
            self._prompt, self._known = prompt, {}
        position = first_difference(record.token_ids, answer.token_ids)
        record.identical = position is None
        if position is not None:
            record.difference = self._difference(cell, record, answer, prompt, position)
        if in_fp32:
            record.fp32_identical = self._identical_in_fp32(cell, record, prompt)
            if not record.fp32_identical:
                log.error(
                    "%s of draft %r is not lossless: its fp32 answer to %s, turn %d, differs from the "
                    "autoregressive one",
                    *(cell.label, cell.draft, record.prompt_id, record.turn),
                )

    def _difference(
        self, cell: Cell, record: Record, answer: Record, prompt: list[int], position: int
    ) -> dict[str, Any]:
        if "gaps" not in self._known:
            self._known["gaps"] = self.baseline.traced().decode(prompt, self.max_new_tokens).logit_gaps
        ours = cell.traced().decode(prompt, position + 1)
        repeated = ours.token_ids == record.token_ids[: position + 1]  # otherwise the gap would belong to another token
        return {
            "position": position,
            "token": _at(record.token_ids, position),
            "baseline_token": _at(answer.token_ids, position),
            "gap": _at(ours.logit_gaps, position) if repeated else None,
            "baseline_gap": _at(self._known["gaps"], position),
        }

    def _identical_in_fp32(self, cell: Cell, record: Record, prompt: list[int]) -> bool | None:
        models = self._fp32_models(cell)
        if models.target is cell.models.target:  # the timed answers were already in fp32
            return record.identical
        if "fp32" not in self._known:
            self._known["fp32"] = self._fp32(self.baseline, prompt)
        return self._fp32(cell, prompt) == self._known["fp32"]

    def _fp32_models(self, cell: Cell) -> DecodingModels:
        assert self.fp32_models is not None
        label = cell.draft or next(iter(self.fp32_models))
        if label not in self.fp32_models:
            raise ValueError(f"fp32_models lacks the draft {label!r}: use the labels of models.")
        return self.fp32_models[label]

    def _fp32(self, cell: Cell, prompt: list[int]) -> list[int]:
        return replace(cell, models=self._fp32_models(cell)).decode(prompt, self.max_new_tokens).token_ids


def _at(values: list[Any], position: int) -> Any:
    return values[position] if position < len(values) else None
