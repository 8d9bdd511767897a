"""Checks of the training conversations: learned, truncated and repeated data, and overlap with evaluation prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.data.skipped import SkippedConversation
from hass_lightning.runs.names import counted
from hass_lightning.types import Conversation, Tokens

EMPTY = "an empty loss mask"
LEAST_COVERAGE = 0.05
MOST_CUT = 0.8
SHORTEST_PROMPT = 20  # in characters; "go on" and "thanks" occur in many conversations


@dataclass
class Survey:
    """A sample of conversations, tokenized without a length limit."""

    num_conversations: int = 0
    encoded: list[tuple[Conversation, Tokens]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # by reason

    @property
    def num_empty(self) -> int:
        """Number of conversations without a loss position."""
        return self.skipped[EMPTY]


def survey(conversations: Iterable[Conversation], encode: Callable[[Conversation], Tokens]) -> Survey:
    """Encode each conversation; `encode` raises SkippedConversation if it cannot use one."""
    found = Survey()
    for conversation in conversations:
        found.num_conversations += 1
        try:
            found.encoded.append((conversation, encode(conversation)))
        except SkippedConversation as reason:
            found.skipped[str(reason)] += 1
    return found


def check_usable(found: Survey) -> Finding:
    """Check that the chat template accepts the conversations."""
    others = {reason: count for reason, count in found.skipped.items() if reason != EMPTY}
    lost, num = sum(others.values()), found.num_conversations
    if not lost:
        return ok("template", f"the chat template fits {counted(num, 'conversation')}")
    cure = "see the reasons: use another chat template, or remove what the template does not accept."
    message = f"{lost} of {counted(num, 'conversation')} cannot be used: {others}"
    return (error if lost == num else warning)("template", message, cure)


def check_coverage(found: Survey) -> Finding:
    """Check the fraction of tokens that are learned. If it is 0, loss and accuracy stay 0 without any error."""
    marked = sum(int(tokens.loss_mask.sum()) for _, tokens in found.encoded)
    share = marked / max(1, sum(len(tokens) for _, tokens in found.encoded))
    empty = f"; {found.num_empty} of {found.num_conversations} conversations have an empty mask" * bool(found.num_empty)
    message = f"{100 * share:.1f} % of the tokens are learned{empty}"
    cure = (
        "see the preview: the template's {% generation %} tags, or the roles in the data, do not mark where answers "
        "begin and end."
    )
    if not marked:
        return error("mask_coverage", message, cure)
    if share < LEAST_COVERAGE or found.num_empty > found.num_conversations / 20:
        return warning("mask_coverage", message, cure)
    return ok("mask_coverage", message)


def check_truncation(found: Survey, max_length: int, target_length: int) -> list[Finding]:
    """Check how much is lost because conversations longer than the limit are skipped."""
    findings = []
    lengths = [len(tokens) for _, tokens in found.encoded]
    lost = [length for length in lengths if length > max_length]
    share = sum(lost) / max(1, sum(lengths))
    lost_of = f"{len(lost)} of {counted(len(lengths), 'conversation')}"
    message = f"{lost_of}, {100 * share:.1f} % of the tokens, exceed {max_length} tokens"
    cure = f"increase data.max_length (the target accepts {target_length}), or split long conversations."
    if share > 0.5:
        findings.append(error("truncation", message, cure))
    elif share > 0.05:
        findings.append(warning("truncation", message, cure))
    else:
        findings.append(ok("truncation", message))
    if 4 * max_length < target_length:
        served = f"the head is trained on up to {max_length} tokens of context, the target serves up to {target_length}"
        cure = (
            "increase data.max_length if long prompts will be served: acceptance decreases beyond the trained length."
        )
        findings.append(warning("context", served, cure))
    return findings


def check_cut_answers(train: Sequence[Conversation]) -> Finding:
    """Check for conversations whose last answer was truncated; the head learns no end of turn from them."""
    cut = sum(not conversation.finished for conversation in train)
    message = f"{cut} of {len(train)} training conversations end with a truncated answer"
    if cut > MOST_CUT * len(train):
        cure = (
            "increase data.source.answer_max_tokens (or max_tokens): otherwise the head hardly learns how an answer "
            "ends."
        )
        return warning("cut_answers", message, cure)
    return ok("cut_answers", message)


def normalized(text: str) -> str:
    """Return only the letters and digits, so that copies are found whatever their punctuation and spacing."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def check_duplicates(train: Sequence[Conversation]) -> Finding:
    """Check for conversations that occur more than once."""
    seen = Counter(normalized(" ".join(m.content for m in c.messages)) for c in train)
    copies = len(train) - len(seen)
    message = f"{copies} of {len(train)} training conversations are copies of another"
    if copies > len(train) / 100:
        return warning(
            "duplicates",
            message,
            "remove them: repeated conversations cause overfitting, and the data set is smaller than its size "
            "suggests.",
        )
    return ok("duplicates", message)


def check_leakage(train: Sequence[Conversation], evaluation: dict[str, Sequence[Conversation]]) -> list[Finding]:
    """Check for evaluation prompts, by the name of their set, in the training data."""
    learned = {normalized(m.content) for c in train for m in c.messages if m.role == "user"}
    findings = []
    for name, prompts in evaluation.items():
        asked = {c.id: normalized(c.question) for c in prompts}
        leaked = [key for key, text in asked.items() if len(text) >= SHORTEST_PROMPT and text in learned]
        if leaked:
            message = f"{len(leaked)} of {len(asked)} {name} prompts are in the training data ({leaked[0]})"
            cure = "remove them from the training data: acceptance measured on them does not hold for new prompts."
            findings.append(error("leakage", message, cure))
        else:
            findings.append(ok("leakage", f"none of {len(asked)} {name} prompts is in the training data"))
    return findings
