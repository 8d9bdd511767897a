"""Kind 12, the data: a sentence with key, value and fix wherever a library would speak."""

import bz2
import gzip
import json

import pytest

from hass_lightning.data.answered_questions import Questions
from hass_lightning.data.benchmarks import BenchmarkPrompts
from hass_lightning.data.datamodule import FeatureDataModule
from hass_lightning.data.generate import SelfDistillation
from hass_lightning.data.prompts import HubDataset, JsonLines
from hass_lightning.data.records import read_json_lines

datasets = pytest.importorskip("datasets")
ROWS = [
    {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]} for n in range(3)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def questions(source):
    return [conversation.question for conversation in source.load(None)]


def message_of(source):
    with pytest.raises(ValueError) as error:
        source.load(None)
    return str(error.value)


@pytest.fixture
def rows():
    return datasets.Dataset.from_list(ROWS)


def test_a_save_to_disk_folder_is_read(tmp_path, rows):
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows.select([0, 1]), test=rows.select([2])).save_to_disk(tmp_path / "several")
    assert questions(HubDataset(str(tmp_path / "one"))) == ["q 0", "q 1", "q 2"]
    assert questions(HubDataset(str(tmp_path / "several"))) == ["q 0", "q 1"]
    assert questions(HubDataset(str(tmp_path / "several"), split="test")) == ["q 2"]
    message = message_of(HubDataset(str(tmp_path / "several"), split="valid"))
    assert f"data.source.split=valid is not in {tmp_path}/several, which has train, test" in message


def test_a_parquet_file_is_read_and_named_where_json_is_expected(tmp_path, rows):
    for name in ("chats.parquet", "chats.jsonl"):
        rows.to_parquet(tmp_path / name)
        assert questions(HubDataset(str(tmp_path / name))) == ["q 0", "q 1", "q 2"]
        message = message_of(JsonLines(str(tmp_path / name)))
        assert f"{name} is a Parquet file: read it with data=sharegpt data.source.path={tmp_path}/{name}" in message
    (tmp_path / "x.jsonl").write_text(LINES)
    message = message_of(HubDataset(str(tmp_path / "x.jsonl")))
    assert "x.jsonl is not a Parquet file" in message and "data=jsonl" in message


def test_files_that_cannot_be_cast_are_a_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl").write_text('{"messages": "text", "score": 3}\n')
    message = message_of(HubDataset(str(tmp_path)))
    assert f"data.source.path={tmp_path}" in message and "score" in message
    assert "the same columns and types" in message and "data=jsonl" in message


@pytest.mark.parametrize("split", ["nope", "train[:x]"])
def test_a_split_that_is_not_there_names_its_key(tmp_path, split):
    (tmp_path / "train.jsonl").write_text(LINES)
    message = message_of(HubDataset(str(tmp_path), split=split))
    assert f"data.source.split={split} is not in {tmp_path}" in message and "one of its splits" in message


def test_folders_without_data_and_configs_that_are_not_there(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"data.source.path={empty} cannot be read" in message_of(HubDataset(str(empty)))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(LINES)
    assert "+data.source.config=NAME" in message_of(HubDataset(str(tmp_path / "set"), config="nope"))
    message = message_of(JsonLines(str(tmp_path / "set")))
    assert f"data.source.path={tmp_path}/set is a folder" in message and "data=sharegpt" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bz2.compress(LINES.encode()), "is compressed with bzip2: unpack it"),
        (b"PK\x03\x04rest", "is a zip archive: unpack it"),
        (gzip.compress(LINES.encode())[:-20], "it may be cut off or damaged"),
        (gzip.compress(b"PAR1rest"), "is a Parquet file"),
        (json.dumps(ROWS)[:-30].encode(), "begins as a JSON array and is not one"),
        (b'[{"a": 1},\n {"a": 2,}]', "at line 2"),
        (b"", "it is empty"),
    ],
    ids=["bzip2", "zip", "cut gzip", "zipped Parquet", "cut array", "broken array", "empty"],
)
def test_a_file_of_another_format_says_what_to_do(tmp_path, content, words):
    (tmp_path / "chats.jsonl").write_bytes(content)
    message = message_of(JsonLines(str(tmp_path / "chats.jsonl")))
    assert "chats.jsonl" in message and words in message


def test_a_damaged_file_of_texts_keeps_what_is_whole(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(LINES.encode() + b'{"messages": [')
    assert len([record for record in read_json_lines(tmp_path / "texts.jsonl") if record]) == 3


ODD = [None, True, 0, -1, 1.5, float("nan"), float("inf"), "four", "", [], {}, [1, "x"]]
CLASSES = {
    JsonLines: ({"path": "x.jsonl"}, ("path", "limit", "system_prompt", "columns")),
    HubDataset: ({"path": "x"}, ("path", "split", "limit", "system_prompt", "columns")),
    Questions: ({"source": None, "output_dir": ""}, (
        "answers", "num_questions", "num_turns", "only_answered", "temperature", "max_tokens", "max_length",
        "num_validation", "batch_size", "seed",
    )),
    SelfDistillation: ({"output_dir": "", "num_questions": 6, "num_validation": 2}, (
        "num_questions", "num_validation", "plain_share", "turn_shares", "question_temperature", "question_top_k",
        "question_max_tokens", "answer_temperatures", "answer_max_tokens", "batch_size",
    )),
    FeatureDataModule: ({"source": None}, (
        "max_length", "max_answer_tokens", "fraction", "num_validation", "batch_size", "noise", "seed", "features",
        "eight_bit_cache", "num_workers", "last_turn_only", "prefetch",
    )),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, (_, keys) in CLASSES.items() for key in keys])
def test_a_value_of_a_source_works_or_is_refused_by_name(tiny, kind, key):
    accepted, fixed = 0, CLASSES[kind][0] | ({"target": tiny} if kind is FeatureDataModule else {})
    for value in ODD:
        try:
            kind(**{**fixed, key: value})
            accepted += 1
        except ValueError as error:
            sentence = str(error)
            assert f"data.source.{key}" in sentence or f"data.{key}" in sentence, (value, sentence)
            assert len(sentence) > 40, sentence
    assert accepted < len(ODD), "nothing is refused"


def test_a_benchmark_whose_data_set_cannot_be_read_names_the_file_to_give(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl").write_text('{"score": 3}\n')
    message = message_of_benchmark(BenchmarkPrompts("mine", hub=str(tmp_path), hub_split="train"))
    assert "mine cannot be read from" in message and "set benchmark.path to a JSON lines file" in message
    (tmp_path / "own.jsonl").write_text('{"question": "a"}\n{"question": null}\n')
    prompt = BenchmarkPrompts("mine", prompt="{question} {", path=str(tmp_path / "own.jsonl"))
    assert "double the braces" in message_of_benchmark(prompt)


def message_of_benchmark(benchmark):
    with pytest.raises(ValueError) as error:
        benchmark.load()
    return str(error.value)
