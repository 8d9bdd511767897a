"""The training conversations: how much of them is learned, lost, repeated, or asked again in the evaluation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.data.prompts import SkippedConversation
from hass_lightning.types import Conversation, Tokens

EMPTY = "an empty loss mask"
LEAST_COVERAGE = 0.05
SHORTEST_PROMPT = 20  # characters: "go on" and "thanks" are asked everywhere


@dataclass
class Survey:
    """A sample of conversations, tokenised without a length limit."""

    num_conversations: int = 0
    encoded: list[tuple[Conversation, Tokens]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # by reason

    @property
    def num_empty(self) -> int:
        """Conversations of which no row is learned."""
        return self.skipped[EMPTY]


def survey(conversations: Iterable[Conversation], encode: Callable[[Conversation], Tokens]) -> Survey:
    """Encode each conversation; `encode` raises SkippedConversation for one it cannot use."""
    found = Survey()
    for conversation in conversations:
        found.num_conversations += 1
        try:
            found.encoded.append((conversation, encode(conversation)))
        except SkippedConversation as reason:
            found.skipped[str(reason)] += 1
    return found


def check_usable(found: Survey) -> Finding:
    """The chat template can follow the conversations."""
    others = {reason: count for reason, count in found.skipped.items() if reason != EMPTY}
    lost, num = sum(others.values()), found.num_conversations
    if not lost:
        return ok("template", f"{num} conversations fit the chat template")
    cure = "see the reasons: another chat template, or conversations without what it refuses."
    message = f"{lost} of {num} conversations cannot be used: {others}"
    return (error if lost == num else warning)("template", message, cure)


def check_coverage(found: Survey) -> Finding:
    """Share of tokens whose row is learned: at 0 loss and accuracy stay 0, without an error from anybody."""
    marked = sum(int(tokens.loss_mask.sum()) for _, tokens in found.encoded)
    share = marked / max(1, sum(len(tokens) for _, tokens in found.encoded))
    empty = f"; {found.num_empty} of {found.num_conversations} conversations have an empty mask" * bool(found.num_empty)
    message = f"{100 * share:.1f} % of the tokens are learned{empty}"
    cure = (
        "look at the preview: the template's {% generation %} marks, or the roles of the data, do not say where "
        "answers begin and end."
    )
    if not marked:
        return error("mask_coverage", message, cure)
    if share < LEAST_COVERAGE or found.num_empty > found.num_conversations / 20:
        return warning("mask_coverage", message, cure)
    return ok("mask_coverage", message)


def check_truncation(found: Survey, max_length: int, target_length: int) -> list[Finding]:
    """What is lost with the conversations that are longer than the limit (they are skipped whole)."""
    findings = []
    lengths = [len(tokens) for _, tokens in found.encoded]
    lost = [length for length in lengths if length > max_length]
    share = sum(lost) / max(1, sum(lengths))
    message = (
        f"{len(lost)} of {len(lengths)} conversations, {100 * share:.1f} % of the tokens, exceed {max_length} tokens"
    )
    cure = f"raise data.max_length (the target takes {target_length}), or split long conversations."
    if share > 0.5:
        findings.append(error("truncation", message, cure))
    elif share > 0.05:
        findings.append(warning("truncation", message, cure))
    else:
        findings.append(ok("truncation", message))
    if 4 * max_length < target_length:
        served = f"the head learns {max_length} tokens of context, the target is served with up to {target_length}"
        cure = "raise data.max_length if long prompts will be served: acceptance falls beyond what was learned."
        findings.append(warning("context", served, cure))
    return findings


def normalized(text: str) -> str:
    """Letters and digits alone, so that punctuation and spacing hide no copy."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def check_duplicates(train: Sequence[Conversation]) -> Finding:
    """Conversations that occur more than once."""
    seen = Counter(normalized(" ".join(m.content for m in c.messages)) for c in train)
    copies = len(train) - len(seen)
    message = f"{copies} of {len(train)} training conversations are copies of another"
    if copies > len(train) / 100:
        return warning(
            "duplicates", message, "remove them: epochs over copies overfit, and the data are smaller than they look."
        )
    return ok("duplicates", message)


def check_leakage(train: Sequence[Conversation], evaluation: dict[str, Sequence[Conversation]]) -> list[Finding]:
    """Evaluation prompts, by the name of their set, that are asked in the training data."""
    learned = {normalized(m.content) for c in train for m in c.messages if m.role == "user"}
    findings = []
    for name, prompts in evaluation.items():
        asked = {c.id: normalized(c.question) for c in prompts}
        leaked = [key for key, text in asked.items() if len(text) >= SHORTEST_PROMPT and text in learned]
        if leaked:
            message = f"{len(leaked)} of {len(asked)} {name} prompts stand in the training data ({leaked[0]})"
            cure = "remove them from the training data: an acceptance measured on them says nothing about new prompts."
            findings.append(error("leakage", message, cure))
        else:
            findings.append(ok("leakage", f"none of {len(asked)} {name} prompts stands in the training data"))
    return findings
