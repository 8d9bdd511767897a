"""Conversations to token ids and loss masks, through the tokenizer's own chat template (hass.md §4.4).

Shapes: T tokens of a sequence (types.py has the legend).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from hass_lightning.data.prompts import SkippedConversation
from hass_lightning.target.model import GENERATION_TAG
from hass_lightning.types import Conversation, Message, Tokens

log = logging.getLogger(__name__)


def as_dicts(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages in the shape chat templates take."""
    return [
        {"role": m.role, "content": m.content} | ({"tool_calls": list(m.tool_calls)} if m.tool_calls else {})
        for m in messages
    ]


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder, without its model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def check_template(tokenizer) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ValueError: naming the file.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it is not known how its answers begin "
            "and end: take an instruction-tuned target, or put its template into chat_template.jinja of that folder."
        )


def render(tokenizer, messages: Iterable[Message], **options: Any) -> Any:
    """A conversation through the chat template: its text, unless `options` ask for something else.

    Raises:
        SkippedConversation: the template refuses it (some take no system or tool turn).
    """
    try:
        return tokenizer.apply_chat_template(as_dicts(messages), **{"tokenize": False, **options})
    except TemplateError as error:
        raise SkippedConversation(f"the chat template refuses it: {error}") from error


def encode_prompt(tokenizer, messages: Iterable[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant starts to write."""
    check_template(tokenizer)
    text = render(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_spans(
    tokenizer, messages: tuple[Message, ...], last_turn_only: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character span of every answer (or the last), its end-of-turn token included.

    The span of answer i is what rendering one message more adds to the prompt that asks for it.

    Raises:
        SkippedConversation: the template refuses it, or rewrites earlier turns, so that no prefix holds.
    """
    text = render(tokenizer, messages)
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    spans = []
    for number in answers[-1:] if last_turn_only else answers:
        prompt = render(tokenizer, messages[:number], add_generation_prompt=True)
        through = render(tokenizer, messages[: number + 1])
        if not (through.startswith(prompt) and text.startswith(through)):
            raise SkippedConversation("the chat template rewrites earlier turns")
        spans.append((len(prompt), len(through)))
    return text, spans


def encode_conversation(
    tokenizer,
    conversation: Conversation,
    max_length: int,
    end_ids: frozenset[int] = frozenset(),
    last_turn_only: bool = False,
) -> Tokens:
    """Token ids and row mask of one conversation.

    Row t is marked iff token t+1 belongs to an answer and is not its end-of-turn token: then the draft head, fed that
    token, predicts what follows it. A generation-marked template (`{% generation %}`) is trusted; else the spans are
    found from rendered prefixes. `last_turn_only` marks the last answer alone, and ends with it: for templates that
    drop the reasoning of earlier answers, which then are not what the target once wrote.

    Raises:
        SkippedConversation: no answer token, longer than `max_length`, or a template that cannot be followed.
    """
    ends = end_ids or frozenset(tokenizer.all_special_ids)
    messages = conversation.messages
    if last_turn_only:
        count = max((n for n, message in enumerate(messages, start=1) if message.role == "assistant"), default=0)
        messages = messages[:count]
        if not messages:
            raise SkippedConversation("an empty loss mask")
    if any(message.tool_calls for message in messages):
        without = [replace(message, tool_calls=()) for message in messages]
        if render(tokenizer, without) == render(tokenizer, messages):
            raise SkippedConversation("the chat template drops tool calls")
    if not last_turn_only and re.search(GENERATION_TAG, tokenizer.chat_template or ""):
        encoded = render(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        input_ids, in_answer = list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]
    else:
        text, spans = answer_spans(tokenizer, messages, last_turn_only)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids = list(encoded["input_ids"])
        in_answer = [False] * len(input_ids)
        offsets, token = encoded["offset_mapping"], 0
        for start, end in spans:
            while token < len(input_ids) and offsets[token][0] < start:
                token += 1
            while token < len(input_ids) and offsets[token][1] <= end and input_ids[token] not in ends:
                in_answer[token] = True
                token += 1
    in_answer = [flag and token not in ends for flag, token in zip(in_answer, input_ids, strict=True)]
    if not conversation.finished and any(in_answer):  # cut where the target's own words stop
        length = len(in_answer) - in_answer[::-1].index(True)
        input_ids, in_answer = input_ids[:length], in_answer[:length]
    if len(input_ids) > max_length:
        raise SkippedConversation(f"longer than {max_length} tokens")
    loss_mask = [*in_answer[1:], False]
    if not any(loss_mask):
        raise SkippedConversation("an empty loss mask")
    return Tokens(conversation.id, torch.tensor(input_ids), torch.tensor(loss_mask))


def encode_all(
    tokenizer,
    conversations: Iterable[Conversation],
    max_length: int,
    end_ids: frozenset[int] = frozenset(),
    max_answer_tokens: int | None = None,
    last_turn_only: bool = False,
) -> list[Tokens]:
    """Tokens of all usable conversations, in order, until `max_answer_tokens` marked rows are reached.

    Raises:
        ValueError: none is usable.
    """
    check_template(tokenizer)
    kept: list[Tokens] = []
    skipped: Counter[str] = Counter()
    num_rows = 0
    for conversation in conversations:
        if max_answer_tokens is not None and num_rows >= max_answer_tokens:
            break
        try:
            tokens = encode_conversation(tokenizer, conversation, max_length, end_ids, last_turn_only)
        except SkippedConversation as reason:
            skipped[str(reason)] += 1
            continue
        kept.append(tokens)
        num_rows += int(tokens.loss_mask.sum())
    if skipped:
        log.warning("tokenised %d conversations, skipped %s", len(kept), dict(skipped))
    if not kept:
        raise ValueError(
            f"no conversation is left after tokenisation ({dict(skipped) or 'there was none'}): raise data.max_length, "
            "or check the roles and the chat template of the data."
        )
    return kept
