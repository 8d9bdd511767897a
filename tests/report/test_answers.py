from __future__ import annotations

from report_factory import Words, make_record

from hass_lightning.measure.token_kinds import pieces_of, token_texts
from hass_lightning.report.answers import worst_answers


def kinds(record):
    return [piece.kind for piece in pieces_of(record, Words())]


def test_chain_shows_a_rejected_token_before_the_correction():
    record = make_record(accepted=(2, 3, 0), depth=3)
    cycles = ["accepted accepted rejected corrected", "accepted accepted accepted target", "rejected corrected"]
    assert " ".join(kinds(record)) == " ".join(["target", *cycles])  # the first token comes from the prefill


def test_tooltip_lists_the_rejected_tokens_of_a_tree():
    record = make_record(accepted=(1,), depth=3, nodes=5)
    assert kinds(record) == ["target", "accepted", "corrected"]
    hint = pieces_of(record, Words())[-1].hint
    assert "1 of depth 3" in hint and "5 tokens drafted" in hint and "rejected: '.'" in hint


def test_all_tokens_appear_once():
    record = make_record(accepted=(2, 0, 3, 1))
    shown = "".join(piece.text for piece in pieces_of(record, Words()) if piece.kind != "rejected")
    assert shown == Words().decode(record.token_ids).replace("\n", "⏎\n")


def test_answer_truncated_in_its_last_cycle():
    record = make_record(accepted=(3, 3))
    record.token_ids = record.token_ids[:7]  # ends inside the accepted path
    assert kinds(record)[-2:] == ["accepted", "accepted"]
    record.token_ids = []
    assert pieces_of(record, Words()) == []


def test_without_proposals_and_tokenizer():
    record = make_record(accepted=(1, 0))
    record.proposals, record.nodes = [], []
    assert [piece.text for piece in pieces_of(record)] == ["0 ", "1 ", "2 ", "3 "]


def test_split_character_belongs_to_its_last_token():
    assert token_texts([0, 6, 7, 5], Words()) == [" the", "", "é", "."]
    assert token_texts([0, 6], Words()) == [" the", "\ufffd"]


def test_worst_and_best():
    records = [make_record(prompt_id=f"p{n}", accepted=(n % 4, n % 4, 0)) for n in range(5)]
    found = worst_answers({"hass": records}, Words(), {"p0": "Why?"}, num_worst=2)
    assert [(answer.place, answer.prompt_id) for answer in found] == [
        ("worst 1", "p0"),
        ("worst 2", "p4"),
        ("best", "p3"),
    ]
    assert found[0].question == "Why?" and found[1].question == ""


def test_autoregressive_answers_are_not_shown():
    assert worst_answers({"": [make_record("autoregressive", "", accepted=(0, 0), depth=0)]}, Words()) == []
