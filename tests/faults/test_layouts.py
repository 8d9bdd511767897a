"""Kind 8, the data: what a data set says is read as the users of its format mean it, or counted by reason."""

import gzip
import json

import pytest

from hass_lightning.data.order import split_validation
from hass_lightning.data.prompts import HubDataset, JsonLines, parse_conversation
from hass_lightning.data.skipped import SkippedConversation
from hass_lightning.types import Message


def chat(*texts, **more):
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], **more}


def said(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def read(record, **options):
    return parse_conversation(record, "x", **options)


# --- null is not given -----------------------------------------------------------------------------------------------


def test_null_is_not_given():
    nothing = dict.fromkeys(("id", "category", "split", "finished", "tools", "system"))
    turns = [
        {"role": None, "content": None, "from": "human", "value": "q", "tool_calls": None, "weight": None},
        {"role": None, "content": None, "from": "gpt", "value": "a", "tool_calls": None, "reasoning_content": None},
    ]
    conversation = read({"messages": None, "conversations": turns, **nothing})
    assert conversation == read({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    assert (conversation.id, conversation.category, conversation.split, conversation.finished) == ("x", "", "", True)


@pytest.mark.parametrize(("value", "finished"), [(False, False), (0, False), (True, True), (1, True), (None, True)])
def test_finished_is_a_flag(value, finished):
    assert read(chat("q", "a", finished=value)).finished is finished


@pytest.mark.parametrize("value", ["false", 2, [], "x"])
def test_a_flag_of_another_kind_is_refused(value):
    with pytest.raises(SkippedConversation, match="neither true nor false"):
        read(chat("q", "a", finished=value))


def test_keys_that_parquet_adds_to_arguments_and_tools_are_dropped():
    call = {"id": "c", "function": {"name": "f", "arguments": {"a": 1, "b": None, "c": {"d": None, "e": [None, 2]}}}}
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": None}, "required": None,
    }}}  # fmt: skip
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    conversation = read({"messages": turns, "tools": [tool]})
    assert conversation.messages[1].tool_calls[0]["function"]["arguments"] == {"a": 1, "c": {"e": [None, 2]}}
    assert conversation.tools[0]["function"] == {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    }
    call["function"]["arguments"] = '{"a": null}'  # a text is what somebody wrote
    assert read({"messages": turns}).messages[1].tool_calls[0]["function"]["arguments"] == {"a": None}


# --- turns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_each_of_its_names(name):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", name: "Two and two.", "content": "4"}]
    assert read({"messages": turns}).messages[1] == Message("assistant", "4", reasoning="Two and two.")
    parts = [{"type": "thinking", "thinking": "Two and two."}, {"type": "text", "text": "4"}]
    assert read({"messages": [turns[0], {"role": "assistant", "content": parts}]}).messages[1].reasoning
    with pytest.raises(SkippedConversation, match="reasoning that is not text"):
        read({"messages": [turns[0], {"role": "assistant", name: 5, "content": "4"}]})


def test_a_turn_of_weight_0_is_context():
    turns = chat("q", "bad", "r", "good")["messages"]
    turns[1]["weight"], turns[3]["weight"] = 0, 1
    assert [message.in_loss for message in read({"messages": turns}).messages] == [True, False, True, True]
    for odd in (0.5, "0", -1):
        turns[1]["weight"] = odd
        with pytest.raises(SkippedConversation, match="neither 0 nor 1"):
            read({"messages": turns})


def test_content_may_be_a_list_of_text_parts():
    parts = [{"type": "text", "text": "a ", "image_url": None}, {"type": "text", "text": "b"}]
    assert said(read(chat(parts, parts))) == [("user", "a b"), ("assistant", "a b")]
    with pytest.raises(SkippedConversation, match="a part that is not text \\('image_url'\\)"):
        read(chat([{"type": "image_url", "image_url": {"url": "x"}}], "a"))


def test_tools_and_the_ids_of_calls_are_kept():
    function = {"name": "add", "parameters": {"type": "object"}}
    turns = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": ""},
        {"role": "assistant", "content": "3"},
    ]
    for tools in ([{"type": "function", "function": function}], [function], json.dumps([function])):
        conversation = read({"messages": turns, "tools": tools})
        assert conversation.tools == ({"type": "function", "function": function},)
    assert conversation.messages[1].tool_calls[0]["id"] == "c1"
    assert conversation.messages[2] == Message("tool", "", tool_call_id="c1", name="add")
    assert conversation.without_answers().tools == conversation.tools
    with pytest.raises(SkippedConversation, match="malformed tools"):
        read({"messages": turns, "tools": ["add"]})


def test_sharegpt_tool_turns_and_a_single_function_call():
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [("human", "q"), ("function_call", json.dumps(call)), ("observation", "3"), ("gpt", "It is 3.")]
    shared = read({"conversations": [{"from": role, "value": text} for role, text in turns], "system": "Be kind."})
    assert [message.role for message in shared.messages] == ["system", "user", "assistant", "tool", "assistant"]
    old = chat("q")["messages"] + [{"role": "assistant", "content": None, "function_call": call}]
    assert read({"messages": old}).messages[1].tool_calls == shared.messages[2].tool_calls
    with pytest.raises(SkippedConversation, match="malformed tool_calls"):
        read({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "add"}]})


# --- layouts ---------------------------------------------------------------------------------------------------------

ONE = [("user", "q"), ("assistant", "a")]
TWO = [*ONE, ("user", "r"), ("assistant", "b")]
LAYOUTS = {
    "a singular conversation": ({"conversation": chat("q", "a", "r", "b")["messages"]}, TWO),
    "pairs": ({"conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]}, TWO),
    "named pairs": ({"conversation": [{"human": "q", "assistant": "a"}]}, ONE),
    "turns of roles": ({"turns": chat("q", "a")["messages"]}, ONE),
    "as JSON text": ({"messages": json.dumps(chat("q", "a")["messages"])}, ONE),
    "an object of lists": ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, ONE),
    "instruction": ({"instruction": "q", "input": "", "output": "a", "text": "### q a"}, ONE),
    "instruction with input": ({"instruction": "q", "input": "i", "output": "a"}, [("user", "q\n\ni"), ONE[1]]),
    "instruction with context": ({"instruction": "q", "context": "c", "response": "a", "category": "qa"},
                                 [("user", "q\n\nc"), ONE[1]]),
    "instruction with history": ({"instruction": "r", "output": "b", "history": [["q", "a"]], "system": ""}, TWO),
    "prompt and response": ({"prompt": "q", "response": "a"}, ONE),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, ONE),
    "messages in both": ({"prompt": chat("q")["messages"], "completion": [{"role": "assistant", "content": "a"}]}, ONE),
    "question and answer": ({"question": "q", "answer": "a"}, ONE),
    "system, question, response": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"},
                                   [("system", "s"), *ONE]),
    "query and response": ({"query": "q", "response": "a", "type": "GSM"}, ONE),
    "input and output": ({"input": "q", "output": "a"}, ONE),
    "messages before all others": ({"prompt": "no", "response": "no", **chat("q", "a")}, ONE),
    "a developer": ({"messages": [{"role": "developer", "content": "s"}, *chat("q", "a")["messages"]]},
                    [("system", "s"), *ONE]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_public_layout_is_read(tmp_path, name):
    record, expected = LAYOUTS[name]
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    (conversation,) = JsonLines(str(tmp_path / "x.jsonl")).load(None)
    assert said(conversation) == expected


def test_reasoning_beside_an_answer_is_the_answers():
    assert read({"question": "q", "reasoning": "r", "answer": "a"}).messages[1].reasoning == "r"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "response": "a", "output": "b"}, "several columns may be the answer (output, response)"),
        ({"prompt": "q", "question": "r", "answer": "a"}, "several columns may be the question (prompt, question)"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "a history that is no list of pairs"),
        ({"turns": ["q", None]}, "a turn that is not text"),
        ({"text": "### q a"}, "no `messages` or `conversations` list"),
        ({"chosen": chat("q", "a")["messages"]}, "no `messages` or `conversations` list"),
    ],
    ids=str,
)
def test_what_is_not_unmistakable_is_not_guessed(record, reason):
    with pytest.raises(SkippedConversation) as error:
        read(record)
    assert str(error.value).startswith(reason)


MAPPED = {
    "two columns": ({"frage": "q", "antwort": "a", "prompt": "no"}, {"prompt": "frage", "response": "antwort"}, ONE),
    "turns": ({"chosen": chat("q", "a")["messages"]}, {"messages": "chosen"}, ONE),
    "turns of other keys": ({"log": [{"who": "user", "what": "q"}, {"who": "bot", "what": "a"}]},
                            {"messages": "log", "role": "who", "content": "what"}, ONE),
    "which of several": ({"prompt": "q", "response": "no", "output": "a"}, {"prompt": "prompt", "response": "output"},
                         ONE),
    "a system column": ({"q": "q", "a": "a", "s": "s"}, {"prompt": "q", "response": "a", "system": "s"},
                        [("system", "s"), *ONE]),
    "a column that is ignored": (chat("q", "a", split="B"), {"split": None}, ONE),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_columns_map_any_other_layout(tmp_path, name):
    record, columns, expected = MAPPED[name]
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    (conversation,) = JsonLines(str(tmp_path / "x.jsonl"), columns=columns).load(None)
    assert said(conversation) == expected


def test_the_error_shows_how_to_map(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "1", "frage": "q", "antwort": "a"}))
    with pytest.raises(ValueError, match="has the columns id, frage, antwort") as error:
        JsonLines(str(tmp_path / "x.jsonl")).load(None)
    assert "'+data.source.columns={prompt: frage, response: antwort}'" in str(error.value)
    with pytest.raises(ValueError, match=r"no column 'answer' \(data\.source\.columns\.response\)"):
        JsonLines(str(tmp_path / "x.jsonl"), columns={"prompt": "frage", "response": "answer"}).load(None)


def test_a_column_name_that_cannot_be_printed_is_escaped(tmp_path):
    (tmp_path / "x.jsonl").write_text(r'{"\ud83d": "q"}')
    with pytest.raises(ValueError) as error:
        JsonLines(str(tmp_path / "x.jsonl")).load(None)
    assert r"has the columns \ud83d;" in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize("columns", ["frage", {"question": "frage"}, {"prompt": 3}, ["prompt"]], ids=str)
def test_columns_that_name_nothing_are_refused(columns):
    with pytest.raises(ValueError, match=r"data\.source\.columns.*names: messages, prompt"):
        JsonLines("x.jsonl", columns=columns)
    with pytest.raises(ValueError, match=r"data\.source\.columns"):
        HubDataset("x", columns=columns)


def test_columns_come_from_the_command_line(train, tmp_path):
    rows = [{"frage": f"What about {n}?", "antwort": "I do not know."} for n in range(12)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"_target_": "hass_lightning.data.prompts.JsonLines", "path": f"{tmp_path}/x.jsonl"}
    words = ("data.num_validation=2", "data.batch_size=2", "trainer.max_steps=1")
    done = train("~data.source", f"+data.source={json.dumps(source).replace(chr(34), '')}", *words)
    assert done.code == 1 and not done.traced
    assert "'+data.source.columns={prompt: frage, response: antwort}'" in done.error
    columns = "+data.source.columns={prompt: frage, response: antwort}"
    done = train("~data.source", f"+data.source={json.dumps(source).replace(chr(34), '')}", columns, *words)
    assert done.code == 0, done.err


# --- splits ----------------------------------------------------------------------------------------------------------


def split(*labels, num_validation=2):
    rows = [chat(f"q{n}", "a", id=str(n), split=label) for n, label in enumerate(labels)]
    parts = split_validation([read(row) for row in rows], num_validation)
    return [sorted(int(each.id) for each in part) for part in parts]


def test_train_everywhere_is_split_by_the_questions():
    assert split(*["train"] * 9) == split(*[None] * 9) == split(*[""] * 9)


@pytest.mark.parametrize("label", ["validation", "valid", "val", "dev", "eval", "Validation", "validation_sft"])
def test_a_validation_split_has_many_names(label):
    assert split(label, "train", "train_sft", label, None) == [[1, 2, 4], [0, 3]]


def test_rows_of_the_test_split_are_never_trained_on():
    assert split("validation", "test", "train", "test_sft", "validation", "train") == [[2, 5], [0, 4]]
    train, validation = split("test", *["train"] * 6, "test", num_validation=2)
    assert not {0, 7} & {*train, *validation} and len(train) == 4
    repeated = [read(chat("same", "a", split="test")), *(read(chat(f"q{n}", "a")) for n in range(4))]
    repeated.append(read(chat("Same", "b", id="copy", split="train")))
    assert "copy" not in {each.id for part in split_validation(repeated, 1) for each in part}
    with pytest.raises(ValueError, match=r"3 are of their test split.*data\.num_validation"):
        split("test", "test", "test")


def test_an_unknown_split_is_counted(tmp_path):
    with pytest.raises(SkippedConversation, match="none of train, validation and test"):
        read(chat("q", "a", split="fold 3"))


# --- files -----------------------------------------------------------------------------------------------------------

ROWS = [chat(f"Grüße {n}", "a\u2028b") for n in range(3)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
FILES = {
    "lines.json": LINES.encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "indented.jsonl": json.dumps(ROWS, indent=2).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "joined.jsonl": b"\xef\xbb\xbf" + b"\n\xef\xbb\xbf".join(json.dumps(row).encode() for row in ROWS),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode() + b"\r\n\r\n",
    "zipped.jsonl": gzip.compress(LINES.encode()),
    "plain.jsonl.gz": LINES.encode(),
    "array.jsonl.gz": gzip.compress(json.dumps(ROWS).encode()),
    "lines.txt": LINES.encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_the_content_decides_how_a_file_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    found = JsonLines(str(tmp_path / name)).load(None)
    assert [said(conversation) for conversation in found] == [said(read(row)) for row in ROWS]


def test_one_indented_object_is_one_record(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert len(JsonLines(str(tmp_path / "one.json")).load(None)) == 1


@pytest.mark.parametrize("name", ["latin.jsonl", "latin.json", "latin.jsonl.gz"])
def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path, name):
    content = b'{"a": 1}\n\n{"a": "ok"}\n{"a": "Gr\xfc\xdfe"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8: line 4 has the byte 0xfc at column 10.*iconv"):
        JsonLines(str(tmp_path / name)).load(None)
    (tmp_path / "wide.jsonl").write_text(LINES, encoding="utf-16")
    with pytest.raises(ValueError, match=r"wide\.jsonl is UTF-16 text, not UTF-8 \(line 1\).*iconv"):
        JsonLines(str(tmp_path / "wide.jsonl")).load(None)
