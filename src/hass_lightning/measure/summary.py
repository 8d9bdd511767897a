"""Records to table rows: one a (draft, decoder, benchmark, sampling), every number with its interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hass_lightning.measure.records import acceptance_length, speedup, tokens_per_second
from hass_lightning.measure.statistics import Interval
from hass_lightning.measure.trace import BASELINE, Record
from hass_lightning.measure.verdicts import metric_interval, speedup_interval


def summarize(records: Sequence[Record], seed: int = 0) -> list[dict[str, Any]]:
    """One row a (draft, decoder, benchmark, sampling), in the order of first appearance.

    Conventions: `acceptance_length` is τ micro with the bonus token, `speedup` includes the prefill
    (`speedup_without_prefill` does not). None stands for what cannot be said: no baseline, one question, sampled
    answers. `num_prompts` and the counts below it count questions, all turns of one together:

    - `num_identical`: equal to the autoregressive answer in the working dtype, of `num_compared`;
    - `largest_gap`: the largest gap between the target's two best logits where an answer departed (a tie, if small);
    - `num_fp32_identical`: equal in fp32, of `num_checked` that were decoded again. Anything less is a defect.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.draft, record.decoder, record.benchmark, record.sampling, record.target].append(record)
    rows = []
    for (draft, decoder, benchmark, sampling, target), group in groups.items():
        baseline = groups.get(("", BASELINE, benchmark, sampling, target), [])
        tau = metric_interval(group, "acceptance_length", seed)
        speed = speedup_interval(group, baseline, seed=seed)
        gaps = [each.difference.get("baseline_gap") for each in group if each.difference]
        rows.append(
            {
                "draft": draft,
                "decoder": decoder,
                "benchmark": benchmark,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "rule": group[0].rule,
                "target": target,
                "num_prompts": len({each.prompt_id for each in group}),
                **_ends("acceptance_length", tau),
                "acceptance_length_macro": _known(acceptance_length(group, "macro")),
                **_ends("speedup", speed),
                "speedup_without_prefill": _known(speedup(group, baseline, prefill=False)),
                "tokens_per_second": _known(tokens_per_second(group)),
                **_identity("num_identical", "num_compared", [(each.prompt_id, each.identical) for each in group]),
                "largest_gap": max((gap for gap in gaps if gap is not None), default=None),
                **_identity(
                    "num_fp32_identical", "num_checked", [(each.prompt_id, each.fp32_identical) for each in group]
                ),
            }
        )
    return rows


def _known(value: float) -> float | None:
    """None for nan and infinity, which JSON has no word for."""
    return value if math.isfinite(value) else None


def _ends(name: str, interval: Interval) -> dict[str, float | None]:
    values = {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: _known(value) for key, value in values.items()}


def _identity(name: str, of: str, verdicts: list[tuple[str, bool | None]]) -> dict[str, int | None]:
    """Questions all of whose compared turns are equal, and questions compared; None where none was."""
    by_question: dict[str, list[bool]] = defaultdict(list)
    for question, verdict in verdicts:
        if verdict is not None:
            by_question[question].append(verdict)
    if not by_question:
        return {name: None, of: 0}
    return {name: sum(all(each) for each in by_question.values()), of: len(by_question)}
