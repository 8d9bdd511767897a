"""Conversations in both formats. Everything else is skipped and counted."""

import gzip
import json
import logging

import pytest

from hass_lightning.data.prompts import HubDataset, JsonLines, parse_all, parse_conversation
from hass_lightning.data.records import read_json_lines
from hass_lightning.data.skipped import SkippedConversation
from hass_lightning.types import Conversation, Message


def openai(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns]} | more


def sharegpt(*turns, **more):
    return {"conversations": [{"from": role, "value": content} for role, content in turns]} | more


def placed(records):
    return [(f"line {number}", record) for number, record in enumerate(records, start=1)]


GOOD = openai(("user", "a"), ("assistant", "b"))


def test_both_shapes_give_the_same_conversation():
    turns = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    expected = Conversation("7", turns, "maths", False, "validation")
    more = {"id": 7, "category": "maths", "finished": False, "split": "validation"}
    first = openai(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), **more)
    second = sharegpt(("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "r"), **more)
    assert parse_conversation(first, "x") == expected
    assert parse_conversation(second, "x") == expected
    assert parse_conversation(GOOD, "x").id == "x"
    assert parse_conversation(GOOD, "x").finished


SKIPPED = [
    ("text", "not a JSON object"),
    (None, "not a JSON object"),
    ([GOOD], "not a JSON object"),
    ({}, "no `messages` or `conversations` list"),
    ({"messages": []}, "no `messages` or `conversations` list"),
    ({"messages": "hello"}, "no `messages` or `conversations` list"),
    ({"messages": ["hello"]}, "a message is not an object"),
    (openai(("alien", "x")), "unknown role 'alien'"),
    ({"messages": [{"content": "x"}]}, "unknown role None"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role ['user']"),
    (openai(("user", "")), "an empty message"),
    (openai(("user", " \n")), "an empty message"),
    (openai(("user", None)), "an empty message"),
    (openai(("user", [])), "an empty message"),
    (openai(("user", {"text": "x"})), "a message that is not text"),
    (openai(("user", [{"type": "image_url"}])), "a message with a part that is not text ('image_url')"),
    (openai(("user", "a"), ("system", "s"), ("assistant", "b")), "a system message after the first"),
    (openai(("assistant", "a"), ("user", "b")), "roles out of order"),
    (openai(("user", "a"), ("user", "b")), "roles out of order"),
    (openai(("user", "a"), ("assistant", "b"), ("assistant", "c")), "roles out of order"),
    (openai(("system", "s")), "roles out of order"),
    (openai(("tool", "t"), ("user", "a"), ("assistant", "b")), "roles out of order"),
    (
        openai(("user", "a"), ("assistant", "b"), ("tool", "t"), ("assistant", "c"), ("assistant", "d")),
        "roles out of order",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": "add"}]},
        "malformed tool_calls",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]},
            ]
        },
        "malformed tool_calls",
    ),
]


def call(arguments):
    return [{"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}]


def with_call(arguments, *more, content=None):
    turns = [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": content, "tool_calls": call(arguments)},
    ]
    return {"messages": [*turns, *({"role": role, "content": text} for role, text in more)]}


@pytest.mark.parametrize("arguments", ['{"a": 2, "b": 3}', {"a": 2, "b": 3}])
def test_tool_calls_and_their_results_stand_between_assistant_turns(arguments):
    turns = ("tool", "5"), ("tool", "really"), ("assistant", "It is 5."), ("user", "Thanks"), ("assistant", "Welcome")
    messages = parse_conversation(with_call(arguments, *turns), "x").messages
    assert [message.role for message in messages] == ["user", "assistant", *(role for role, _ in turns)]
    assert messages[1].content == ""
    function = {"name": "add", "arguments": {"a": 2, "b": 3}}
    assert messages[1].tool_calls == ({"id": "1", "type": "function", "function": function},)
    conversation = parse_conversation(with_call(arguments, *turns), "x")
    assert [m.role for m in conversation.without_answers().messages] == ["user", "user"]


@pytest.mark.parametrize(("record", "reason"), SKIPPED, ids=lambda value: str(value)[:60])
def test_what_is_no_conversation_is_skipped_with_its_reason(record, reason):
    with pytest.raises(SkippedConversation) as error:
        parse_conversation(record, "x")
    assert str(error.value) == reason


def test_the_summary_counts_every_reason(caplog):
    records = [GOOD, *(record for record, _ in SKIPPED), GOOD]
    with caplog.at_level(logging.WARNING):
        kept = parse_all(placed(records), "file.jsonl")
    assert [conversation.id for conversation in kept] == ["file.jsonl:0", f"file.jsonl:{len(records) - 1}"]
    (line,) = caplog.messages
    assert "kept 2 conversations" in line
    reasons = [reason for _, reason in SKIPPED]
    assert all(f"{reason!r}: {reasons.count(reason)}" in line for reason in reasons)


def test_nothing_usable_is_an_error_that_names_the_file_and_the_reasons():
    with pytest.raises(ValueError, match=r"file\.jsonl.*unknown role 'alien'.*messages"):
        parse_all(placed([openai(("alien", "x"))]), "file.jsonl")
    with pytest.raises(ValueError, match=r"file\.jsonl.*it is empty"):
        parse_all([], "file.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_files_are_read_in_every_form(tmp_path, name):
    records = [openai(("user", "Grüße\u2028"), ("assistant", "b")), GOOD]
    text = (
        json.dumps(records) if ".jsonl" not in name else "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    )
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert [c.question for c in JsonLines(str(path)).load(None)] == ["Grüße\u2028", "a"]
    assert len(JsonLines(str(path), limit=1).load(None)) == 1


def test_a_line_that_is_no_json_is_one_skipped_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n{cut off\n" + json.dumps(GOOD) + "\n")
    assert [record is None for record in read_json_lines(path)] == [False, True, False]
    assert len(JsonLines(str(path)).load(None)) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", b"{cut off"), ("a.jsonl.gz", b"no gzip at all"), ("a.jsonl", b"\xff\xfe\x00")],
)
def test_a_file_in_no_such_form_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        JsonLines(str(path)).load(None)


def test_a_missing_file_is_named_with_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.jsonl does not exist.*data\.source\.path"):
        JsonLines(str(tmp_path / "nothing.jsonl")).load(None)


def test_a_hub_data_set_out_of_reach_says_so_at_once():
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"owner/name.*data\.source\.path"):
        HubDataset("owner/name").load(None)


def test_a_hub_data_set_of_an_earlier_run_needs_no_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # restored after the test
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(GOOD | {"id": str(n)}) + "\n" for n in range(3)))
    datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path))
    kept = (tmp_path / "json").rename(tmp_path / "owner___name")  # laid out as a data set of the hub is
    (configuration,) = kept.glob("default-*")
    (file,) = configuration.rename(kept / "default").rglob("*.arrow")
    file.rename(file.with_name("name-train.arrow"))
    assert [c.id for c in HubDataset("owner/name").load(None)] == ["0", "1", "2"]


def test_a_local_data_set_folder_is_read(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(GOOD | {"id": n}) + "\n" for n in range(3)))
    assert [c.id for c in HubDataset(str(folder), limit=2).load(None)] == ["0", "1"]


def test_a_system_prompt_leads_conversations_that_have_none(tmp_path):
    own = openai(("system", "mine"), ("user", "a"), ("assistant", "b"))
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(own))
    first, second = JsonLines(str(tmp_path / "x.jsonl"), system_prompt="Be kind.").load(None)
    assert [(m.role, m.content) for m in first.messages] == [("system", "Be kind."), ("user", "a"), ("assistant", "b")]
    assert second.messages[0].content == "mine"
