"""Near-duplicates and passages of benchmarks."""

import random

import pytest

from hass_lightning.data.overlap import BenchmarkOverlap, NearDuplicates, ngrams, words_of

PROBLEM = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)


def kept(texts, similarity=0.7):
    duplicates = NearDuplicates(similarity)
    return [duplicates.keep(text) for text in texts]


def test_copies_go_whatever_their_case_and_punctuation():
    texts = ["How do vaccines work?", "How do vaccines work", "how DO vaccines -- work?!", "How do magnets work?"]
    assert kept(texts) == [True, False, False, True]


def test_a_few_other_words_are_a_near_duplicate_and_another_subject_is_not():
    base = "Write a Python function that takes a list of integers and returns the sum of all even numbers in the list"
    near = base.replace("a list of integers", "a list of whole integers")
    other = "Write a Python function that takes a string and returns the number of vowels in it, ignoring case"
    assert kept([base, near, other]) == [True, False, True]
    assert kept([base, near, other], similarity=1.0) == [True, True, True]
    assert kept([base, base, near], similarity=1.0) == [True, False, True]


def test_exactly_those_pairs_go_that_reach_the_similarity():
    """Compared with the exact similarity of random texts: nothing is dropped wrongly, almost nothing is missed."""
    draw, texts = random.Random(0), []
    for _ in range(60):
        words = [draw.choice("abcdefgh") * 2 for _ in range(20)]
        texts.append(" ".join(words))
        for _ in range(draw.randint(0, 3)):  # up to three words replaced
            words[draw.randrange(20)] = "zz"
        texts.append(" ".join(words))
    expected, seen = [], []
    for text in texts:
        found = ngrams(words_of(text), 3)
        expected.append(all(len(found & other) < 0.7 * len(found | other) for other in seen))
        if expected[-1]:
            seen.append(found)
    result = kept(texts)
    assert 10 < expected.count(False) < 60
    assert sum(one != other for one, other in zip(result, expected, strict=True)) <= 4
    assert not any(want and not got for want, got in zip(expected, result, strict=True))


def test_the_choice_is_the_same_in_every_process_and_follows_the_order():
    texts = [f"question {n // 2} about the number {n // 2} and its square" for n in range(40)]
    assert kept(texts) == kept(texts) == [n % 2 == 0 for n in range(40)]
    assert kept(texts[:7]) == kept(texts)[:7]


@pytest.mark.parametrize("similarity", [0, -1, 1.1])
def test_a_similarity_out_of_range_is_named(similarity):
    with pytest.raises(ValueError, match=rf"data\.source\.duplicate_similarity={similarity}"):
        NearDuplicates(similarity)


def test_thirteen_words_in_a_row_are_a_passage_and_twelve_are_not():
    overlap = BenchmarkOverlap({"gsm8k": [PROBLEM], "other": ["Compose an engaging travel blog post about a trip"]})
    words = PROBLEM.split()
    assert overlap.find(f"Please solve: {' '.join(words[5:18])} Thanks") == "gsm8k"
    assert overlap.find(f"Please solve: {' '.join(words[5:17])} Thanks") is None
    assert overlap.find(PROBLEM.upper().replace(",", " -")) == "gsm8k"
    assert overlap.find("") is None
    assert BenchmarkOverlap({}).find(PROBLEM) is None


def test_a_short_prompt_counts_as_a_whole_from_eight_words_on():
    overlap = BenchmarkOverlap(
        {"mt_bench": ["Compose an engaging travel blog post about a trip", "Write a short story"]}
    )
    assert overlap.find("Now compose an engaging travel blog post about a trip to Rome") == "mt_bench"
    assert overlap.find("Now compose an engaging travel blog post about a journey to Rome") is None
    assert overlap.find("Write a short story") is None
