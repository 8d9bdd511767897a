"""The gap between a published and a measured acceptance length, split into the differences of their conditions.

Starting from the measured conditions, one factor at a time is changed to the published one if records under the changed
condition exist. Factors without such records are listed; their joint share is the remainder, so the parts add up to
the gap. The order is that of `FACTORS`. If factors interact, the shares depend on the order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from hass_lightning.measure.metrics import CONVENTIONS
from hass_lightning.measure.record import Record, group_by
from hass_lightning.measure.statistics import LEVEL, Interval

OWN_CONVENTION = "tau_micro"
# factor -> how to measure it
FACTORS = {
    "tree": "hass-benchmark with this decoder in decoders=[…] (replay=true measures many shapes on the same answers)",
    "temperature": "hass-benchmark with temperatures=[…], and the decoder's proposals for the acceptance rule",
    "prompts": "hass-benchmark with benchmarks=[…]",
    "template": "hass-benchmark with target.chat_template=…, and mine.template of that run",
    "precision": "hass-benchmark with target.dtype=…",
    "answer_length": "hass-benchmark with a larger max_new_tokens (shorter answers are cut from the records)",
    "training_rows": "train a head on as many rows, and give mine.training_rows of its run",
}
Metric = Callable[[Sequence[Record]], float]


@dataclass(frozen=True)
class Measurement:
    """Records under one set of conditions. An unknown condition is None."""

    records: tuple[Record, ...]
    conditions: Mapping[str, Any]
    draft: str = ""


@dataclass(frozen=True)
class Step:
    """The change of the acceptance length when `factor` is changed to that of the reference."""

    factor: str
    mine: Any
    reference: Any
    change: Interval


@dataclass(frozen=True)
class Gap:
    """`mine` + Σ steps + remainder = `reference`."""

    mine: Interval
    reference: float
    convention: str
    steps: tuple[Step, ...]
    remainder: Interval
    not_evaluated: tuple[str, ...]  # factors that differ, and are part of the remainder
    not_stated: tuple[str, ...]  # factors that the reference, or the records, do not state


def measurements_of(records: Sequence[Record], template: Any = None, training_rows: Any = None) -> list[Measurement]:
    """Group records by their conditions; `template` and `training_rows` are not in the records.

    The template is part of the target's name and prompts, so it is known only if it is given.
    """

    def conditions(record: Record) -> dict[str, Any]:
        return {
            "tree": {"decoder": record.decoder, **record.settings},
            "temperature": {
                "temperature": record.temperature, "top_p": record.top_p, "top_k": record.top_k, "rule": record.rule,
            },
            "prompts": record.benchmark,
            "template": template,
            "precision": record.target.rpartition("/")[2],
            "answer_length": record.max_new_tokens,
            "training_rows": training_rows,
        }  # fmt: skip

    groups = group_by(
        [record for record in records if any(record.drafted)],
        lambda record: (record.draft, json.dumps(conditions(record), sort_keys=True, default=str)),
    )
    return [Measurement(tuple(group), conditions(group[0]), group[0].draft) for group in groups.values()]


def truncated(found: Measurement, max_new_tokens: int) -> Measurement:
    """Return the same answers cut at fewer tokens: the cycles up to the one that reaches the limit."""
    records = []
    for record in found.records:
        lengths = 1 + np.cumsum(np.array(record.accepted, int) + 1)  # the first token is that of the prefill
        kept = int(np.searchsorted(lengths, max_new_tokens)) + 1
        tokens = min(record.num_tokens, max_new_tokens)
        cut = {name: getattr(record, name)[:kept] for name in ("accepted", "drafted", "nodes")}
        records.append(replace(record, **cut, num_tokens=tokens, max_new_tokens=max_new_tokens))
    return replace(found, records=tuple(records), conditions={**found.conditions, "answer_length": max_new_tokens})


def matches(value: Any, stated: Any) -> bool:
    """Return whether a condition is the stated one: equal, or equal in every stated key.

    A single value stated for a condition with several keys is that of the first key (`temperature: 0`, `tree: chain`).
    """
    if isinstance(value, Mapping):
        if not isinstance(stated, Mapping):
            stated = {next(iter(value)): stated}
        return all(value.get(key) == each for key, each in stated.items())
    return bool(value == stated)


def explain_gap(reference: Mapping[str, Any], mine: Measurement, others: Sequence[Measurement] = ()) -> Gap:
    """Split reference - mine into one step per factor that can be evaluated, and a remainder.

    Args:
        reference: `acceptance_length`, its `convention` (a name in `records.CONVENTIONS`; null: `tau_micro`), and the
            conditions that it states, by the names of `FACTORS`.
        mine: the measurement to explain, as τ (micro, bonus token counted).
        others: measurements under other conditions, of the same head or of one with the reference's training rows.

    Raises:
        ValueError: if the acceptance length is missing, or the convention or a condition is unknown.
    """
    value = reference.get("acceptance_length")
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"gap.reference.acceptance_length={value} must be the published number.")
    convention = reference.get("convention") or OWN_CONVENTION
    if convention not in CONVENTIONS:
        raise ValueError(f"gap.reference.convention={convention} must be one of {', '.join(CONVENTIONS)}.")
    stated = {k: v for k, v in reference.items() if k not in ("acceptance_length", "convention") and v is not None}
    unknown = [key for key in stated if key not in (*FACTORS, "source")]
    if unknown:
        raise ValueError(f"gap.reference.{unknown[0]} is not a condition: use {', '.join(FACTORS)}.")
    own, metric = CONVENTIONS[OWN_CONVENTION], CONVENTIONS[convention]
    steps = []
    if convention != OWN_CONVENTION:
        change = difference((mine.records, own), (mine.records, metric))
        steps.append(Step("convention", OWN_CONVENTION, convention, change))
    length = stated.get("answer_length")
    pool = [each for each in others if each.draft == mine.draft or _same_rows(each, stated)]
    if length is not None:
        pool += [truncated(each, length) for each in (mine, *pool) if each.conditions["answer_length"] > length]
    current, missing = mine, _differing(mine, stated)
    while missing:
        reachable = [(changed, each) for each in pool if (changed := _changed(current, each)) <= missing and changed]
        reachable = [(c, each) for c, each in reachable if all(matches(each.conditions[f], stated[f]) for f in c)]
        if not reachable:
            break
        order = list(FACTORS)
        changed, chosen = min(reachable, key=lambda pair: (len(pair[0]), sorted(map(order.index, pair[0]))))
        names = [name for name in order if name in changed]
        steps.append(
            Step(
                " + ".join(names),
                _shown([current.conditions[name] for name in names]),
                _shown([stated[name] for name in names]),
                difference((current.records, metric), (chosen.records, metric)),
            )
        )
        current, missing = chosen, missing - changed
    at = difference((), (current.records, metric))  # τ under the conditions with records
    left = float(value) - at.value
    unstated = [name for name in FACTORS if name not in stated or mine.conditions[name] is None]
    return Gap(
        difference((), (mine.records, own)),
        float(value),
        convention,
        tuple(steps),
        Interval(left, left - (at.high - at.value), left + (at.value - at.low)),
        tuple(name for name in FACTORS if name in missing),
        tuple(name for name in unstated if name not in missing),
    )


def _same_rows(found: Measurement, stated: Mapping[str, Any]) -> bool:
    rows = found.conditions["training_rows"]
    return rows is not None and rows == stated.get("training_rows")


def _differing(found: Measurement, stated: Mapping[str, Any]) -> set[str]:
    """Return the stated factors whose measured condition is known and differs."""
    known = [name for name in FACTORS if name in stated and found.conditions[name] is not None]
    return {name for name in known if not matches(found.conditions[name], stated[name])}


def _changed(one: Measurement, other: Measurement) -> set[str]:
    return {name for name in FACTORS if one.conditions[name] != other.conditions[name]}


def _shown(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def difference(before: tuple[Any, ...], after: tuple[Sequence[Record], Metric]) -> Interval:
    """Return metric(after) - metric(before) with its 95 % jackknife interval over questions.

    The two sides are paired if they have the same questions. `before` is (records, metric), or () for 0.
    """
    sides = [(_questions(records), metric) for records, metric in (side for side in (before, after) if side)]
    values = [metric(_joined(groups)) for groups, metric in sides]
    signs = [-1, 1][-len(sides) :]
    value = sum(sign * each for sign, each in zip(signs, values, strict=True))
    without = [[metric(_joined(groups, key)) for key in groups] for groups, metric in sides]
    if len(sides) == 2 and set(sides[0][0]) == set(sides[1][0]):
        keys = list(sides[0][0])
        second = dict(zip(sides[1][0], without[1], strict=True))
        without = [[second[key] - first for key, first in zip(keys, without[0], strict=True)]]
    count = min(len(each) for each in without)
    if count < 2:
        return Interval(value, math.nan, math.nan)
    variance = sum((len(each) - 1) * float(np.var(each)) for each in without)
    margin = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance)
    return Interval(value, value - margin, value + margin)


def _questions(records: Sequence[Record]) -> dict[Any, list[Record]]:
    return group_by(records, lambda record: record.question)


def _joined(groups: Mapping[Any, list[Record]], left_out: Any = None) -> list[Record]:
    return [record for key, group in groups.items() if key != left_out for record in group]
