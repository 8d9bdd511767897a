"""Summary of records: one table row per (draft, decoder, benchmark, sampling), with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hass_lightning.measure.metrics import acceptance_length, speedup, tokens_per_second
from hass_lightning.measure.record import BASELINE, Record, group_by
from hass_lightning.measure.statistics import Interval
from hass_lightning.measure.verdicts import metric_interval, speedup_interval


def summarize(records: Sequence[Record], seed: int = 0) -> list[dict[str, Any]]:
    """Return one row per (draft, decoder, benchmark, sampling), in the order of first appearance.

    Conventions: `acceptance_length` is τ micro with the bonus token, `speedup` includes the prefill
    (`speedup_without_prefill` does not). None means undefined: no baseline, one question, sampled answers.
    `num_prompts` and the counts below it count questions, all turns of one together:

    - `num_identical`: equal to the autoregressive answer in the working dtype, of `num_compared`;
    - `largest_gap`: the largest gap between the target's two largest logits where an answer differed (a tie if small);
    - `num_fp32_identical`: equal in fp32, of `num_checked` that were decoded again. Any smaller number is a defect.
    """
    groups = group_by(records, lambda r: (r.draft, r.decoder, r.benchmark, r.sampling, r.target))
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
                **_identity(group, "identical", "num_identical", "num_compared"),
                "largest_gap": max((gap for gap in gaps if gap is not None), default=None),
                **_identity(group, "fp32_identical", "num_fp32_identical", "num_checked"),
            }
        )
    return rows


def _known(value: float) -> float | None:
    """Return None for nan and infinity, which JSON cannot represent."""
    return value if math.isfinite(value) else None


def _ends(name: str, interval: Interval) -> dict[str, float | None]:
    values = {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: _known(value) for key, value in values.items()}


def _identity(records: Sequence[Record], verdict: str, name: str, of: str) -> dict[str, int | None]:
    """Return the number of questions whose compared turns are all equal, and of compared questions, or None."""
    compared = [record for record in records if getattr(record, verdict) is not None]
    questions = group_by(compared, lambda record: record.prompt_id).values()
    equal = sum(all(getattr(record, verdict) for record in turns) for turns in questions)
    return {name: equal if questions else None, of: len(questions)}
