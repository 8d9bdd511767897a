"""Acceptance profiles: survival by depth with intervals, in the forms with which engines simulate acceptance.

vLLM and SGLang can accept draft tokens at a given rate instead of comparing them with the target, so that throughput
under load can be measured without serving the head. A profile holds what they need (docs/serving.md).

Shapes: K depths, n questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hass_lightning.measure.metrics import depth_counts, survival
from hass_lightning.measure.record import Record, group_by
from hass_lightning.measure.statistics import Interval, ratio_interval
from hass_lightning.measure.verdicts import metric_interval
from hass_lightning.runs.files import write_whole

ALL = "all"  # the benchmark of a profile over several benchmarks


@dataclass(frozen=True)
class AcceptanceProfile:
    """Acceptance of one head, decoder and sampling on one benchmark.

    `survival` has one interval per depth 1, 2, …: the probability that this depth is accepted if every draft is that
    deep (`records.survival`). `acceptance_length` is τ as measured; it is smaller than `offered_length` if drafts ended
    early.
    """

    target: str
    draft: str
    decoder: str
    settings: dict[str, Any]
    rule: str
    benchmark: str
    temperature: float
    top_p: float
    top_k: int | None
    num_questions: int
    num_cycles: int
    acceptance_length: Interval
    survival: tuple[Interval, ...]

    @property
    def rates(self) -> list[float]:
        """The survival by depth, rounded to six decimals."""
        return [round(each.value, 6) for each in self.survival]

    @property
    def offered_length(self) -> float:
        """1 + Σ survival: tokens per cycle of an engine that always drafts K tokens."""
        return 1 + sum(self.rates)

    def vllm(self) -> dict[str, Any]:
        """Return the keys to add to vLLM's `--speculative-config`.

        The rates are unconditional: entry k is the probability that all of the first k tokens are accepted (vLLM
        divides adjacent ones). Source: `vllm/config/speculative.py`, since vllm-project/vllm#40662.
        """
        return {
            "num_speculative_tokens": len(self.rates),
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": self.rates,
        }

    def sglang(self) -> dict[str, str]:
        """Return the environment variables of SGLang's server.

        Its length counts the bonus token, as τ does; `match-expected` draws between the two nearest integers, so it
        reproduces the mean and not the distribution. Source: `python/sglang/srt/environ.py`.
        """
        return {
            "SGLANG_SIMULATE_ACC_LEN": f"{self.offered_length:.4f}",
            "SGLANG_SIMULATE_ACC_METHOD": "match-expected",
            "SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token",
        }

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values; an interval is [value, low, high], with None for an unknown end."""
        names = ("acceptance_length", "survival")
        values = {name: value for name, value in asdict(self).items() if name not in names}
        return {
            **values,
            "acceptance_length": _ends(self.acceptance_length),
            "survival": [_ends(each) for each in self.survival],
            "vllm": self.vllm(),
            "sglang": self.sglang(),
        }


def _ends(interval: Interval) -> list[float | None]:
    return [None if math.isnan(end) else round(end, 6) for end in astuple(interval)]


def survival_intervals(records: Sequence[Record], seed: int = 0) -> tuple[Interval, ...]:
    """Return the survival s_1 … s_K with 95 % intervals over questions.

    s_k is a product of k ratios of sums over questions, so the bootstrap-t of `ratio_interval` applies to it. K is the
    deepest draft. Ends are clipped to [0, 1]; they are nan where nothing was accepted, and with one question.
    """
    values = survival(records)
    deepest = max((depth for record in records for depth in record.drafted), default=0)
    counts: NDArray[Any] = np.array(
        [_padded(depth_counts(group), len(values)) for group in group_by(records, lambda r: r.question).values()]
    )  # [n, K, 2]
    intervals = []
    for k, value in enumerate(values, start=1):
        passed, reached = counts[:, :k, 0].T, counts[:, :k, 1].T  # [k, n]
        found = ratio_interval(passed, reached, seed)  # nan if one of the sums is 0
        intervals.append(Interval(value, *(float(np.clip(end, 0, 1)) for end in (found.low, found.high))))
    if values and values[-1] == 0:  # deeper tokens were offered, and never reached
        intervals += [intervals[-1]] * (deepest - len(values))
    return tuple(intervals)


def _padded(counts: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    return counts + [(0, 0)] * (length - len(counts))


def acceptance_profiles(records: Iterable[Record]) -> list[AcceptanceProfile]:
    """Return a profile per head, decoder and sampling: over all benchmarks, then one per benchmark.

    Decoders without a head are left out: prompt lookup drafts where the text repeats itself, so its survival does not
    describe an engine that drafts in every cycle.
    """
    drafting = [record for record in records if record.draft and any(record.drafted)]
    profiles = []
    for group in group_by(drafting, _series).values():
        benchmarks = group_by(group, lambda record: record.benchmark)
        parts = {ALL: group} | benchmarks if len(benchmarks) > 1 else benchmarks
        profiles += [_profile(name, part) for name, part in parts.items()]
    return profiles


def _series(record: Record) -> tuple[Any, ...]:
    settings = json.dumps(record.settings, sort_keys=True)
    return record.target, record.draft, record.decoder, settings, record.rule, record.sampling


def _profile(benchmark: str, records: list[Record]) -> AcceptanceProfile:
    first = records[0]
    return AcceptanceProfile(
        target=first.target,
        draft=first.draft,
        decoder=first.decoder,
        settings=first.settings,
        rule=first.rule,
        benchmark=benchmark,
        temperature=first.temperature,
        top_p=first.top_p,
        top_k=first.top_k,
        num_questions=len({record.question for record in records}),
        num_cycles=sum(len(record.accepted) for record in records),
        acceptance_length=metric_interval(records),
        survival=survival_intervals(records),
    )


def write_acceptance_profile(path: Path, records: Iterable[Record]) -> None:
    """Write the profiles of all series to a JSON file.

    Raises:
        ValueError: no decoder drafted tokens with a head.
    """
    profiles = acceptance_profiles(records)
    if not profiles:
        raise ValueError("profile=true needs a head and a decoder that uses it, e.g. decoders=[autoregressive,chain].")
    text = json.dumps({"profiles": [profile.to_json() for profile in profiles]}, indent=2, allow_nan=False)
    write_whole(path, text + "\n")
