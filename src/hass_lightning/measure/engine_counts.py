"""Counts of accepted draft tokens by position, read from a serving engine's metrics, log or responses."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_METRIC = re.compile(
    r"^vllm:spec_decode_(num_drafts|num_draft_tokens|num_accepted_tokens_per_pos|num_accepted_tokens)(?:_total)?"
    r"(?:\{(?P<labels>.*)\})?\s+(?P<value>[0-9.eE+-]+)\s*$",
    re.MULTILINE,
)
_LOG = re.compile(
    r"SpecDecoding metrics:.*?Mean acceptance length: (?P<length>[0-9.]+).*?"
    r"Accepted: (?P<accepted>\d+) tokens, Drafted: (?P<drafted>\d+) tokens, "
    r"Per-position acceptance rate: (?P<rates>[0-9.]+(?:, [0-9.]+)*)"
)
HISTOGRAMS = ("spec_correct_drafts_histogram", "spec_accept_histogram")  # the newer name first
FORMATS = (
    "the text of vLLM's /metrics, a log of vLLM with 'SpecDecoding metrics' lines, or the JSON of SGLang's responses "
    "with meta_info"
)


@dataclass(frozen=True)
class EngineCounts:
    """Number of cycles with a draft, and of those that accepted positions 1, 2, … (joint, not conditional).

    `reported_length` is the accepted length that the engine reports from separate counters. It may differ from `length`
    by `tolerance`, because of rounding and because the last cycle of an answer is truncated.
    """

    engine: str
    num_drafts: int
    accepted: tuple[int, ...]
    mean_drafted: float  # drafted tokens per draft
    reported_length: float
    tolerance: float

    @property
    def length(self) -> float:
        """1 + Σ positions: tokens per cycle, bonus token counted."""
        return 1 + sum(self.accepted) / self.num_drafts

    @property
    def consistent(self) -> bool:
        """Whether the reported length agrees with 1 + Σ positions."""
        return abs(self.length - self.reported_length) <= self.tolerance


def read_engine_counts(path: str | Path, before: str | Path | None = None) -> EngineCounts:
    """Read the counts of vLLM or SGLang.

    Args:
        path: the text of vLLM's `/metrics` (counters of `vllm/v1/spec_decode/metrics.py`), a vLLM log, or SGLang's
            responses as JSON, JSON lines or a list (`meta_info` with `spec_accept_histogram`).
        before: metrics at the start of the measurement, which are subtracted (counters run since the server started).

    Raises:
        ValueError: if the file is missing, has none of these formats or contains no draft, or if `before` is given for
            a format other than metrics.
    """
    text = _read(path, "served")
    if _METRIC.search(text):
        earlier = _counters(_read(before, "served_before")) if before else Counter()
        return _from_counters(_counters(text), earlier, path)
    if before:
        raise ValueError(f"served_before={before} requires vLLM metrics, which are cumulative; {path} has none.")
    found = _from_log(text) or _from_responses(text)
    if found is None:
        raise ValueError(f"served={path} has no counts by position. Give {FORMATS}.")
    return found


def _read(path: str | Path, key: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{key}={path} cannot be read ({error.strerror}): give {FORMATS}.") from error


def _counters(text: str) -> Counter[str]:
    """Return vLLM's counters, summed over engines; a position is `pos<k>`, from 0."""
    counts: Counter[str] = Counter()
    for match in _METRIC.finditer(text):
        name = match[1]
        if name.endswith("per_pos"):
            position = re.search(r'position="(\d+)"', match["labels"] or "")
            name = f"pos{position[1]}" if position else name
        counts[name] += round(float(match["value"]))
    return counts


def _from_counters(after: Counter[str], before: Counter[str], path: str | Path) -> EngineCounts:
    counts = {name: after[name] - before[name] for name in after}
    if any(count < 0 for count in counts.values()):
        raise ValueError(
            f"served={path} has smaller counts than served_before: the server was restarted, or the files are swapped."
        )
    positions = sorted(int(name[3:]) for name in counts if name.startswith("pos"))
    num_drafts = counts.get("num_drafts", 0)
    if not num_drafts or not positions:
        raise ValueError(f"served={path} contains no drafts: send requests, then read /metrics.")
    return EngineCounts(
        "vLLM metrics",
        num_drafts,
        tuple(counts[f"pos{position}"] for position in positions),
        counts.get("num_draft_tokens", 0) / num_drafts,
        1 + counts.get("num_accepted_tokens", 0) / num_drafts,
        tolerance=1e-9,
    )


def _from_log(text: str) -> EngineCounts | None:
    """Return the sum over the intervals of the log. Its rates have three decimals, so counts are rounded."""
    accepted: Counter[int] = Counter()
    num_drafts = drafted = total = 0
    for match in _LOG.finditer(text):
        rates = [float(rate) for rate in match["rates"].split(", ")]
        length = float(match["length"])
        # computed from the length if drafts were shorter than the maximum
        drafts = round(int(match["drafted"]) / len(rates))
        if abs(1 + int(match["accepted"]) / max(drafts, 1) - length) > 0.01:
            drafts = round(int(match["accepted"]) / (length - 1)) if length > 1 else drafts
        num_drafts, drafted, total = (
            num_drafts + drafts,
            drafted + int(match["drafted"]),
            total + int(match["accepted"]),
        )
        accepted.update({position: round(rate * drafts) for position, rate in enumerate(rates)})
    if not num_drafts:
        return None
    counts = tuple(accepted[position] for position in range(max(accepted) + 1))
    tolerance = 0.005 + 0.001 * len(counts)
    return EngineCounts("vLLM log", num_drafts, counts, drafted / num_drafts, 1 + total / num_drafts, tolerance)


def _from_responses(text: str) -> EngineCounts | None:
    """Return the sum over SGLang's responses: entry n of a histogram counts the cycles that accepted n draft tokens."""
    histogram: Counter[int] = Counter()
    completion = requests = 0
    drafted = 0.0
    for meta in _meta_infos(text):
        own = next((meta[name] for name in HISTOGRAMS if meta.get(name)), None)
        if own is None:
            continue
        histogram.update({accepted: int(count) for accepted, count in enumerate(own)})
        completion, requests = completion + int(meta.get("completion_tokens", 0)), requests + 1
        drafted += float(meta.get("spec_num_proposed_drafts") or meta.get("spec_draft_token_num") or 0)
    num_drafts = sum(histogram.values())
    if not num_drafts:
        return None
    deepest = max(accepted for accepted, count in histogram.items() if count or accepted == 0)
    accepted = tuple(sum(histogram[n] for n in histogram if n >= k) for k in range(1, max(deepest, 1) + 1))
    # the first token of an answer comes from the prefill; the last cycle is truncated at the end of the answer
    reported = (completion - requests) / num_drafts
    tolerance = (deepest + 1) * requests / num_drafts
    return EngineCounts("SGLang responses", num_drafts, accepted, drafted / num_drafts, reported, tolerance)


def _meta_infos(text: str) -> Iterator[dict[str, Any]]:
    """Yield every `meta_info` of a JSON document or of JSON lines, at any depth."""
    try:
        documents = [json.loads(text)]
    except ValueError:
        documents = []
        for line in text.splitlines():
            try:
                documents.append(json.loads(line))
            except ValueError:
                continue
    waiting = documents[::-1]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each[::-1]
        elif isinstance(each, dict):
            if isinstance(each.get("meta_info"), dict):
                yield each["meta_info"]
            waiting += [value for key, value in each.items() if key != "meta_info" and isinstance(value, list | dict)]
