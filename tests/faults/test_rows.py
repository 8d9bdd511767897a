"""Kind 7: one bad row is skipped, counted by reason and named; only if all are skipped, it is an error."""

import copy
import json
import logging

import pytest

from hass_lightning.data.answered_questions import Questions
from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.data.prompts import JsonLines
from hass_lightning.data.tokens import encode_all
from hass_lightning.measure.benchmark import run_benchmark

CHATML = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = "{% for c in m.get('tool_calls') or [] %}[{{ c['function']['name'] }} ARGS]{% endfor %}"
JOINS = "{% for m in messages %}" + CHATML + CALLS.replace("ARGS", "{{ '(' + c['function']['arguments'] + ')' }}") + END
IN_PYTHON = "{% for m in messages %}" + CHATML + CALLS.replace("ARGS", "{{ c['function']['arguments'] }}") + END
AS_JSON = "{% for m in messages %}" + CHATML + CALLS.replace("ARGS", "{{ c['function']['arguments'] | tojson }}") + END


def chat(question, answer="Well, it depends.", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def called(arguments, question="1 + 2?"):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ]
    }


def write(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "chats.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder / "chats.jsonl")


def with_template(tiny, template):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer, tokens):
    return tokenizer.decode(tokens.input_ids.roll(-1)[tokens.loss_mask])


BAD = {
    "a lone surrogate in a question": r'{"messages": [{"role": "user", "content": "a \ud83d b"}, '
    r'{"role": "assistant", "content": "c"}]}',
    "a lone surrogate in an answer": r'{"conversations": [{"from": "human", "value": "a"}, '
    r'{"from": "gpt", "value": "\udc00"}]}',
    "a lone surrogate in an id": r'{"id": "\ud800", "messages": [{"role": "user", "content": "a"}, '
    r'{"role": "assistant", "content": "c"}]}',
    "a lone surrogate in a tool call": json.dumps(called('{"a": "\\ud83d"}')),
    "not JSON": "{cut off",
    "a huge number": '{"id": ' + "9" * 5000 + "}",
    "endless nesting": "[" * 100_000,
    "an unknown role": json.dumps({"messages": [{"role": "alien", "content": "x"}]}),
    "no text": json.dumps(chat("x", 7)),
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_a_bad_row_is_skipped_and_named(tiny, tmp_path, caplog, row):
    path = write(tmp_path, chat("first"), "", row, chat("last"))
    with caplog.at_level(logging.WARNING):
        conversations = JsonLines(path).load(None)
        tokens = encode_all(tiny.tokenizer, conversations, 500, tiny.eos_token_ids)
    assert [conversation.question for conversation in conversations] == ["first", "last"]
    assert len(tokens) == 2
    (line,) = caplog.messages
    assert line.startswith("chats.jsonl: kept 2 conversations, skipped 1: ")
    assert line.endswith("1 (line 3)")


def test_a_summary_names_the_first_places_of_each_reason(tmp_path, caplog):
    path = write(tmp_path, chat("a"), *[chat(" ")] * 8, {"messages": []}, chat("b"))
    JsonLines(path).load(None)
    (line,) = caplog.messages
    assert "skipped 9: " in line
    assert "'an empty message': 8 (line 2, line 3, line 4, line 5, line 6 and 3 more)" in line
    assert "'no `messages` or `conversations` list': 1 (line 10)" in line


def test_only_if_all_are_skipped_it_is_an_error(tmp_path):
    path = write(tmp_path, BAD["a lone surrogate in a question"], "{cut off")
    with pytest.raises(ValueError, match=r"chats\.jsonl holds no usable.*lone surrogate.*line 1.*JSON object.*line 2"):
        JsonLines(path).load(None)


@pytest.mark.parametrize("arguments", ['{"a": 1, "b": "x"}', {"a": 1, "b": "x"}], ids=["as text", "as an object"])
@pytest.mark.parametrize("template", [JOINS, IN_PYTHON, AS_JSON], ids=["joined", "written as Python", "as JSON"])
def test_tool_arguments_are_json_whatever_the_template_takes(tiny, tmp_path, arguments, template):
    tokenizer = with_template(tiny, template)
    conversations = JsonLines(write(tmp_path, chat("first"), called(arguments), chat("last"))).load(None)
    tokens = encode_all(tokenizer, conversations, 500, tiny.eos_token_ids)
    brackets = "()" if template == JOINS else ["", ""]
    assert learned(tokenizer, tokens[1]) == f'[add {brackets[0]}{{"a": 1, "b": "x"}}{brackets[1]}]It is 3.'
    assert [learned(tokenizer, each) for each in tokens[::2]] == ["Well, it depends."] * 2


RAISES = {
    "TypeError": "{{ 1 + m['content'] }}",
    "UndefinedError": "{{ m.nothing.at_all }}",
    "ZeroDivisionError": "{{ 1 // 0 }}",
    "what it says itself": "{{ raise_exception('no such turn') }}",
    "SecurityError": "{{ m.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.mark.parametrize("fault", RAISES)
def test_whatever_a_template_raises_costs_that_row_only(tiny, tmp_path, caplog, fault):
    """Its first user turn decides: a bad row among good ones."""
    bad = "{% for m in messages %}{% if 'bad' in m['content'] %}" + RAISES[fault] + "{% endif %}" + CHATML + END
    conversations = JsonLines(write(tmp_path, chat("good"), chat("bad"), chat("good, too"))).load(None)
    tokens = encode_all(with_template(tiny, bad), conversations, 500, tiny.eos_token_ids)
    assert [each.id for each in tokens] == ["chats.jsonl:0", "chats.jsonl:2"]
    (line,) = caplog.messages
    assert "tokenized 2 conversations, skipped 1" in line and "chats.jsonl line 2" in line
    assert "the chat template" in line


def test_all_refused_by_the_template_is_an_error_with_its_reason(tiny, tmp_path):
    conversations = JsonLines(write(tmp_path, called({"a": 1}))).load(None)
    with pytest.raises(ValueError, match=r"no conversation is left.*drops tool calls': 1 \(chats\.jsonl line 1\)"):
        encode_all(tiny.tokenizer, conversations, 500, tiny.eos_token_ids)


def test_a_bad_row_that_is_held_out_costs_no_run(tiny, tmp_path, caplog):
    """The conversation that the hash holds out cannot be used: another one is."""
    rows = [chat(f"question {n}", id=str(n)) for n in range(12)]
    held_out = FeatureDataModule(JsonLines(write(tmp_path, *rows)), tiny, num_validation=1)
    held_out.tokens()
    (chosen,) = held_out.validation_conversations
    rows[int(chosen.id)] = called({"a": 1}, chosen.question)
    data = FeatureDataModule(JsonLines(write(tmp_path, *rows)), tiny, num_validation=1)
    train, validation = data.tokens()
    assert (len(train), len(validation)) == (10, 1)
    assert data.validation_conversations[0].id != chosen.id
    assert "none of 1 validation conversations can be used" in caplog.text
    bad = [called({"a": n}, f"{n} + 1?") for n in range(3)]
    only_bad = FeatureDataModule(JsonLines(write(tmp_path, *bad)), tiny, num_validation=1)
    with pytest.raises(ValueError, match="drops tool calls"):
        only_bad.tokens()


def test_a_question_that_the_template_refuses_is_left_out_of_a_self_distilled_set(tiny, tmp_path, caplog):
    target = tiny.in_dtype(tiny.dtype)
    target.tokenizer = with_template(
        tiny, "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}" + CHATML + END,
    )  # fmt: skip
    path = write(tmp_path, {"question": "One?"}, {"system": "Be kind.", "question": "Two?"}, {"question": "Three?"})
    found = Questions(JsonLines(path), str(tmp_path / "out"), max_tokens=4).load(target)
    assert {conversation.question for conversation in found} <= {"One?", "Three?"} and found
    assert "refuses it: no system': 1 (chats.jsonl line 2)" in caplog.text


def test_a_prompt_that_the_template_refuses_is_left_out_of_a_benchmark(tiny, tmp_path, caplog):
    from hass_lightning.decoding import Autoregressive, DecodingModels

    target = tiny.in_dtype(tiny.dtype)
    target.tokenizer = with_template(tiny, "{% for m in messages %}{{ 1 // (m['content'] != 'bad') }}" + CHATML + END)
    prompts = [each.without_answers() for each in JsonLines(write(tmp_path, chat("good"), chat("bad"))).load(None)]
    records = run_benchmark({"": DecodingModels(target)}, {"autoregressive": Autoregressive()}, prompts,
                            max_new_tokens=4)  # fmt: skip
    assert [record.prompt_id for record in records] == ["chats.jsonl:0"]
    assert "ZeroDivisionError" in caplog.text
