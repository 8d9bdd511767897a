"""Checks of chat template and loss mask, the most reported cause of a loss of 0 or an acceptance length of 1.

These checks do not rely on data/tokens.py: the tokens selected by the loss mask are decoded and compared with the
answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.data.rendering import render
from hass_lightning.runs.names import counted
from hass_lightning.types import Conversation, Tokens

THINK = "<think>"
Encoded = Sequence[tuple[Conversation, Tokens]]
MARKERS = ("<|im_start|>", "<|start_header_id|>", "[INST]")  # of templates other than the tokenizer's


def learned_ids(tokens: Tokens) -> list[int]:
    """Return the tokens read at loss positions (position t reads token t+1); they should be those of the answers."""
    return tokens.input_ids[1:][tokens.loss_mask[:-1]].tolist()


def _without_whitespace(text: str) -> str:
    return "".join(text.split())


def _outside_answers(marked: str, answers: list[str]) -> str | None:
    """Return the selected text that is not part of the answers, in order; None if an answer is not selected."""
    rest = ""
    for answer in answers:
        before, found, marked = marked.partition(answer)
        if not found:
            return None
        rest += before
    return rest + marked


def _answers(tokenizer: Any, conversation: Conversation, last_turn_only: bool) -> list[str]:
    """Return the answers without whitespace, without a leading <think> that is already part of the prompt."""
    messages = conversation.messages
    numbers = [number for number, message in enumerate(messages) if message.role == "assistant" and message.in_loss]
    answers = []
    for number in numbers[-1:] if last_turn_only else numbers:
        answer = _without_whitespace(messages[number].content)
        if answer.startswith(THINK):
            prompt = render(tokenizer, messages[:number], conversation.tools, add_generation_prompt=True)
            prompt = _without_whitespace(prompt)
            answer = answer.removeprefix(THINK) if prompt.endswith(THINK) else answer
        answers.append(answer)
    return answers


def check_alignment(tokenizer: Any, encoded: Encoded, last_turn_only: bool = False) -> Finding:
    """Check that the loss mask selects exactly the answers (or the last one), apart from end-of-turn tokens."""
    wrong, wide, example = 0, 0, ""
    for conversation, tokens in encoded:
        if any(message.tool_calls or message.reasoning for message in conversation.messages):
            continue  # every template formats tool calls and reasoning differently: there is no text to compare with
        answers = _answers(tokenizer, conversation, last_turn_only)
        marked = _without_whitespace(tokenizer.decode(learned_ids(tokens), skip_special_tokens=False))
        rest = _outside_answers(marked, answers)
        if rest == "":
            continue
        asked = [_without_whitespace(m.content) for m in conversation.messages if m.role == "user"]
        if rest is None or any(question in rest for question in asked):
            wrong += 1
        else:
            wide += 1
        example = example or f"{conversation.id}: selected {marked[:60]!r}, answer {''.join(answers)[:60]!r}"
    num = counted(len(encoded), "conversation")
    cure = "correct the chat template (its {% generation %} tags, or what it adds to and removes from answers)."
    if wrong:
        message = f"the loss mask does not select the answers in {wrong} of {num} ({example})"
        return error("mask_alignment", message, cure)
    if wide:
        message = f"the loss mask selects more than the answers in {wide} of {num} ({example})"
        return warning("mask_alignment", message, cure)
    return ok("mask_alignment", f"the loss mask of {num} selects the answers")


def check_end_of_turn(tokenizer: Any, encoded: Encoded, end_ids: frozenset[int]) -> Finding:
    """Check that complete answers end with a token that ends decoding."""
    missing = []
    for conversation, tokens in encoded:
        if not conversation.finished:
            continue
        after = int(tokens.loss_mask.nonzero()[-1]) + 2  # the last loss position reads the last answer token
        if after >= len(tokens) or int(tokens.input_ids[after]) not in end_ids:
            missing.append(repr(tokenizer.decode(tokens.input_ids[after:].tolist())) if after < len(tokens) else "''")
    if missing:
        message = (
            f"{len(missing)} of {len(encoded)} answers are not followed by an end-of-turn token of the target "
            f"({sorted(tokenizer.convert_ids_to_tokens(sorted(end_ids)))}) but by {missing[0][:40]}: decoding would "
            "continue after every answer"
        )
        cure = "add the template's end-of-turn token to eos_token_id in the target's generation_config.json."
        return error("end_of_turn", message, cure)
    return ok("end_of_turn", f"answers end with {tokenizer.convert_ids_to_tokens(sorted(end_ids))}")


def check_bos(tokenizer: Any, encoded: Encoded) -> Finding:
    """Check that the sequence begins with one beginning-of-sequence token if the tokenizer adds one, never with two."""
    bos = tokenizer.bos_token_id
    if bos is None or not encoded:
        return ok("bos", "the tokenizer has no beginning-of-sequence token")
    adds = (tokenizer("x")["input_ids"] or [None])[0] == bos
    first = encoded[0][1].input_ids[:2].tolist()
    if first == [bos, bos]:
        cure = "remove {{ bos_token }} from the chat template, or from the text."
        return error("bos", f"sequences begin with {tokenizer.bos_token} twice", cure)
    if adds and first[0] != bos:
        message = f"the tokenizer begins texts with {tokenizer.bos_token}, but its chat template does not"
        return warning("bos", message, "check how the serving engine begins a prompt; add {{ bos_token }}.")
    return ok("bos", f"sequences begin with {tokenizer.convert_ids_to_tokens(first[:1])}")


def check_rendered(tokenizer: Any, conversations: Sequence[Conversation]) -> Finding:
    """Check that messages are plain text; template markers in them mean that a template would be applied twice."""
    markers = {token for token in tokenizer.all_special_tokens if len(token) > 2} | set(MARKERS)
    found = [c for c in conversations if any(marker in m.content for m in c.messages for marker in markers)]
    if not found:
        return ok(
            "template_in_text", f"no template markers in the text of {counted(len(conversations), 'conversation')}"
        )
    message = (
        f"{len(found)} of {len(conversations)} conversations contain template markers in their text ({found[0].id})"
    )
    cure = "use only role and content: the chat template is applied here."
    return (error if len(found) > len(conversations) / 100 else warning)("template_in_text", message, cure)


def preview(tokenizer: Any, tokens: Tokens, max_tokens: int = 400) -> Text:
    """Return a conversation as the target reads it: learned tokens in green, the rest dim."""
    learned = [False, *tokens.loss_mask[:-1].tolist()]
    text = Text()
    for marked, ids in _runs(tokens.input_ids.tolist()[:max_tokens], learned):
        text.append(tokenizer.decode(ids, skip_special_tokens=False), style="black on green" if marked else "dim")
    return text


def _runs(ids: list[int], flags: list[bool]) -> Iterator[tuple[bool, list[int]]]:
    """Split tokens into runs with the same flag; single tokens may be parts of characters."""
    for flag, group in groupby(zip(flags, ids, strict=False), key=lambda pair: pair[0]):
        yield flag, [token for _, token in group]
