"""Openers: the packaged list, alternating categories, shares, turns, and files with another structure."""

from collections import Counter

import pytest

from hass_lightning.data.openers import Openers, num_turns, read_openers

PACKAGED = "package://data/openers.yaml"
FEW = {"coding": ["Write a", "Fix"], "math": ["Solve", "How many", "Prove"]}


def test_the_packaged_openers_are_many_distinct_and_ready_to_be_completed():
    found = read_openers(PACKAGED)
    texts = [text for lines in found.values() for text in lines]
    assert len(found) >= 11
    assert len(texts) == len(set(texts)) >= 200
    assert min(len(lines) for lines in found.values()) >= 15
    assert all(text == text.strip() and text for text in texts)  # a word boundary follows, which a token begins with


def test_categories_come_in_turn_and_each_line_of_them():
    openers = Openers(FEW, 0.0, seed=0)
    first = [openers[number] for number in range(12)]
    assert [opener.category for opener in first] == ["coding", "math"] * 6
    assert Counter(opener.text for opener in first) == {"Write a": 3, "Fix": 3, "Solve": 2, "How many": 2, "Prove": 2}
    assert [openers[number] for number in range(12)] == first
    orders = {tuple(Openers(FEW, 0.0, seed)[number].text for number in range(12)) for seed in range(8)}
    assert len(orders) > 2


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 1.0])
def test_plain_ones_are_spread_evenly(share):
    openers = Openers(FEW, share, seed=0)
    plain = [openers[number] == ("", "general") for number in range(600)]
    assert sum(plain) == pytest.approx(600 * share, abs=1)
    assert sum(plain[:60]) == pytest.approx(60 * share, abs=1)
    categories = Counter(openers[number].category for number in range(600))
    assert abs(categories["coding"] - categories["math"]) <= 1


def test_without_openers_there_is_no_category():
    openers = Openers(read_openers(None), 0.1, seed=0)
    assert {openers[number] for number in range(20)} == {("", "")}


def test_turns_follow_their_shares_and_depend_on_the_number_alone():
    drawn = [num_turns(number, (1, 2, 1), seed=0) for number in range(4000)]
    counts = Counter(drawn)
    assert [counts[n] / 4000 for n in (1, 2, 3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert [num_turns(number, (1, 2, 1), seed=0) for number in range(10)] == drawn[:10]
    assert [num_turns(number, (1, 2, 1), seed=1) for number in range(40)] != drawn[:40]
    assert {num_turns(number, (1.0,), seed=0) for number in range(100)} == {1}
    assert {num_turns(number, (0, 1), seed=0) for number in range(100)} == {2}


@pytest.mark.parametrize("text", ["", "[a, b]", "coding: []", "coding: Write", "coding: [1, 2]", "coding: [a]\nmath:"])
def test_another_file_is_named_with_its_key(tmp_path, text):
    path = tmp_path / "openers.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"data\.source\.openers=.*openers\.yaml must map"):
        read_openers(str(path))


def test_a_missing_file_is_named_with_its_key():
    with pytest.raises(ValueError, match=r"data\.source\.openers=nowhere\.yaml does not exist"):
        read_openers("nowhere.yaml")
