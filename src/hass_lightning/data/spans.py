"""Find the answers in a rendered conversation: from the template's tags, or by rendering its prefixes.

Both are checked against the answers of the data: a template that cuts, changes or misplaces an answer makes the
conversation unusable, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from hass_lightning.data.rendering import REWRITES, render
from hass_lightning.data.skipped import SkippedConversation
from hass_lightning.target_model.template import GENERATION_TAG
from hass_lightning.types import Conversation

THINK = "<think>"
KEYS = "see target.chat_template; where it does so in earlier turns only, data.last_turn_only=true"
Span = tuple[int, int]  # first and last + 1 character


def has_tags(tokenizer: Any) -> bool:
    """Whether the chat template tags answers by `{% generation %}`."""
    return re.search(GENERATION_TAG, tokenizer.chat_template or "") is not None


def squash(text: str) -> str:
    """The text without white space, which templates add and trim."""
    return "".join(text.split())


def answers_of(conversation: Conversation, last_only: bool = False) -> list[int]:
    """The indices of the answers in the loss (or of the last)."""
    numbers = [
        number for number, message in enumerate(conversation.messages)
        if message.role == "assistant" and message.in_loss
    ]  # fmt: skip
    return numbers[-1:] if last_only else numbers


def answer_spans(tokenizer: Any, conversation: Conversation, last_only: bool = False) -> tuple[str, list[Span]]:
    """The rendered conversation, and the span of each answer in the loss, its end-of-turn token included.

    The span of an answer is what rendering one message more adds to the prompt that asks for it.

    Raises:
        SkippedConversation: the template refuses the conversation, rewrites earlier turns, or changes an answer.
    """
    messages, tools = conversation.messages, conversation.tools
    text = render(tokenizer, messages, tools)
    spans = []
    for number in answers_of(conversation, last_only):
        prompt = render(tokenizer, messages[:number], tools, add_generation_prompt=True)
        through = render(tokenizer, messages[: number + 1], tools)
        if not (through.startswith(prompt) and text.startswith(through)):
            raise SkippedConversation(REWRITES)
        spans.append((len(prompt), len(through)))
    _refuse_changed_answers(conversation, answers_of(conversation, last_only), squash(text))
    return text, spans


def tagged_spans(
    conversation: Conversation, text: str, offsets: Sequence[Span], in_answer: Sequence[bool], is_end: Sequence[bool]
) -> list[Span]:
    """The spans that the `{% generation %}` tags of the template select, each up to its first end-of-turn token.

    Args:
        text: the rendered conversation. offsets: characters of each token. in_answer: tokens inside the tags.
        is_end: end-of-turn tokens.

    Raises:
        SkippedConversation: the tags leave out an answer, or reach beyond one.
    """
    answers = [message for message in conversation.messages if message.role == "assistant"]
    ends = {text[slice(*offsets[token])] for token in range(len(offsets)) if is_end[token]} - {""}
    spans, contents = [], []
    for inside, group in groupby(range(len(in_answer)), key=lambda token: in_answer[token]):
        tokens = list(group)
        if not inside:
            continue
        last = next((token for token in tokens if is_end[token]), tokens[-1])
        start, stop, end = offsets[tokens[0]][0], offsets[last][1], offsets[tokens[-1]][1]
        quoted = any(token in message.content for message in answers for token in ends)
        if text[stop:end].strip() and not quoted:
            raise SkippedConversation("the generation tags of the chat template reach into the next turn")
        spans.append((start, stop))
        contents.append(text[start : offsets[last][0] if is_end[last] else stop])
    if spans:
        _refuse_changed_answers(conversation, answers_of(conversation), squash(text))
        _refuse_misplaced_tags(conversation, contents, ends)
    if not all(message.in_loss for message in answers):
        if len(spans) != len(answers):
            raise SkippedConversation("the generation tags of the chat template are not one for each answer")
        spans = [span for span, message in zip(spans, answers, strict=True) if message.in_loss]
    return spans


def _refuse_changed_answers(conversation: Conversation, numbers: Sequence[int], text: str) -> None:
    """An answer must be in the text as the data have it, white space aside."""
    for number in numbers:
        message = conversation.messages[number]
        if squash(message.content) not in text:
            raise SkippedConversation(f"the chat template cuts or changes an answer ({KEYS})")
        if squash(message.reasoning) not in text:
            raise SkippedConversation(f"the chat template drops the reasoning of an answer ({KEYS})")


def _refuse_misplaced_tags(conversation: Conversation, tagged: Sequence[str], ends: set[str]) -> None:
    """The text inside the tags must be the answers in their order, and no other message."""
    messages = conversation.messages
    rest, beside = squash("".join(tagged)), ""
    for message in messages:
        if message.role != "assistant":
            continue
        answer = message.content
        for end in ends:  # a quoted end token ends the span
            answer = answer.partition(end)[0]
        answer = squash(answer)
        if answer not in rest:
            answer = answer.removeprefix(THINK)  # the prompt has it
        before, found, rest = rest.partition(answer) if answer else ("", "yes", rest)
        if not found:
            raise SkippedConversation("the generation tags of the chat template leave out an answer")
        beside += before
    if any(message.tool_calls or message.reasoning for message in messages):
        return  # both may repeat what the user said
    beside += rest
    others = [squash(message.content) for message in messages if message.role in ("user", "tool")]
    if any(text and text in beside for text in others):
        raise SkippedConversation("the generation tags of the chat template reach into another turn")
