"""The layouts of public chat data sets, each as a list of turns; custom columns by `data.source.columns`.

A layout is read where it is unmistakable:

- a list of turns under `messages`, `conversations`, `conversation`, `dialogue`, `dialog` or `chat`. Turns are
  {role, content}, {from, value}, or pairs such as {input, output} and {human, assistant}.
- one question and one answer: instruction (+ input or context) and output, prompt and response or completion, question
  and answer, query and response, input and output. `system`, `history` and `reasoning` are read with them.
- questions only: `turns` (a list), `prompt` or `question`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hass_lightning.data.skipped import SkippedConversation, one_line
from hass_lightning.data.turns import REASONING, given

TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
PAIRS = (("input", "output"), ("human", "assistant"), ("user", "assistant"), ("prompt", "response"),
         ("question", "answer"), ("instruction", "output"), ("instruction", "response"), ("human", "gpt"))  # fmt: skip
QUESTION = ("instruction", "prompt", "question", "query", "user", "human")
ANSWER = ("output", "response", "completion", "answer", "assistant", "gpt")
CONTEXT = ("input", "context")
SYSTEM = ("system", "system_prompt")
CONTENT_COLUMNS = ("messages", "prompt", "context", "response")
OTHER_COLUMNS = ("system", "reasoning", "tools", "id", "category", "split", "finished")
TURN_COLUMNS = ("role", "content")

Record = dict[str, Any]


def check_columns(columns: Mapping[str, str | None] | None) -> None:
    """Refuse a `data.source.columns` that names nothing known.

    Raises:
        ValueError: naming the key and the names that it takes.
    """
    known = (*CONTENT_COLUMNS, *OTHER_COLUMNS, *TURN_COLUMNS)
    cure = (
        f"map names to columns of the data, such as {{prompt: question, response: answer}}; names: {', '.join(known)}."
    )
    if columns is not None and not isinstance(columns, Mapping):
        raise ValueError(f"data.source.columns={columns} cannot be used: {cure}")
    for name, column in (columns or {}).items():
        if name not in known or not isinstance(column, str | None):
            raise ValueError(f"data.source.columns.{name}={column} cannot be used: {cure}")


def with_columns(record: Record, columns: Mapping[str, str | None] | None) -> Record:
    """The record under the names that are read here. If a column of the content is named, no other content is read.

    Raises:
        SkippedConversation: a column of the content is not in the record.
    """
    if not columns:
        return record
    content = [name for name in CONTENT_COLUMNS if name in columns]
    renamed = {key: record[key] for key in record if not content or key in OTHER_COLUMNS}
    for name in (*CONTENT_COLUMNS, *OTHER_COLUMNS):
        if name not in columns:
            continue
        column = columns[name]
        if name in content and column not in record:
            raise SkippedConversation(f"no column {column!r} (data.source.columns.{name})")
        renamed[name] = None if column is None else record.get(column)
    roles = {name: column for name in TURN_COLUMNS if (column := columns.get(name))}
    if roles and (key := _name_of_turns(renamed)) is not None:
        renamed[key] = [
            {**turn, **{name: turn.get(column) for name, column in roles.items()}} if isinstance(turn, dict) else turn
            for turn in _list(renamed[key])
        ]
    return renamed


def turns_of(record: Record) -> tuple[list[Any], bool]:
    """(turns as {role, content} or {from, value}, whether they are questions without answers).

    Raises:
        SkippedConversation: no layout fits, or several do.
    """
    name = _name_of_turns(record)
    if name is not None:
        turns = _pairs_as_turns(_list(record[name]))
        return [*_system(record, turns), *turns], False
    turns = _question_and_answer(record)
    if turns:
        return [*_system(record, turns), *turns], False
    if all(record.get(key) is None for key in TURNS) and (asked := user_turns(record)):
        turns = [_turn("user", text) for text in asked]
        return [*_system(record, turns), *turns], True
    raise SkippedConversation("no `messages` or `conversations` list")


def user_turns(record: Record) -> list[str]:
    """The questions of a record that has no answers: `turns` (a list), `prompt` or `question`; empty if there are none.

    Raises:
        SkippedConversation: one of the turns is not text.
    """
    if isinstance(turns := record.get("turns"), list):
        if not all(isinstance(turn, str) for turn in turns):
            raise SkippedConversation("a turn that is not text")
        return turns
    return [record[key] for key in ("prompt", "question") if isinstance(record.get(key), str)][:1]


def how_to_map(record: Any) -> str:
    """Return an override of `data.source.columns` that maps the columns of such a record."""
    if not isinstance(record, dict) or not record:
        return ""
    columns = {one_line(key, 40): value for key, value in record.items()}
    keys = list(columns)
    lists = [key for key in keys if isinstance(columns[key], list)]
    texts = [key for key in keys if isinstance(columns[key], str) and key not in OTHER_COLUMNS]
    example = f"messages: {lists[0]}" if lists else f"prompt: {(texts or keys)[0]}, response: {(texts or keys)[-1]}"
    shown = ", ".join(keys[:12]) + ", …" * (len(keys) > 12)
    return (
        f" The first of them has the columns {shown}; name those to read, such as "
        f"'+data.source.columns={{{example}}}' (with data=questions: data.source.source.columns)."
    )


def _turn(role: str, content: Any, **more: Any) -> Record:
    return {"role": role, "content": content, **more}


def _list(value: Any) -> Any:
    """A list, also from its JSON text or from Arrow's object of lists."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, dict) and value and all(isinstance(each, list) for each in value.values()):
        lengths = {len(each) for each in value.values()}
        columns = zip(*value.values(), strict=True)
        return value if len(lengths) > 1 else [dict(zip(value, row, strict=True)) for row in columns]
    return value


def _name_of_turns(record: Record) -> str | None:
    for name in (*TURNS, "turns"):
        turns = _list(record.get(name))
        if isinstance(turns, list) and turns and (name != "turns" or isinstance(turns[0], dict)):
            return name
    return None


def _pairs_as_turns(turns: list[Any]) -> list[Any]:
    if not all(isinstance(turn, dict) and given(turn, "role", "from") is None for turn in turns):
        return turns
    pair = next((pair for pair in PAIRS if all(_is_text(turn.get(key)) for turn in turns for key in pair)), None)
    if pair is None:
        return turns
    return [_turn(role, turn[key]) for turn in turns for role, key in zip(("user", "assistant"), pair, strict=True)]


def _system(record: Record, turns: list[Any]) -> list[Record]:
    text = given(record, *SYSTEM)
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if text is None or text == "" or given(first, "role", "from") == "system":
        return []
    return [_turn("system", text)]


def _question_and_answer(record: Record) -> list[Any]:
    """The turns of a record with one question and one answer; empty if it has no answer."""
    prompt, completion = record.get("prompt"), given(record, "completion", "response")
    if isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
        if completion is None:
            return prompt
        return [*prompt, *(completion if isinstance(completion, list) else [_turn("assistant", completion)])]
    answers: list[str] = [name for name in ANSWER if _is_text(record.get(name))]
    questions = [name for name in QUESTION if _is_text(record.get(name))]
    if not questions and _is_text(record.get("input")):
        questions = ["input"]
    if not questions or not answers:
        return []
    for role, names in (("question", questions), ("answer", answers)):
        if len(names) > 1:
            raise SkippedConversation(
                f"several columns may be the {role} ({', '.join(names)}): set data.source.columns"
            )
    context = [record[name] for name in CONTEXT if name not in questions and _is_text(record.get(name))]
    question = "\n\n".join([record[questions[0]], *context])
    reasoning = given(record, *REASONING)
    answer = _turn("assistant", record[answers[0]], **({} if reasoning is None else {"reasoning": reasoning}))
    return [*_history(record.get("history")), _turn("user", question), answer]


def _history(history: Any) -> list[Record]:
    """Earlier turns as LLaMA-Factory has them: [[question, answer], …]."""
    if not history:
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise SkippedConversation("a history that is no list of pairs")
    return [_turn(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
