"""Acceptance length by properties of the cycle: position, context, category, repetition, entropy of the target.

A property belongs to the state in which a cycle drafts, i.e. to the first token that the draft has to predict. Every
cycle is in one group of each property, so the groups' tokens and cycles add up to those of τ.
Shapes: n tokens of an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hass_lightning.decoding.prompt_lookup import SuffixIndex
from hass_lightning.measure.record import Question, Record
from hass_lightning.measure.statistics import Interval, ratio_interval

MATCH = 3  # tokens of a suffix that occurred before
REPETITION = ("new text", "repeated, then different", "repeated and continued")
ENTROPY_EDGES = (0.05, 0.25, 0.5, 1.0, 2.0)  # nats


@dataclass(frozen=True)
class Cycle:
    """One cycle, with the state in which it drafts."""

    question: Question
    category: str
    num_tokens: int  # accepted draft tokens and the bonus token
    position: int  # tokens of the answer so far
    context: int  # tokens of prompt and answer so far
    repetition: str  # one of REPETITION
    entropy: float  # of the target's distribution of the next token, in nats (temperature 1)


def repetitions(prompt: Sequence[int], answer: Sequence[int], length: int = MATCH) -> list[str]:
    """Return for each token of the answer whether the `length` tokens before it occurred earlier in the text.

    If they did, the token either differs from the one that followed their latest earlier occurrence, or equals it (then
    prompt lookup would draft it).

    Args:
        prompt: token ids.
        answer: token ids, n.
        length: length of the suffix in tokens.
    """
    index = SuffixIndex(list(prompt[:1]), length)
    for token in prompt[1:]:
        index.append(token)
    found = []
    for token in answer:
        match = index.find()
        if match is None or match[0] < length:
            found.append(REPETITION[0])
        else:
            found.append(REPETITION[2 if index.tokens[match[1]] == token else 1])
        index.append(token)
    return found


def cycles_of(record: Record, repeated: Sequence[str], entropies: Sequence[float]) -> list[Cycle]:
    """Return the cycles of a record.

    Args:
        record: the record.
        repeated: n values of `repetitions`.
        entropies: n entropies of the target, before each token of the answer.
    """
    cycles, position = [], 1  # the token of the prefill belongs to no cycle
    for accepted in record.accepted:
        cycles.append(
            Cycle(
                record.question,
                record.category or record.benchmark,
                accepted + 1,
                position,
                record.num_prompt_tokens + position,
                repeated[position],
                entropies[position],
            )
        )
        position += accepted + 1
    return cycles


@dataclass(frozen=True)
class Group:
    """The cycles of one group: τ with its interval over questions, and how many there are."""

    label: str
    acceptance_length: Interval
    num_cycles: int
    num_questions: int


def _doubling(number: int, first: int) -> tuple[int, str]:
    """Return the range of a positive number: 1 … first, then ranges that end at doubled values."""
    low, high = 1, first
    while number > high:
        low, high = high + 1, 2 * high
    return low, f"{low}–{high}"


def _by_entropy(entropy: float) -> tuple[int, str]:
    place = sum(entropy >= edge for edge in ENTROPY_EDGES)
    edges = ("0", *(f"{edge:g}" for edge in ENTROPY_EDGES))
    return place, f"{edges[place]}–{edges[place + 1]}" if place < len(ENTROPY_EDGES) else f"≥ {edges[place]}"


# name -> (sort key, label) of the group of a cycle
FACTORS: dict[str, Callable[[Cycle], tuple[Any, str]]] = {
    "position": lambda cycle: _doubling(cycle.position, 16),
    "context": lambda cycle: _doubling(cycle.context, 64),
    "category": lambda cycle: (cycle.category, cycle.category),
    "repetition": lambda cycle: (REPETITION.index(cycle.repetition), cycle.repetition),
    "entropy": lambda cycle: _by_entropy(cycle.entropy),
}


def groups_of(cycles: Sequence[Cycle], factor: str) -> list[Group]:
    """Return τ of the groups of one of `FACTORS`, in order.

    τ of a group is the ratio of its tokens to its cycles, and the questions that have cycles in the group are resampled
    (`ratio_interval`; nan with one question).
    """
    members: dict[tuple[Any, str], list[Cycle]] = {}
    for cycle in cycles:
        members.setdefault(FACTORS[factor](cycle), []).append(cycle)
    groups = []
    for key in sorted(members):
        tokens: Counter[Question] = Counter()
        for cycle in members[key]:
            tokens[cycle.question] += cycle.num_tokens
        counts = Counter(cycle.question for cycle in members[key])
        interval = ratio_interval([tokens[each] for each in counts], list(counts.values()))
        groups.append(Group(key[1], interval, counts.total(), len(counts)))
    return groups
