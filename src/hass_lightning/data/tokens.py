"""Conversations to token ids and loss masks, through the tokenizer's chat template (docs/method.md, Loss positions).

Shapes: T tokens of a sequence (types.py has the legend).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hass_lightning.data.rendering import check_template, fit_arguments, refuse_omissions, render
from hass_lightning.data.skipped import Skipped, SkippedConversation
from hass_lightning.data.spans import answer_spans, answers_of, has_tags, tagged_spans
from hass_lightning.target_model.template import read_template, with_options
from hass_lightning.target_model.weights import read_tokenizer
from hass_lightning.types import Conversation, Message, Tokens

log = logging.getLogger(__name__)


def load_tokenizer(
    folder: str | Path, chat_template: str | None = None, chat_template_options: Mapping[str, Any] | None = None
) -> Any:
    """The tokenizer of a model folder, without its model; the other arguments are those of `TargetModel.load`."""
    template = None if chat_template is None else read_template(chat_template)
    tokenizer = read_tokenizer(Path(folder), template, local_files_only=True)
    if chat_template_options:
        tokenizer.chat_template = with_options(tokenizer.chat_template, chat_template_options)
    return tokenizer


def encode_prompt(tokenizer: Any, messages: Iterable[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
    """Token ids of a conversation up to where the assistant starts to write.

    Raises:
        SkippedConversation: the chat template refuses it.
    """
    check_template(tokenizer)
    fitting = fit_arguments(tokenizer, tuple(messages), tools)
    text = render(tokenizer, fitting, tools, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode_user_prompt(tokenizer: Any, messages: Iterable[Message], opening: str = "") -> list[int]:
    """Token ids of a conversation up to where the user starts to write, or continues after `opening`.

    Raises:
        SkippedConversation: the chat template refuses it.
    """
    check_template(tokenizer)
    mark = "\u0001"  # is in no template
    text = render(tokenizer, [*messages, Message("user", mark)])
    if mark not in text:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} does not write what the user says as it is, so the target "
            "cannot write questions: set target.chat_template to another one, or give questions with data=questions."
        )
    ids: list[int] = tokenizer(text[: text.rindex(mark)] + opening, add_special_tokens=False)["input_ids"]
    return ids


def encode_conversation(
    tokenizer: Any,
    conversation: Conversation,
    max_length: int,
    end_ids: frozenset[int] = frozenset(),
    last_turn_only: bool = False,
) -> Tokens:
    """Token ids and loss mask of one conversation.

    Position t is a loss position iff token t+1 belongs to an answer and is not its end-of-turn token: there the draft
    head reads that token and predicts the next. Answers are found by the `{% generation %}` tags of the template, or by
    rendering prefixes (spans.py). With `last_turn_only` only the last answer is in the loss, and the sequence ends
    with it: for templates that drop the reasoning of earlier answers, which then are not what the target generated.

    Raises:
        SkippedConversation: no answer token, longer than `max_length`, or a template that drops or changes something.
    """
    ends = end_ids or frozenset(tokenizer.all_special_ids)
    if last_turn_only:
        if not (last := answers_of(conversation, last_only=True)):
            raise SkippedConversation("an empty loss mask")
        conversation = replace(conversation, messages=conversation.messages[: last[0] + 1])
    fitting = fit_arguments(tokenizer, conversation.messages, conversation.tools)
    conversation = replace(conversation, messages=fitting)
    refuse_omissions(tokenizer, conversation)
    if has_tags(tokenizer) and not last_turn_only:
        input_ids, in_answer = _by_tags(tokenizer, conversation, ends)
    else:
        text, spans = answer_spans(tokenizer, conversation, last_turn_only)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids = list(encoded["input_ids"])
        in_answer = _tokens_in(spans, encoded["offset_mapping"], input_ids, ends)
    if not conversation.finished and any(in_answer):  # the answer was cut here: no end of turn is learned
        length = len(in_answer) - in_answer[::-1].index(True)
        input_ids, in_answer = input_ids[:length], in_answer[:length]
    if len(input_ids) > max_length:
        raise SkippedConversation(f"longer than {max_length} tokens")
    loss_mask = [*in_answer[1:], False]
    if not any(loss_mask):
        raise SkippedConversation("an empty loss mask")
    return Tokens(conversation.id, torch.tensor(input_ids), torch.tensor(loss_mask))


def _by_tags(tokenizer: Any, conversation: Conversation, ends: frozenset[int]) -> tuple[list[int], list[bool]]:
    messages, tools = conversation.messages, conversation.tools
    encoded = render(
        tokenizer, messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )  # fmt: skip
    input_ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    tagged, is_end = [bool(flag) for flag in encoded["assistant_masks"]], [token in ends for token in input_ids]
    spans = tagged_spans(conversation, render(tokenizer, messages, tools), offsets, tagged, is_end)
    return input_ids, _tokens_in(spans, offsets, input_ids, ends)


def _tokens_in(
    spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], ids: Sequence[int], ends: frozenset[int]
) -> list[bool]:
    """Which tokens lie in the spans, each up to its first end-of-turn token."""
    inside, token = [False] * len(ids), 0
    for start, end in spans:
        while token < len(ids) and offsets[token][0] < start:
            token += 1
        while token < len(ids) and offsets[token][1] <= end and ids[token] not in ends:
            inside[token] = True
            token += 1
    return inside


def encode_all(
    tokenizer: Any,
    conversations: Iterable[Conversation],
    max_length: int,
    end_ids: frozenset[int] = frozenset(),
    max_answer_tokens: int | None = None,
    last_turn_only: bool = False,
) -> list[Tokens]:
    """Tokens of all usable conversations, in order, until `max_answer_tokens` loss positions are reached.

    Raises:
        ValueError: none is usable.
    """
    check_template(tokenizer)
    kept: list[Tokens] = []
    skipped = Skipped()
    num_positions = 0
    for conversation in conversations:
        if max_answer_tokens is not None and num_positions >= max_answer_tokens:
            break
        try:
            tokens = encode_conversation(tokenizer, conversation, max_length, end_ids, last_turn_only)
        except SkippedConversation as reason:
            skipped.add(reason, conversation.place or conversation.id)
            continue
        kept.append(tokens)
        num_positions += int(tokens.loss_mask.sum())
    if skipped:
        log.warning("tokenized %d conversations, skipped %d: %s", len(kept), skipped.counts.total(), skipped)
    if not kept:
        raise ValueError(
            f"no conversation is left after tokenization ({skipped or 'there was none'}): raise data.max_length, "
            "or check the roles and the chat template of the data."
        )
    return kept
