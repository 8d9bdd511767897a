"""Every metric that is read from the records of a benchmark, each with its convention.

No other module knows conventions. A *cycle* is one target forward that verifies drafted tokens; it yields
its accepted draft tokens and one token of the target's own (the *bonus* token). The prefill is no cycle and the token
it yields belongs to none. The last cycle counts as verified, not as cut at the stop token or the length limit.
Functions return nan where there is nothing to divide by. A *question* is a benchmark prompt with all its turns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor

from hass_lightning.measure.trace import (
    BASELINE,
    Question,
    Record,
    Totals,
    matched,
    read_records,
    select,
    totals,
    totals_by_question,
)

__all__ = [
    "BASELINE",
    "Question",
    "Record",
    "Totals",
    "acceptance_histogram",
    "acceptance_length",
    "by_category",
    "conditional_rates",
    "conventions",
    "expected_acceptance",
    "hass_acceptance_length",
    "hass_speedup",
    "matched",
    "phase_seconds",
    "read_records",
    "select",
    "sglang_acceptance_length",
    "sglang_request_length",
    "spec_bench_acceptance_length",
    "specforge_simulated_length",
    "speedup",
    "survival",
    "tokens_per_second",
    "totals",
    "totals_by_question",
    "vllm_acceptance_length",
    "vllm_acceptance_rate",
    "vllm_position_rates",
]


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# --- The package's own conventions -----------------------------------------------------------------------------------


def acceptance_length(records: Sequence[Record], average: str = "micro", bonus: bool = True) -> float:
    """τ: tokens of verified cycles over the target forwards that verified them; prefill and its token left out.

    Convention: `micro` = Σ (accepted + 1) / Σ cycles; `macro` = mean over questions of that ratio. `bonus=False`
    counts accepted draft tokens alone (τ - 1).

    Raises:
        ValueError: an unknown `average`.
    """
    if average not in ("micro", "macro"):
        raise ValueError(f"average={average} is neither micro nor macro.")
    groups = [totals(records)] if average == "micro" else list(totals_by_question(records).values())
    lengths = [_ratio(group.verified_tokens, group.forwards) for group in groups]
    kept = [length for length in lengths if not math.isnan(length)]
    return _mean(kept) - (0 if bonus else 1)


def acceptance_histogram(records: Iterable[Record]) -> list[int]:
    """Number of cycles that accepted 0, 1, 2, … draft tokens (bonus token not counted)."""
    counts: dict[int, int] = defaultdict(int)
    for record in records:
        for accepted in record.accepted:
            counts[accepted] += 1
    return [counts[length] for length in range(max(counts) + 1)] if counts else []


def conditional_rates(records: Iterable[Record]) -> list[float]:
    """a_1, a_2, …: of the cycles that accepted depth k-1 and were offered depth k, the share that accepted depth k.

    Convention: conditional, micro; a cycle whose draft ended before depth k says nothing about a_k.
    """
    reached: dict[int, int] = defaultdict(int)
    passed: dict[int, int] = defaultdict(int)
    for record in records:
        for accepted, drafted in zip(record.accepted, record.drafted, strict=True):
            for depth in range(1, min(accepted + 1, drafted) + 1):
                reached[depth] += 1
                passed[depth] += accepted >= depth
    return [_ratio(passed[depth], reached[depth]) for depth in range(1, max(reached, default=0) + 1)]


def survival(records: Iterable[Record]) -> list[float]:
    """s_1, s_2, …: the chance that depth k is accepted were it always offered, s_k = a_1 · … · a_k.

    Convention: joint over depths, with drafts that ended early treated as censored (the Kaplan-Meier estimator).
    """
    result: list[float] = []
    for rate in conditional_rates(records):
        result.append(rate * (result[-1] if result else 1.0))
    return result


def by_category(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records grouped by the category of their prompt: any metric applies to a group."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.category].append(record)
    return dict(groups)


def tokens_per_second(records: Iterable[Record], prefill: bool = True) -> float:
    """Σ new tokens / Σ seconds; without prefill, its seconds and the one token it yields are left out."""
    sums = totals(records)
    return _ratio(sums.num_tokens, sums.seconds) if prefill else _ratio(sums.decoded_tokens, sums.decode_seconds)


def speedup(records: Iterable[Record], baseline: Iterable[Record], prefill: bool = True) -> float:
    """Baseline seconds per token over speculative seconds per token, on the prompts both answered.

    Convention: ratio of sums (micro) on matched question, turn and sampling; the same engine and process.
    """
    ours, theirs = matched(records, baseline)
    return _ratio(tokens_per_second(ours, prefill), tokens_per_second(theirs, prefill))


def phase_seconds(records: Iterable[Record]) -> dict[str, float]:
    """Σ seconds by phase."""
    result: dict[str, float] = defaultdict(float)
    for record in records:
        for phase, seconds in record.seconds.items():
            result[phase] += seconds
    return dict(result)


def expected_acceptance(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Σ_v min(p, q) over the last axis: the chance that a token drawn from q is accepted (Leviathan et al. 2023).

    Args:
        target_probs: p [..., V]. draft_probs: q [..., V].
    """
    return target_probs.minimum(draft_probs).sum(dim=-1)


# --- Conventions of others, computed from the same records -----------------------------------------------------------


def hass_acceptance_length(records: Sequence[Record]) -> float:
    """HASS and EAGLE scripts: mean over questions of (mean accepted draft tokens over the cycles of both turns) + 1.

    Convention: macro, bonus counted (`evaluation/acceptance_length.py`; hass.md §5.6).
    """
    return acceptance_length(records, "macro")


def hass_speedup(records: Iterable[Record], baseline: Iterable[Record]) -> float:
    """HASS, EAGLE and Spec-Bench scripts: mean over questions of tokens/s, over the same mean of the baseline.

    Convention: macro on both sides, prefill included. The scripts count the baseline's tokens by tokenising its cleaned
    text again, which this does not imitate (`evaluation/speed.py`; hass.md §5.6).
    """
    ours, theirs = matched(records, baseline)
    means = []
    for side in (ours, theirs):
        means.append(_mean([_ratio(each.num_tokens, each.seconds) for each in totals_by_question(side).values()]))
    return _ratio(*means)


def vllm_acceptance_length(records: Iterable[Record]) -> float:
    """vLLM: 1 + Σ accepted / number of drafts. Micro, bonus counted; steps without a draft are not counted.

    Source: `vllm/v1/spec_decode/metrics.py` (`num_drafts` rises only where draft tokens were scheduled).
    """
    offered = [(a, d) for record in records for a, d in zip(record.accepted, record.drafted, strict=True) if d > 0]
    return 1 + _ratio(sum(accepted for accepted, _ in offered), len(offered))


def vllm_acceptance_rate(records: Iterable[Record]) -> float:
    """vLLM: Σ accepted / Σ drafted tokens (all nodes of a tree). Micro, no bonus."""
    kept = list(records)
    return _ratio(sum(sum(record.accepted) for record in kept), sum(sum(record.nodes) for record in kept))


def vllm_position_rates(records: Iterable[Record]) -> list[float]:
    """vLLM: share of all drafts that accepted position k. Joint and unconditional, short drafts counted as misses."""
    offered = [(a, d) for record in records for a, d in zip(record.accepted, record.drafted, strict=True) if d > 0]
    depth = max((drafted for _, drafted in offered), default=0)
    return [_ratio(sum(accepted > k for accepted, _ in offered), len(offered)) for k in range(depth)]


def sglang_acceptance_length(records: Iterable[Record]) -> float:
    """SGLang's server (`avg_spec_accept_length`): Σ (accepted + 1) / Σ verify steps. Micro, bonus counted."""
    sums = totals(records)
    return _ratio(sums.verified_tokens, sums.forwards)


def sglang_request_length(records: Iterable[Record]) -> float:
    """SGLang's `meta_info`: completion tokens / `spec_verify_ct`, summed over requests.

    Convention: the token of the prefill is counted and the last cycle is cut where the answer ends.
    """
    sums = totals(records)
    return _ratio(sums.num_tokens, sums.forwards)


def spec_bench_acceptance_length(records: Iterable[Record]) -> float:
    """Spec-Bench (`evaluation/speed.py`): mean of all cycles' accepted lengths. Micro, bonus counted."""
    sums = totals(records)
    return _ratio(sums.verified_tokens, sums.forwards)


def specforge_simulated_length(step_accuracies: Iterable[float]) -> float:
    """SpecForge and TorchSpec: Σ_i Π_{j≤i} acc_j over teacher-forced accuracies. No bonus, correlation lost.

    Fed with the `conditional_rates` of a trace it is the decoded counterpart: τ - 1 of an untruncated chain.
    """
    total, product = 0.0, 1.0
    for accuracy in step_accuracies:
        product *= accuracy
        total += product
    return total


def conventions(records: Sequence[Record]) -> dict[str, float]:
    """One trace under every acceptance convention, for the table of a report."""
    return {
        "tau_micro": acceptance_length(records),
        "tau_macro": acceptance_length(records, "macro"),
        "tau_micro_without_bonus": acceptance_length(records, bonus=False),
        "hass_eagle": hass_acceptance_length(records),
        "vllm": vllm_acceptance_length(records),
        "vllm_acceptance_rate": vllm_acceptance_rate(records),
        "sglang_server": sglang_acceptance_length(records),
        "sglang_request": sglang_request_length(records),
        "spec_bench": spec_bench_acceptance_length(records),
        "specforge_simulated": specforge_simulated_length(conditional_rates(records)),
    }
