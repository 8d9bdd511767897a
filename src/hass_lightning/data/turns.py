"""One turn of a conversation, as data sets write it, to a Message."""

from __future__ import annotations

import json
from typing import Any

from hass_lightning.data.skipped import SkippedConversation, one_line
from hass_lightning.types import Message

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")


def given(record: dict[str, Any], *names: str) -> Any:
    """The first of these values that is not null."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def parse_turn(turn: Any) -> Message:
    """A turn in OpenAI's format (`role`, `content`, `tool_calls`, …) or ShareGPT's (`from`, `value`).

    Raises:
        SkippedConversation: an unknown role, an empty message, or content that is not text.
    """
    if not isinstance(turn, dict):
        raise SkippedConversation("a message is not an object")
    name = given(turn, "role", "from")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise SkippedConversation(f"unknown role {one_line(repr(name), 60)}")
    content, thought = _text(given(turn, "content", "value", "text"))
    reasoning = given(turn, *REASONING)
    reasoning = thought if reasoning is None else reasoning
    if not isinstance(reasoning, str):
        raise SkippedConversation("reasoning that is not text")
    if role != "assistant":
        if reasoning.strip():
            raise SkippedConversation(f"reasoning in a {role} turn")
        is_result = role == "tool" and given(turn, "content", "value", "text") is not None  # it may be empty
        if not content.strip() and not is_result:
            raise SkippedConversation("an empty message")
        labels = {key: str(turn[key]) for key in ("tool_call_id", "name") if is_result and turn.get(key) is not None}
        return Message(role, content, **labels)  # type: ignore[arg-type]
    calls: Any = turn.get("tool_calls")
    if name.lower() == "function_call":
        calls, content = _shared_call(content), ""
    elif not calls and turn.get("function_call"):
        calls = [{"function": turn["function_call"]}]
    parsed = parse_tool_calls(calls)
    if not content.strip() and not parsed:
        raise SkippedConversation("an empty message")
    return Message("assistant", content, parsed, reasoning, in_loss=_in_loss(turn.get("weight")))


def _in_loss(weight: Any) -> bool:
    if weight is None:
        return True
    if isinstance(weight, int | float) and weight in (0, 1):
        return bool(weight)
    raise SkippedConversation(f"weight {one_line(repr(weight), 30)} of an answer, which is neither 0 nor 1")


def _text(content: Any) -> tuple[str, str]:
    """(text, reasoning) of a message's content: a string, or a list of parts that are text."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, list):
        raise SkippedConversation("a message that is not text")
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in (*TEXT_PARTS, None) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning") and isinstance(given(part, kind, "text"), str):
            thoughts.append(given(part, kind, "text"))
        else:
            raise SkippedConversation(f"a message with a part that is not text ({one_line(repr(kind), 40)})")
    return "".join(texts), "".join(thoughts)


def _shared_call(text: str) -> list[dict[str, Any]]:
    """The calls in a `function_call` turn of ShareGPT: JSON in the text."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SkippedConversation("malformed tool_calls") from error
    return [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]


def parse_tool_calls(calls: Any) -> tuple[dict[str, Any], ...]:
    """OpenAI's `tool_calls` with the arguments as an object: most templates write them as JSON themselves.

    Null values of an object are dropped: Parquet fills every call with the keys of all others. A JSON string is kept
    as it is.

    Raises:
        SkippedConversation: another shape.
    """
    try:
        calls = json.loads(calls) if isinstance(calls, str) else calls
        return tuple(_call(call) for call in calls or ())
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise SkippedConversation("malformed tool_calls") from error


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in call["function"].items() if value is not None}
    arguments = function.get("arguments", {})
    arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else without_nulls(arguments)
    if not isinstance(arguments, dict) or not isinstance(function["name"], str):
        raise TypeError("arguments are no object")
    named = {} if call.get("id") is None else {"id": str(call["id"])}
    return {**named, "type": "function", "function": {**function, "arguments": arguments}}


def parse_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """The definitions of tools: a list of OpenAI's objects or of bare functions, or the same as a JSON string.

    Raises:
        SkippedConversation: another shape.
    """
    try:
        tools = json.loads(tools or "[]") if isinstance(tools, str) else tools
        return tuple(_tool(tool) for tool in tools or ())
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise SkippedConversation("malformed tools") from error


def _tool(tool: Any) -> dict[str, Any]:
    tool = without_nulls(json.loads(tool) if isinstance(tool, str) else tool)
    function = tool.get("function", tool)
    if not isinstance(function["name"], str):
        raise TypeError("a tool without a name")
    return tool if "function" in tool else {"type": "function", "function": function}


def without_nulls(value: Any) -> Any:
    """The same value without keys whose value is null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
