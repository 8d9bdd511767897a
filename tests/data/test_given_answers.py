"""FirstTurns: the same questions with given answers and with the target's own."""

from dataclasses import dataclass

import pytest
import torch

from hass_lightning.data.answers import FirstTurns
from hass_lightning.data.tokens import encode_prompt
from hass_lightning.types import Conversation, Message


@dataclass(frozen=True)
class Chats:
    """Two turns each, one with a system message, one without any answer."""

    def load(self, target):
        turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
        chats = [Conversation(str(n), (Message("user", f"hello {n}"), *turns[1:])) for n in range(4)]
        chats.insert(1, Conversation("system", (Message("system", "be brief"), *turns)))
        return [Conversation("asked", (turns[0],)), *chats]


def turns(target, folder, answers, **options):
    return FirstTurns(Chats(), answers, str(folder), max_tokens=6, **options).load(target)


def test_both_kinds_of_answers_have_the_same_questions(tiny, tmp_path):
    given = turns(tiny, tmp_path, "given")
    assert [c.id for c in given] == ["0", "system", "1", "2", "3"]
    assert [m.role for m in given[1].messages] == ["system", "user", "assistant"]
    assert all(c.messages[-1] == Message("assistant", "b") for c in given)
    assert not list(tmp_path.iterdir())
    own = turns(tiny, tmp_path, "own")
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
        found = FirstTurns(Long(), answers, str(tmp_path), max_tokens=6).load(tiny)
        assert [c.id for c in found] == ["0", "system", "1", "2", "3"]
        assert "1 questions leave no room" in caplog.text
        caplog.clear()


def test_an_interrupted_run_goes_on_and_other_settings_have_a_file_of_their_own(tiny, tmp_path, monkeypatch):
    whole = turns(tiny, tmp_path, "own", num_questions=3)
    (file,) = tmp_path.glob("answers-*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:10])
    assert turns(tiny, tmp_path, "own", num_questions=3) == whole

    def refuse(target, requests, *rest):
        return pytest.fail("written again") if requests else iter(())

    monkeypatch.setattr("hass_lightning.data.answers.write_texts", refuse)
    assert turns(tiny, tmp_path, "own", num_questions=3) == whole
    with pytest.raises(pytest.fail.Exception, match="written again"):
        turns(tiny, tmp_path, "own", num_questions=3, temperature=1.0)


def test_another_word_for_the_answers_is_refused():
    with pytest.raises(ValueError, match=r"data\.source\.answers=theirs"):
        FirstTurns(Chats(), "theirs", "")
