"""Conversations through the tokenizer's chat template.

A template is a program from elsewhere and may raise anything; what it raises makes the conversation unusable, with the
reason, and does not end the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from hass_lightning.data.skipped import SkippedConversation, one_line
from hass_lightning.types import Conversation, Message

REWRITES = "the chat template rewrites earlier turns (data.last_turn_only=true learns from the last answer only)"


def as_dicts(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages in the format that chat templates take, with the reasoning under each name that templates use."""
    return [
        {"role": m.role, "content": m.content}
        | ({"reasoning_content": m.reasoning, "reasoning": m.reasoning, "thinking": m.reasoning} if m.reasoning else {})
        | ({"tool_calls": list(m.tool_calls)} if m.tool_calls else {})
        | ({"tool_call_id": m.tool_call_id} if m.tool_call_id else {})
        | ({"name": m.name} if m.name else {})
        for m in messages
    ]


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ValueError: naming the folder and the fix.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it is not known how its answers begin "
            "and end: use an instruction-tuned target, or put its template into chat_template.jinja of that folder."
        )


def render(tokenizer: Any, messages: Iterable[Message], tools: Sequence[dict[str, Any]] = (), **options: Any) -> Any:
    """A conversation through the chat template: its text, unless `options` ask for something else.

    Raises:
        SkippedConversation: the template raises an exception (some take no system or tool turn).
    """
    options = {"tokenize": False, **({"tools": list(tools)} if tools else {}), **options}
    try:
        return tokenizer.apply_chat_template(as_dicts(messages), **options)
    except TemplateError as error:
        raise SkippedConversation(f"the chat template refuses it: {one_line(error)}") from error
    except Exception as error:  # the template's own: it is a program
        reason = one_line(f"{type(error).__name__}: {error}")
        raise SkippedConversation(f"the chat template fails: {reason}") from error


def fit_arguments(
    tokenizer: Any, messages: tuple[Message, ...], tools: Sequence[dict[str, Any]]
) -> tuple[Message, ...]:
    """The messages with the arguments of tool calls as the template takes them: objects, or else JSON strings.

    A template that joins the arguments to a text fails for objects, and one that writes them without `tojson` writes
    Python's notation: both take strings.

    Raises:
        SkippedConversation: the template takes neither.
    """
    calls = [call["function"]["arguments"] for message in messages for call in message.tool_calls]
    if not calls:
        return messages
    as_text = tuple(replace(message, tool_calls=tuple(map(_with_text, message.tool_calls))) for message in messages)
    try:
        text = render(tokenizer, messages, tools)
    except SkippedConversation:
        render(tokenizer, as_text, tools)
        return as_text
    in_python = [str(each) for each in calls if str(each) != json.dumps(each)]
    return as_text if any(each in text for each in in_python) else messages


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def refuse_omissions(tokenizer: Any, conversation: Conversation) -> None:
    """Refuse a conversation of which the template leaves out tool calls or the definitions of tools.

    Raises:
        SkippedConversation: naming what is left out.
    """
    messages, tools = conversation.messages, conversation.tools
    if not tools and not any(message.tool_calls for message in messages):
        return
    text = render(tokenizer, messages, tools)
    without = [replace(message, tool_calls=()) for message in messages]
    if any(message.tool_calls for message in messages) and _renders(tokenizer, without, tools) == text:
        raise SkippedConversation("the chat template drops tool calls")
    if tools and _renders(tokenizer, messages, ()) == text:
        raise SkippedConversation("the chat template drops the definitions of tools")


def _renders(tokenizer: Any, messages: Iterable[Message], tools: Sequence[dict[str, Any]]) -> str | None:
    """The text; None if the template refuses it."""
    try:
        return str(render(tokenizer, messages, tools))
    except SkippedConversation:
        return None
