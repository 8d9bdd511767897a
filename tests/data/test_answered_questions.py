"""Questions: the target answers every turn, or the given answers are kept for the same questions."""

import gzip
import json
import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch

from hass_lightning.data.answered_questions import Questions
from hass_lightning.data.order import split_validation
from hass_lightning.data.prompts import HubDataset, JsonLines
from hass_lightning.data.tokens import encode_all, encode_prompt
from hass_lightning.types import Conversation, Message


@dataclass(frozen=True)
class Chats:
    """Two turns each, one with a system message, one without any answer."""

    def load(self, target):
        turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
        chats = [Conversation(str(n), (Message("user", f"hello {n}"), *turns[1:])) for n in range(4)]
        chats.insert(1, Conversation("system", (Message("system", "be brief"), *turns)))
        return [Conversation("asked", (turns[0],)), *chats]


@pytest.fixture(scope="module")
def ending(tiny):
    """The tiny target with many end tokens of one letter each, so that no answer stays empty."""
    target = tiny.in_dtype(torch.float32)
    target.eos_token_ids = frozenset(range(0, 259, 9)) | tiny.eos_token_ids
    return target


def first_turns(target, folder, answers, **options):
    settings = {"num_turns": 1, "only_answered": True, "max_tokens": 6} | options
    return Questions(Chats(), str(folder), answers, **settings).load(target)


def roles(conversation):
    return [message.role for message in conversation.messages]


# --- only the first turns: data=first_turns --------------------------------------------------------------------------


def test_both_kinds_of_answers_have_the_same_questions(tiny, tmp_path):
    given = first_turns(tiny, tmp_path, "given")
    assert [c.id for c in given] == ["0", "system", "1", "2", "3"]
    assert roles(given[1]) == ["system", "user", "assistant"]
    assert all(c.messages[-1] == Message("assistant", "b") and c.finished for c in given)
    assert not list(tmp_path.iterdir())
    own = first_turns(tiny, tmp_path, "own")
    assert [c.without_answers() for c in own] == [c.without_answers() for c in given]
    for conversation in own:  # greedy, token by token
        ids = encode_prompt(tiny.tokenizer, conversation.messages[:-1])
        start = len(ids)
        while len(ids) < start + 6 and (len(ids) == start or ids[-1] not in tiny.eos_token_ids):
            ids.append(int(tiny.head.logits(tiny.encode(torch.tensor([ids]))[0, -1]).argmax()))
        ended = ids[-1] in tiny.eos_token_ids
        written = tiny.tokenizer.decode(ids[start : len(ids) - ended], skip_special_tokens=True)
        assert (conversation.messages[-1].content, conversation.finished) == (written, ended)


def test_a_question_that_fills_the_context_is_left_out_of_both(tiny, tmp_path, caplog):
    class Long(Chats):
        def load(self, target):
            endless = (Message("user", "word " * tiny.max_length), Message("assistant", "b"))
            return [Conversation("endless", endless), *super().load(target)]

    for answers in ("given", "own"):
        settings = {"num_turns": 1, "only_answered": True, "max_tokens": 6}
        found = Questions(Long(), str(tmp_path), answers, **settings).load(tiny)
        assert [c.id for c in found] == ["0", "system", "1", "2", "3"]
        assert "1 questions leave no room" in caplog.text
        caplog.clear()


def test_what_is_answered_is_not_answered_again_under_the_same_settings(tiny, tmp_path, monkeypatch):
    whole = first_turns(tiny, tmp_path, "own", num_questions=3)
    file = tmp_path / "texts.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:10])
    assert first_turns(tiny, tmp_path, "own", num_questions=3) == whole
    first_turns(tiny, tmp_path, "own", num_questions=3, temperature=1.0)
    assert len(file.read_text().splitlines()) == 6

    def refuse(target, requests, *rest):
        return pytest.fail("written again") if requests else iter(())

    monkeypatch.setattr("hass_lightning.data.dialogues.write_texts", refuse)
    assert first_turns(tiny, tmp_path, "own", num_questions=3) == whole
    with pytest.raises(pytest.fail.Exception, match="written again"):
        first_turns(tiny, tmp_path, "own", num_questions=3, max_tokens=5)


# --- all turns: data=questions ----------------------------------------------------------------------------------------

ROWS = [
    {"id": "a", "category": "maths", "question": "What is two and two?"},
    {"id": "b", "category": "play", "turns": ["Act as a cat.", "Now as a dog.", "And as a bird."]},
    {"id": "b", "question": "The same id again?"},
    {"id": "c", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hello"}]},
    {"conversations": [{"from": who, "value": text} for who, text in [("human", "Hi"), ("gpt", "x"), ("user", "Bye")]]},
    {"id": "d", "turns": []},
    {"id": "e", "question": " "},
    *({"id": f"n{n}", "question": f"What comes after {n}?"} for n in range(10)),
]  # fmt: skip


@pytest.fixture(params=["questions.jsonl", "questions.jsonl.gz"])
def file(request, tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    path = tmp_path / request.param
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def asked(path, folder, **options):
    return Questions(JsonLines(str(path)), str(folder), **{"max_tokens": 12} | options)


def test_rows_of_every_shape_are_answered_turn_by_turn(file, ending, tmp_path):
    found = {c.id: c for c in asked(file, tmp_path / "out").load(ending)}
    assert list(found)[:5] == ["a", "b", "b#2", "c", f"{file.name}:4"]
    assert len(found) == 15
    assert (found["a"].category, found["b"].category, found["c"].category) == ("maths", "play", "")
    assert roles(found["c"]) == ["system", "user", "assistant"]
    assert [m.content for m in found["b"].messages[::2]] == ROWS[1]["turns"]
    assert [m.content for m in found[f"{file.name}:4"].messages[::2]] == ["Hi", "Bye"]
    assert found[f"{file.name}:4"].messages[1].content != "x"
    for conversation in found.values():
        starts = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
        for start in starts:  # the prompt of each turn contains the generated answers before it
            ids = encode_prompt(ending.tokenizer, conversation.messages[:start])
            first = int(ending.head.logits(ending.encode(torch.tensor([ids]))[0, -1]).argmax())
            assert conversation.messages[start].content.startswith(ending.tokenizer.decode([first]))
    lines = [json.loads(line) for line in (tmp_path / "out" / "corpus.jsonl").open()]
    assert [(line["id"], line["category"]) for line in lines] == [(c.id, c.category) for c in found.values()]
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts["turns"] == {"1": 13, "2": 1, "3": 1}
    assert len(encode_all(ending.tokenizer, found.values(), 500, ending.eos_token_ids)) == 15


def test_limits_of_questions_turns_and_length(file, ending, tmp_path):
    assert [c.id for c in asked(file, tmp_path / "out", num_questions=2).load(ending)] == ["a", "b"]
    cut = asked(file, tmp_path / "out", num_questions=2, num_turns=2).load(ending)
    assert [m.content for m in cut[1].messages[::2]] == ROWS[1]["turns"][:2]
    whole = asked(file, tmp_path / "out", num_questions=2).load(ending)[1]
    needed = len(encode_prompt(ending.tokenizer, whole.messages[:5])) + 12  # of the third turn
    assert asked(file, tmp_path / "out", num_questions=2, max_length=needed).load(ending)[1] == whole
    short = asked(file, tmp_path / "out", num_questions=2, max_length=needed - 1).load(ending)[1]
    assert short.messages == whole.messages[:4]
    with pytest.raises(ValueError, match=r"no question that can be asked.*max_length"):
        asked(file, tmp_path / "out", max_length=20).load(ending)


def test_temperatures_in_turn_and_greedy_validation(file, ending, tmp_path):
    settings = {"temperature": [0.0, 1.0, 0.5], "num_validation": 4}
    asked(file, tmp_path / "out", **settings).load(ending)
    lines = [json.loads(line) for line in (tmp_path / "out" / "corpus.jsonl").open()]
    for number, line in enumerate(lines):
        assert line["temperature"] == (0.0 if line["split"] == "validation" else [0.0, 1.0, 0.5][number % 3])
    assert sum(line["split"] == "validation" for line in lines) == 4
    conversations = asked(file, tmp_path / "out", **settings).load(ending)
    plain = asked(file, tmp_path / "out").load(ending)
    held_out = [c.id for c in split_validation(conversations, 4)[1]]
    assert held_out == [c.id for c in split_validation(plain, 4)[1]]  # what a hash of the questions would hold out
    assert {line["id"] for line in lines if line["split"] == "validation"} == set(held_out)


def test_rows_may_say_which_are_held_out(ending, tmp_path):
    path = tmp_path / "q.jsonl"
    splits = {3: "validation"}
    rows = [{"id": n, "question": f"why {n}?", "split": splits.get(n, "train")} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = asked(path, tmp_path / "out", num_validation=2, temperature=1.0).load(ending)
    assert [c.id for c in found if c.split == "validation"] == ["3"]


def test_given_answers_of_all_turns_need_answers(file, tmp_path, caplog):
    found = asked(file, tmp_path / "out", answers="given").load(None)
    assert [[m.content for m in c.messages] for c in found] == [["Hi", "x"]]
    assert "14 questions without an answer: they are left out" in caplog.text


def test_a_hub_data_set_comes_through_the_same_door(ending, tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    answer = {"role": "assistant", "content": "x"}
    rows = [{"prompt": "ignored", "messages": [{"role": "user", "content": f"q {n}"}, answer]} for n in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Questions(HubDataset(str(folder)), str(tmp_path / "out"), max_tokens=8).load(ending)
    assert [c.question for c in found] == ["q 0", "q 1", "q 2"]
    assert all(c.messages[1].content != "x" for c in found)


@pytest.mark.parametrize(
    "option", [{"answers": "theirs"}, {"num_turns": 0}, {"temperature": -1.0}, {"temperature": []}]
)
def test_values_out_of_range_are_named(option):
    with pytest.raises(ValueError, match=rf"data\.source\.{next(iter(option))}="):
        Questions(Chats(), "", **option)


def test_a_plan_counts_the_turns(file, tmp_path):
    assert asked(file, tmp_path).most_tokens() == (None, 18 * 12)
    assert asked(file, tmp_path, num_turns=1).most_tokens() == (None, 15 * 12)
    assert Questions(Chats(), "", "given").most_tokens() is None
    never_read = Questions(None, "", num_questions=7, num_turns=2, max_tokens=10)
    assert never_read.most_tokens() == (None, 140)


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(start_command, run_command, tmp_path):
    rows = [{"id": n, "turns": [f"Tell me about {n}.", "Go on.", "And then?"][: 1 + n % 3]} for n in range(60)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def words(folder, *more):
        # float64: where batches differ, float32 rounds differently, which changes one sampled token in ten thousand
        where = (f"data.source.source.path={path}", f"data.source.output_dir={folder}")
        few = ("data.source.max_tokens=160", "data.num_validation=6")
        return "target=tiny", "target.dtype=float64", "data=questions", *where, *few, *more

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start_command("prepare", *words(killed, "data.source.batch_size=8"))
    texts = killed / "texts.jsonl"
    while not texts.exists() or texts.read_bytes().count(b"\n") < 40:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "corpus.jsonl").exists()
    kept = texts.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    done = run_command("prepare", *words(killed, "data.source.batch_size=64"))
    assert done.code == 0, done.err
    assert texts.read_bytes().startswith(kept)  # nothing was generated twice
    keys = [json.loads(line)["key"] for line in texts.open()]
    assert len(keys) == len(set(keys)) > kept.count(b"\n")
    assert run_command("prepare", *words(whole, "data.source.batch_size=16")).code == 0
    assert (killed / "corpus.jsonl").read_bytes() == (whole / "corpus.jsonl").read_bytes()
    turns = [sum(m["role"] == "user" for m in json.loads(line)["messages"]) for line in (whole / "corpus.jsonl").open()]
    assert len(turns) == 60
    assert {1, 2} <= set(turns)
