"""Answers as coloured tokens: what was drafted, what was accepted, what the target wrote itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hass_lightning.measure.records import Record, acceptance_length

MAX_GUESSES = 12  # rejected guesses named in a tooltip


@dataclass(frozen=True)
class Piece:
    """One token of an answer.

    `kind` is `accepted` (drafted and right), `target` (written by the target after all drafts were accepted, or without
    any), `corrected` (written by the target where the draft was wrong), or `rejected` (a chain's wrong guess, no part
    of the answer).
    """

    text: str
    kind: str
    hint: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer for the report."""

    label: str
    prompt_id: str
    benchmark: str
    turn: int
    tau: float
    num_tokens: int
    num_cycles: int
    place: str = ""  # "worst 1", …, "best" among the answers of its line
    question: str = ""
    pieces: list[Piece] = field(default_factory=list)


def worst_answers(
    series: Mapping[str, Sequence[Record]],
    tokenizer: Any = None,
    prompts: Mapping[str, str] | None = None,
    num_worst: int = 3,
) -> list[Answer]:
    """The answers with the fewest tokens per target forward, of each line, and its best one for contrast.

    Args:
        series: label to records. tokenizer: with `decode(ids)`; None shows token ids. prompts: text by prompt id.
    """
    found = []
    for label, records in series.items():
        drafted = [record for record in records if any(record.drafted) and record.token_ids]
        ranked = sorted(drafted, key=lambda record: acceptance_length([record]))
        chosen = [(record, f"worst {rank}") for rank, record in enumerate(ranked[:num_worst], start=1)]
        chosen += [(record, "best") for record in ranked[num_worst:][-1:]]
        found += [make_answer(record, label, tokenizer, prompts, place) for record, place in chosen]
    return found


def make_answer(
    record: Record, label: str, tokenizer: Any = None, prompts: Mapping[str, str] | None = None, place: str = ""
) -> Answer:
    """One record as an `Answer`."""
    return Answer(
        label,
        record.prompt_id,
        record.benchmark,
        record.turn,
        acceptance_length([record]),
        record.num_tokens,
        len(record.accepted),
        place,
        (prompts or {}).get(record.prompt_id, ""),
        pieces_of(record, tokenizer),
    )


def pieces_of(record: Record, tokenizer: Any = None) -> list[Piece]:
    """The tokens of an answer with their kinds: first the prefill's, then cycle by cycle the accepted and the target's.

    The last cycle may be cut by the length limit or a stop token.
    """
    texts = [text.replace("\n", "⏎\n") for text in token_texts(record.token_ids, tokenizer)]
    pieces = [Piece(texts[0], "target", "token of the prefill")] if texts else []
    position = 1
    for cycle, (accepted, depth) in enumerate(zip(record.accepted, record.drafted, strict=False)):
        guesses = record.proposals[cycle] if cycle < len(record.proposals) else []
        nodes = record.nodes[cycle] if cycle < len(record.nodes) else len(guesses)
        hint = f"cycle {cycle + 1}: {accepted} of depth {depth} accepted, {nodes} tokens drafted"
        pieces += [Piece(text, "accepted", hint) for text in texts[position : position + accepted]]
        position += accepted
        if position >= len(texts):
            break
        wrong = _rejected(guesses, record.token_ids[position - accepted : position])
        if accepted < depth and wrong:
            if nodes == depth:  # a chain: its first wrong guess stood in this very place
                pieces.append(Piece(token_text(wrong[0], tokenizer).replace("\n", "⏎"), "rejected", hint))
            named = ", ".join(repr(token_text(token, tokenizer)) for token in wrong[:MAX_GUESSES])
            hint += f"; rejected: {named}{', …' if len(wrong) > MAX_GUESSES else ''}"
        pieces.append(Piece(texts[position], "corrected" if accepted < depth else "target", hint))
        position += 1
    return pieces + [Piece(text, "target") for text in texts[position:]]


def _rejected(guesses: Sequence[int], accepted: Sequence[int]) -> list[int]:
    """The guesses without one copy of each accepted token, repeats shown once."""
    left = list(guesses)
    for token in accepted:
        if token in left:
            left.remove(token)
    return list(dict.fromkeys(left))


def token_text(token: int, tokenizer: Any = None) -> str:
    """One token alone."""
    return f"{token} " if tokenizer is None else str(tokenizer.decode([token]))


def token_texts(token_ids: Sequence[int], tokenizer: Any = None) -> list[str]:
    """The text that each token adds: what decoding up to it yields beyond decoding up to the one before.

    Tokens of an unfinished character add nothing; the token that finishes it adds all.
    """
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    texts, shown = [], ""
    for count in range(1, len(token_ids) + 1):
        now = str(tokenizer.decode(list(token_ids[:count])))
        whole = now if count == len(token_ids) else now.rstrip("\ufffd")
        texts.append(whole[len(shown) :] if whole.startswith(shown) else token_text(token_ids[count - 1], tokenizer))
        shown = whole
    return texts
