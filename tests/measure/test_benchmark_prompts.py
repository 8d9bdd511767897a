"""Benchmark prompts: every YAML of conf/benchmark on small files of the real format, the search order, the errors."""

import gzip
import hashlib
import json
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hass_lightning.data import benchmarks, from_config
from hass_lightning.data.benchmarks import BenchmarkPrompts, InlinePrompts
from hass_lightning.measure.statistics import LEAST_QUESTIONS

CONF = Path(__file__).parents[2] / "conf" / "benchmark"
RECORDS = {
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["Write {this}.", "Again."]},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f(x):\n    return {}\n", "entry_point": "f"},
    "gsm8k": {"question": "How many?", "answer": "#### 3"},
    "spec_bench": {"question_id": 5, "category": "rag", "turns": ["Read this."], "reference": []},
    "alpaca": {"instruction": "Translate.", "input": "", "output": "x"},
    "cnn_dm": {"id": "abc", "article": "News.", "highlights": "x"},
    "natural_questions": {"question": "who?", "answer": ["x"]},
    "math500": {
        "problem": "Find $\\frac{1}{2}$.",
        "unique_id": "test/algebra/1.json",
        "subject": "Algebra",
        "level": 2,
    },
    "mbpp": {"task_id": 11, "text": "Write f.", "code": "", "test_list": ["assert f(1)", "assert f(2)", "assert f(3)"]},
    "speed_bench": {"question_id": "a1", "category": "coding", "turns": ["Write f.", "Test it."]},
    "jsonl": {"id": "7", "category": "own", "messages": [{"role": "user", "content": "Hello"}]},
}
INLINE = {"smoke", "long_answers"}  # their prompts are in the YAML
EXPECTED = {
    "mt_bench": ("81", "writing", ["Write {this}.", "Again."]),
    "humaneval": ("HumanEval/0", "", ["def f(x):\n    return {}"]),
    "gsm8k": ("0", "", ["How many?"]),
    "spec_bench": ("5", "rag", ["Read this."]),
    "alpaca": ("0", "", ["Translate."]),
    "cnn_dm": ("abc", "", ["Summarize: News."]),
    "natural_questions": ("0", "", ["who?"]),
    "math500": ("test/algebra/1.json", "Algebra", ["Find $\\frac{1}{2}$."]),
    "mbpp": (
        "11",
        "",
        [
            "You are an expert Python programmer, and here is your task: Write f. Your code should pass these tests:"
            "\n\nassert f(1)\nassert f(2)\nassert f(3)"
        ],
    ),
    "speed_bench": ("a1", "coding", ["Write f.", "Test it."]),
    "jsonl": ("7", "own", ["Hello"]),
}


def write(path: Path, records) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_each_yaml_converts_its_records(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HASS_LIGHTNING_DATA", str(tmp_path))
    config = OmegaConf.load(CONF / f"{name}.yaml")
    if name == "jsonl":
        config.path = str(write(tmp_path / "own.jsonl", [RECORDS[name]]))
    else:
        write(tmp_path / config.file, [RECORDS[name]])
    benchmark = instantiate(config)
    assert benchmark.name == name
    (conversation,) = benchmark.load()
    assert (conversation.id, conversation.category, [m.content for m in conversation.messages]) == EXPECTED[name]


def test_every_yaml_is_tested():
    assert {path.stem for path in CONF.glob("*.yaml")} == {*RECORDS, *INLINE}


def test_smoke_needs_nothing():
    conversations = instantiate(OmegaConf.load(CONF / "smoke.yaml")).load()
    assert max(len(each.messages) for each in conversations) == 2
    assert len(InlinePrompts("x", ["a", "b"], limit=1).load()) == 1
    with pytest.raises(ValueError, match="empty"):
        InlinePrompts("x", []).load()


def test_long_answers_need_no_file_and_set_their_length(monkeypatch):
    conversations = instantiate(OmegaConf.load(CONF / "long_answers.yaml")).load()
    assert len(conversations) >= LEAST_QUESTIONS
    monkeypatch.setattr(from_config, "config_node", lambda group, name: OmegaConf.load(CONF / f"{name}.yaml"))
    answer_limit = from_config.answer_limit
    assert answer_limit("long_answers", 128) == 1024
    assert answer_limit("gsm8k", 128) == answer_limit("validation", 128) == 128
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        BenchmarkPrompts("x", max_new_tokens=0)


def test_prepared_speed_bench_has_messages_and_left_out_prompts_are_skipped(tmp_path, caplog):
    benchmark = OmegaConf.load(CONF / "speed_bench.yaml")
    asked = [{"role": "user", "content": text} for text in ("Write f.", "Test it.")]
    left_out = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
    records = [
        {"question_id": "a1", "category": "coding", "messages": asked},
        {"question_id": "a2", "category": "stem", "turns": [left_out]},
    ]
    benchmark.path = str(write(tmp_path / "qualitative.jsonl", records))
    (conversation,) = instantiate(benchmark).load()
    assert [message.content for message in conversation.messages] == ["Write f.", "Test it."]
    assert "left out by its publisher" in caplog.text


def test_a_record_with_too_few_items_is_skipped(tmp_path, caplog):
    benchmark = OmegaConf.load(CONF / "mbpp.yaml")
    benchmark.path = str(write(tmp_path / "m.jsonl", [RECORDS["mbpp"], RECORDS["mbpp"] | {"test_list": ["assert 1"]}]))
    assert len(instantiate(benchmark).load()) == 1
    assert "cannot be filled in" in caplog.text


def test_a_file_that_differs_from_the_published_one_is_named(tmp_path, caplog):
    path = write(tmp_path / "f.jsonl", [{"question": "q"}])
    published = hashlib.sha256(path.read_bytes()).hexdigest()
    BenchmarkPrompts("x", path=str(path), sha256=published).load()
    assert "published" not in caplog.text
    write(path, [{"question": "q!"}])
    BenchmarkPrompts("x", path=str(path), sha256=published).load()
    assert (
        f"f.jsonl is not the published file (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        in caplog.text
    )


def test_search_order(tmp_path, monkeypatch):
    package = tmp_path / "some_package" / "data"
    package.mkdir(parents=True)
    write(package / "p.jsonl.gz", [{"prompt": "from the package"}])
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    given = write(tmp_path / "given.jsonl", [{"prompt": "from the path"}])
    options = {"package": "some_package/data/p.jsonl.gz", "folder": str(folder), "file": "f.jsonl", "hub": "a/b"}
    question = lambda **more: BenchmarkPrompts("x", **(options | more)).load()[0].question  # noqa: E731
    assert question() == "from the package"
    assert "some_package" not in sys.modules
    write(folder / "f.jsonl", [{"prompt": "from the folder"}])
    assert question() == "from the folder"
    assert question(path=str(given)) == "from the path"


def test_unreachable_benchmark_names_the_file_to_provide(monkeypatch, tmp_path):
    monkeypatch.setattr("hass_lightning.target_model.hub.hub_answers", lambda: False)
    prompts = BenchmarkPrompts("gsm8k", hub="openai/gsm8k", file="gsm8k_test.jsonl", origin="https://example.org/test")
    with pytest.raises(ValueError, match="cannot be reached") as error:
        prompts.load()
    for hint in ("benchmark.path", "https://example.org/test", "HASS_LIGHTNING_DATA", "gsm8k_test.jsonl"):
        assert hint in str(error.value)
    with pytest.raises(ValueError, match="pip install not-there"):
        BenchmarkPrompts("x", package="not_there/data/x.jsonl").load()
    with pytest.raises(ValueError, match=r"benchmark\.path"):
        BenchmarkPrompts("x", path=str(tmp_path / "none.jsonl")).load()


def test_the_hub_is_read_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr("hass_lightning.target_model.hub.hub_answers", lambda: True)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or [{"question": "q"}]
    )
    found = BenchmarkPrompts("x", prompt="{question}!", hub="a/b", hub_config="main", hub_revision="r").load()
    assert found[0].question == "q!"
    assert asked == [(("a/b", "main"), {"split": "test", "revision": "r"})]


def numbered(tmp_path, count=50, **options):
    path = write(tmp_path / "n.jsonl", [{"question": f"q{i}"} for i in range(count)])
    return [c.question for c in BenchmarkPrompts("x", path=str(path), **options).load()]


def test_limit_is_a_seeded_nested_sample_in_order(tmp_path):
    ten, twenty = numbered(tmp_path, limit=10), numbered(tmp_path, limit=20)
    assert ten == numbered(tmp_path, limit=10)
    assert set(ten) < set(twenty)
    assert ten == sorted(ten, key=lambda text: int(text[1:]))
    assert ten != [f"q{i}" for i in range(10)]
    assert set(ten) != set(numbered(tmp_path, limit=10, seed=1))
    assert len(numbered(tmp_path, limit=99)) == 50


def test_unusable_records_are_skipped_and_counted(tmp_path, caplog):
    records = [
        {"question": "q"},
        {"question": "  "},
        {"other": 1},
        [1],
        {"messages": [{"role": "bird", "content": "x"}]},
    ]
    path = write(tmp_path / "bad.jsonl", records)
    assert len(BenchmarkPrompts("x", path=str(path)).load()) == 1
    for reason in ("an empty prompt", "none of messages", "not a JSON object", "unknown role"):
        assert reason in caplog.text
    with pytest.raises(ValueError, match="no field 'text'"):
        BenchmarkPrompts("x", prompt="{text}", path=str(path)).load()
    path.write_text("")
    with pytest.raises(ValueError, match="it is empty"):
        BenchmarkPrompts("x", path=str(path)).load()


def test_repeated_ids_are_made_distinct_by_a_suffix(tmp_path):
    path = write(tmp_path / "same.jsonl", [{"id": 1, "question": "a"}, {"id": 1, "question": "b"}])
    assert [c.id for c in BenchmarkPrompts("x", path=str(path), id_field="id").load()] == ["1", "1#2"]


def test_bad_settings():
    with pytest.raises(ValueError, match="limit=0"):
        BenchmarkPrompts("x", limit=0)
    with pytest.raises(ValueError, match="turns"):
        BenchmarkPrompts("x", prompt="{turn}")


def test_the_module_knows_no_benchmark_by_name():
    source = Path(benchmarks.__file__).read_text()
    assert not any(f'"{name}"' in source for name in RECORDS)
