"""Self-distillation: distinct questions, openers, several turns, resuming, seeds, the manifest."""

import hashlib
import json
import random
import threading
from collections import Counter

import pytest
import torch

from hass_lightning.data.benchmarks import BenchmarkPrompts
from hass_lightning.data.first_questions import ChosenQuestions
from hass_lightning.data.generate import SelfDistillation
from hass_lightning.data.order import split_validation
from hass_lightning.data.overlap import BenchmarkOverlap, NearDuplicates, words_of
from hass_lightning.data.prompts import read_conversations

SETTINGS = {
    "num_questions": 14, "num_validation": 4, "question_max_tokens": 8, "answer_max_tokens": 10,
    "answer_temperatures": (0.0, 1.0), "keep_unfinished_questions": True, "batch_size": 4,
}  # fmt: skip


def source(folder, **options):
    return SelfDistillation(str(folder), **SETTINGS | options)


@pytest.fixture(scope="module")
def corpus(tiny, tmp_path_factory):
    """A complete corpus of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("corpus") / "whole"
    source(folder).write(tiny)
    return folder


def test_the_corpus_holds_distinct_questions_and_a_manifest(corpus, tiny):
    conversations = read_conversations(str(corpus / "corpus.jsonl"))
    questions = [c.question for c in conversations]
    assert len(questions) == len({" ".join(q.lower().split()) for q in questions}) == 14
    assert [c.split for c in conversations].count("validation") == 4
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["counts"]["train"] == 10
    assert manifest["counts"]["validation"] == 4
    assert manifest["sha256"] == hashlib.sha256((corpus / "corpus.jsonl").read_bytes()).hexdigest()
    assert manifest["settings"]["fingerprint"] == tiny.weights_fingerprint
    assert manifest["settings"]["answer_temperatures"] == [0.0, 1.0]
    records = [json.loads(line) for line in (corpus / "corpus.jsonl").open()]
    assert {r["temperature"] for r in records if r["split"] == "validation"} == {0.0}
    assert {r["temperature"] for r in records if r["split"] == "train"} == {0.0, 1.0}
    train, validation = split_validation(conversations, 4)
    assert not {c.question for c in train} & {c.question for c in validation}


def test_a_finished_corpus_is_read_and_not_written(corpus, tiny, monkeypatch):
    monkeypatch.setattr("hass_lightning.data.continuous_batching.Batch", None)
    assert len(source(corpus).load(tiny)) == 14


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_batch_size_changes_nothing(corpus, tiny, tmp_path, batch_size):
    source(tmp_path / "again", batch_size=batch_size).write(tiny)
    assert (tmp_path / "again" / "corpus.jsonl").read_bytes() == (corpus / "corpus.jsonl").read_bytes()


def interrupted(corpus, folder, name, share, cut):
    """The folder after a kill while `name` is written: a random part of the lines, the last one incomplete."""
    folder.mkdir()
    shutil_names = ["settings.json", "questions.jsonl"] + (["texts.jsonl"] if name == "texts.jsonl" else [])
    for each in shutil_names:
        (folder / each).write_bytes((corpus / each).read_bytes())
    lines = (corpus / name).read_text().splitlines(keepends=True)
    random.Random(share).shuffle(lines)
    kept = "".join(lines[: int(share * len(lines))])
    (folder / name).write_text(kept[: len(kept) - cut] if cut else kept)


@pytest.mark.parametrize("name", ["questions.jsonl", "texts.jsonl"])
@pytest.mark.parametrize(
    ("share", "cut"), [(0.3, 7), (0.8, 30), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 0), (1, 3)])]
)
def test_a_killed_run_started_again_gives_the_same_corpus(corpus, tiny, tmp_path, name, share, cut):
    folder = tmp_path / "again"
    interrupted(corpus, folder, name, share, cut)
    source(folder).write(tiny)
    assert (folder / "corpus.jsonl").read_bytes() == (corpus / "corpus.jsonl").read_bytes()
    lines = [json.loads(line) for line in (folder / name).open()]
    key = "index" if name == "questions.jsonl" else "key"
    assert len(lines) == len({line[key] for line in lines})


def test_a_kill_while_the_corpus_is_put_together(corpus, tiny, tmp_path):
    folder = tmp_path / "again"
    interrupted(corpus, folder, "texts.jsonl", 1, 0)
    (folder / "corpus.jsonl").write_text("half a li")
    source(folder).write(tiny)
    assert (folder / "corpus.jsonl").read_bytes() == (corpus / "corpus.jsonl").read_bytes()


def test_a_corpus_grows_and_shrinks_and_keeps_its_beginning(corpus, tiny, tmp_path):
    folder = tmp_path / "growing"
    for count in (8, 14, 8, 14):
        source(folder, num_questions=count).write(tiny)
        lines = (folder / "corpus.jsonl").read_bytes().splitlines()
        assert lines == (corpus / "corpus.jsonl").read_bytes().splitlines()[:count]


@pytest.mark.parametrize(
    "option",
    [
        {"answer_max_tokens": 11},
        {"seed": 1},
        {"question_temperature": 0.5},
        {"num_validation": 5},
        {"openers": "package://data/openers.yaml"},
        {"turn_shares": (1, 1)},
        {"duplicate_similarity": 0.8},
    ],
    ids=str,
)
def test_other_settings_in_the_same_folder_are_refused(corpus, tiny, option):
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    with pytest.raises(ValueError, match=rf"another {next(iter(option))}.*data\.source\.output_dir"):
        source(corpus, **option).write(tiny)
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == before


def test_another_target_in_the_same_folder_is_refused(corpus, tiny):
    other = tiny.in_dtype(torch.float32)
    other.weights_fingerprint = "other"
    with pytest.raises(ValueError, match="another fingerprint"):
        source(corpus).write(other)


def test_a_target_that_repeats_itself_is_an_error_with_a_cure(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"repeats itself: 1 distinct.*question_temperature"):
        source(tmp_path / "x", question_temperature=0.0, num_questions=6).write(tiny)


def test_more_validation_than_questions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"num_questions=4 must exceed data\.source\.num_validation=4"):
        source(tmp_path, num_questions=4)


def test_two_at_once_write_it_once(corpus, tiny, tmp_path):
    folder, paths = tmp_path / "shared", []
    threads = [threading.Thread(target=lambda: paths.append(source(folder).write(tiny))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2
    assert (folder / "corpus.jsonl").read_bytes() == (corpus / "corpus.jsonl").read_bytes()
    assert len((folder / "texts.jsonl").read_text().splitlines()) == 14


# --- openers, several turns, benchmarks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(tiny):
    """The tiny target with a bias in its LM head, so that it generates short words and ends its texts."""
    target = tiny.in_dtype(torch.float32)
    target.head.lm_head_bias = torch.zeros(target.head.vocab_size)
    target.head.lm_head_bias[target.tokenizer(" ")["input_ids"]] = 6.0
    target.head.lm_head_bias[list(target.eos_token_ids)] = 3.5
    return target


@pytest.fixture(scope="module")
def openers(tmp_path_factory):
    path = tmp_path_factory.mktemp("openers") / "openers.yaml"
    path.write_text("coding: [Write a, Fix this code]\nmath: [Solve, How many]\nplay: [Act as]\n")
    return str(path)


TURNS = {
    "num_questions": 36, "num_validation": 6, "question_max_tokens": 80, "answer_max_tokens": 80,
    "turn_shares": (1, 2, 3), "plain_share": 0.25, "question_top_k": 200, "keep_unfinished_questions": False,
    "answer_temperatures": (1.0, 0.8),
}  # fmt: skip


@pytest.fixture(scope="module")
def conversations(talking, openers, tmp_path_factory):
    """(folder, lines, manifest) of a corpus with openers and several turns."""
    folder = tmp_path_factory.mktemp("turns") / "whole"
    source(folder, **TURNS, openers=openers).write(talking)
    lines = [json.loads(line) for line in (folder / "corpus.jsonl").open()]
    return folder, lines, json.loads((folder / "manifest.json").read_text())


def users(line):
    return [message["content"] for message in line["messages"] if message["role"] == "user"]


def test_each_question_begins_with_an_opener_of_its_category(conversations):
    begins = {"coding": ("Write a", "Fix this code"), "math": ("Solve", "How many"), "play": ("Act as",)}
    _, lines, _ = conversations
    for line in lines:
        if line["category"] != "general":
            assert users(line)[0].startswith(begins[line["category"]])
            assert not any(users(line)[0] == opener for opener in begins[line["category"]])
    counts = Counter(line["category"] for line in lines)
    assert set(counts) == {*begins, "general"}
    assert min(counts.values()) >= 3


def test_conversations_have_several_turns_and_end_where_an_answer_was_cut(conversations):
    folder, lines, _ = conversations
    turns = Counter(len(users(line)) for line in lines)
    assert set(turns) == {1, 2, 3}
    for line in lines:
        assert [m["role"] for m in line["messages"]] == ["user", "assistant"] * len(users(line))
    texts = [json.loads(line) for line in (folder / "texts.jsonl").open()]
    for line in lines:
        mine = {r["text"]: r for r in texts if r["id"] == line["id"].split("-")[1]}
        assert all(mine[m["content"]]["finished"] for m in line["messages"][1:-1:2])
        assert mine[line["messages"][-1]["content"]]["finished"] == line["finished"]
    assert len({line["finished"] for line in lines}) == 2


def test_the_manifest_counts_what_the_corpus_holds_and_what_was_dropped(conversations):
    folder, lines, manifest = conversations
    counts = manifest["counts"]
    assert counts["train"] + counts["validation"] == len(lines)
    assert counts["turns"] == {str(n): c for n, c in sorted(Counter(len(users(line)) for line in lines).items())}
    found = Counter(line["category"] for line in lines)
    assert {name: each["conversations"] for name, each in counts["categories"].items()} == dict(found)
    several = Counter(line["category"] for line in lines if len(users(line)) > 1)
    assert {name: each["of_several_turns"] for name, each in counts["categories"].items()} == {
        n: several[n] for n in found
    }
    assert counts["unfinished_answers"] == sum(not line["finished"] for line in lines)
    texts = {(r["id"], r["text"]): r["num_tokens"] for r in map(json.loads, (folder / "texts.jsonl").open())}
    tokens = sum(texts[line["id"].split("-")[1], m["content"]] for line in lines for m in line["messages"][1::2])
    assert counts["answer_tokens"] == tokens
    questions = [json.loads(line) for line in (folder / "questions.jsonl").open()]
    last = max(int(line["id"].split("-")[1]) for line in lines)
    looked_at = [record for record in questions if record["index"] <= last]
    assert counts["dropped"]["an unfinished question"] == sum(not record["finished"] for record in looked_at)
    assert sum(counts["dropped"].values()) == len(looked_at) - len(lines)
    assert counts["ended_early"].keys() <= {"an unfinished answer", "an empty answer", "an unfinished question",
                                            "a short question", "a repeated question"}  # fmt: skip
    assert counts["ended_early"]["an unfinished answer"] > 0


@pytest.mark.parametrize(("name", "share", "batch_size"), [("questions.jsonl", 0.5, 3), ("texts.jsonl", 0.4, 64)])
def test_several_turns_survive_a_kill(conversations, talking, openers, tmp_path, name, share, batch_size):
    folder, whole = tmp_path / "again", conversations[0]
    interrupted(whole, folder, name, share, 11)
    source(folder, **TURNS, openers=openers, batch_size=batch_size).write(talking)
    assert (folder / "corpus.jsonl").read_bytes() == (whole / "corpus.jsonl").read_bytes()
    assert json.loads((folder / "manifest.json").read_text())["counts"] == conversations[2]["counts"]


def test_what_stands_in_an_installed_benchmark_is_dropped(conversations, talking, openers, tmp_path):
    whole, lines, manifest = conversations
    folder = tmp_path / "again"
    interrupted(whole, folder, "texts.jsonl", 1, 0)
    asked = next(line for line in lines if len(words_of(users(line)[0])) >= 8)
    answered = next(x for x in lines if x != asked and len(words_of(x["messages"][1]["content"])) >= 8)
    records = [{"prompt": users(asked)[0]}, {"prompt": answered["messages"][1]["content"]}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    benchmarks = {
        "mine": BenchmarkPrompts("mine", folder=str(tmp_path), file="b.jsonl", limit=1),
        "elsewhere": BenchmarkPrompts("elsewhere", folder=str(tmp_path), file="nothing.jsonl", hub="owner/name"),
    }
    source(folder, **TURNS, openers=openers, benchmarks=benchmarks).write(talking)
    found = [json.loads(line) for line in (folder / "corpus.jsonl").open()]
    gone = {line["id"].split("-")[1] for line in (asked, answered)}
    assert not gone & {line["id"].split("-")[1] for line in found}
    after = json.loads((folder / "manifest.json").read_text())
    assert after["counts"]["dropped"]["words of mine"] >= 2
    assert after["settings"]["benchmarks"] == ["mine"]
    assert manifest["settings"]["benchmarks"] == []
    assert len(found) == len(lines) - 1  # another question replaced the first
    before = (folder / "manifest.json").read_bytes()  # a machine without the file uses the corpus that was compared
    source(folder, **TURNS, openers=openers).write(talking)
    assert (folder / "manifest.json").read_bytes() == before


def test_questions_are_chosen_by_number_and_not_beyond_a_gap():
    def chosen(texts, wanted=3, **options):
        found = ChosenQuestions(
            wanted, NearDuplicates(0.7), BenchmarkOverlap({"b": ["one two three four five six 7 8"]}), **options
        )
        found.read({n: {"text": text, "finished": not text.endswith("…")} for n, text in texts.items()})
        return found

    texts = {0: "What is a cat?", 1: "what is a cat", 2: "Why", 3: "How do cats…", 4: "one two three four five six 7 8",
             5: "What is a dog?", 7: "What is a bird?"}  # fmt: skip
    found = chosen(texts)
    assert list(found.kept) == [0, 5]
    assert found.next == 6
    assert found.dropped == Counter(
        {"a near-duplicate": 1, "a short question": 1, "an unfinished question": 1, "words of b": 1}
    )
    found = chosen(texts | {6: "What is a fish?"})
    assert list(found.kept) == [0, 5, 6]
    assert found.next == 7
    assert list(chosen({0: "Why", 1: "How do cats…"}, keep_unfinished=True).kept) == [0, 1]


@pytest.mark.parametrize(
    "option", [{"turn_shares": ()}, {"turn_shares": (0, 0)}, {"turn_shares": (1, -1)}, {"plain_share": 1.5}], ids=str
)
def test_shares_out_of_range_are_named(tmp_path, option):
    with pytest.raises(ValueError, match=rf"data\.source\.{next(iter(option))}="):
        source(tmp_path, **option)


def test_a_plan_knows_the_most_that_is_written(tmp_path):
    assert source(tmp_path).most_tokens() == (14 * 8, 14 * 10)
    assert source(tmp_path, turn_shares=(1, 2, 1)).most_tokens() == (28 * 8, 28 * 10)
