"""Chat template and loss mask: the field's most reported cause of a loss that stays 0 or an acceptance of 1.

Nothing here trusts data/tokens.py: what the mask marks is decoded again and compared with the answers themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.text import Text

from hass_lightning.checks.finding import Finding, error, ok, warning
from hass_lightning.data.tokens import render
from hass_lightning.types import Conversation, Tokens

THINK = "<think>"
Encoded = Sequence[tuple[Conversation, Tokens]]
MARKERS = ("<|im_start|>", "<|start_header_id|>", "[INST]")  # of templates other than the tokenizer's own


def learned_ids(tokens: Tokens) -> list[int]:
    """The tokens that marked rows read (row t reads token t+1): those of the answers, if the mask is right."""
    return tokens.input_ids[1:][tokens.loss_mask[:-1]].tolist()


def _squash(text: str) -> str:
    return "".join(text.split())


def _beside(marked: str, answers: list[str]) -> str | None:
    """What is marked beside the answers, in their order; None where one of them is not marked."""
    rest = ""
    for answer in answers:
        before, found, marked = marked.partition(answer)
        if not found:
            return None
        rest += before
    return rest + marked


def _answers(tokenizer, conversation: Conversation, last_turn_only: bool) -> list[str]:
    """What the mask should mark, squashed: an answer's leading <think> is not the head's where the prompt holds it."""
    messages = conversation.messages
    numbers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    answers = []
    for number in numbers[-1:] if last_turn_only else numbers:
        answer = _squash(messages[number].content)
        if answer.startswith(THINK):
            prompt = _squash(render(tokenizer, messages[:number], add_generation_prompt=True))
            answer = answer.removeprefix(THINK) if prompt.endswith(THINK) else answer
        answers.append(answer)
    return answers


def check_alignment(tokenizer, encoded: Encoded, last_turn_only: bool = False) -> Finding:
    """What the mask marks are the answers (or the last): all of them and nothing else, end-of-turn tokens left out."""
    wrong, wide, example = 0, 0, ""
    for conversation, tokens in encoded:
        if any(message.tool_calls for message in conversation.messages):
            continue  # every template writes calls in its own way: there is no text to compare with
        answers = _answers(tokenizer, conversation, last_turn_only)
        marked = _squash(tokenizer.decode(learned_ids(tokens), skip_special_tokens=False))
        rest = _beside(marked, answers)
        if rest == "":
            continue
        asked = [_squash(m.content) for m in conversation.messages if m.role == "user"]
        if rest is None or any(question in rest for question in asked):
            wrong += 1
        else:
            wide += 1
        example = example or f"{conversation.id}: marked {marked[:60]!r}, answer {''.join(answers)[:60]!r}"
    cure = "correct the chat template (its {% generation %} marks, or what it adds to and cuts from answers)."
    if wrong:
        message = f"the mask does not mark the answers in {wrong} of {len(encoded)} conversations ({example})"
        return error("mask_alignment", message, cure)
    if wide:
        message = f"the mask marks more than the answers in {wide} of {len(encoded)} conversations ({example})"
        return warning("mask_alignment", message, cure)
    return ok("mask_alignment", f"the marked tokens of {len(encoded)} conversations are their answers")


def check_end_of_turn(tokenizer, encoded: Encoded, end_ids: frozenset[int]) -> Finding:
    """Finished answers end with a token that ends decoding."""
    missing = []
    for conversation, tokens in encoded:
        if not conversation.finished:
            continue
        after = int(tokens.loss_mask.nonzero()[-1]) + 2  # the last marked row reads the last answer token
        if after >= len(tokens) or int(tokens.input_ids[after]) not in end_ids:
            missing.append(repr(tokenizer.decode(tokens.input_ids[after:].tolist())) if after < len(tokens) else "''")
    if missing:
        message = (
            f"{len(missing)} of {len(encoded)} answers are not followed by an end-of-turn token of the target "
            f"({sorted(tokenizer.convert_ids_to_tokens(sorted(end_ids)))}) but by {missing[0][:40]}: decoding would "
            "run on past every answer"
        )
        cure = "add the template's end-of-turn token to eos_token_id in the target's generation_config.json."
        return error("end_of_turn", message, cure)
    return ok("end_of_turn", f"answers end with {tokenizer.convert_ids_to_tokens(sorted(end_ids))}")


def check_bos(tokenizer, encoded: Encoded) -> Finding:
    """The sequence begins with one beginning-of-sequence token where the tokenizer writes one, never with two."""
    bos = tokenizer.bos_token_id
    if bos is None or not encoded:
        return ok("bos", "the tokenizer has no beginning-of-sequence token")
    adds = (tokenizer("x")["input_ids"] or [None])[0] == bos
    first = encoded[0][1].input_ids[:2].tolist()
    if first == [bos, bos]:
        cure = "take {{ bos_token }} out of the chat template, or out of the text."
        return error("bos", f"sequences begin with {tokenizer.bos_token} twice", cure)
    if adds and first[0] != bos:
        message = f"the tokenizer begins texts with {tokenizer.bos_token}, its chat template does not"
        return warning("bos", message, "check how the engine that will serve it begins a prompt; add {{ bos_token }}.")
    return ok("bos", f"sequences begin with {tokenizer.convert_ids_to_tokens(first[:1])}")


def check_rendered(tokenizer, conversations: Sequence[Conversation]) -> Finding:
    """Messages are plain text: a template written into them would be applied twice."""
    markers = {token for token in tokenizer.all_special_tokens if len(token) > 2} | set(MARKERS)
    found = [c for c in conversations if any(marker in m.content for m in c.messages for marker in markers)]
    if not found:
        return ok("template_in_text", f"no template markers in the text of {len(conversations)} conversations")
    message = f"{len(found)} of {len(conversations)} conversations hold template markers in their text ({found[0].id})"
    cure = "give role and content alone: the chat template is applied here."
    return (error if len(found) > len(conversations) / 100 else warning)("template_in_text", message, cure)


def preview(tokenizer, tokens: Tokens, max_tokens: int = 400) -> Text:
    """A conversation as the target reads it: what the head learns in green, the rest dim."""
    learned = [False, *tokens.loss_mask[:-1].tolist()]
    text = Text()
    for marked, ids in _runs(tokens.input_ids.tolist()[:max_tokens], learned):
        text.append(tokenizer.decode(ids, skip_special_tokens=False), style="black on green" if marked else "dim")
    return text


def _runs(ids: list[int], flags: list[bool]) -> Iterator[tuple[bool, list[int]]]:
    """Runs of tokens with the same flag: single tokens may be parts of characters."""
    for flag, group in groupby(zip(flags, ids, strict=False), key=lambda pair: pair[0]):
        yield flag, [token for _, token in group]
