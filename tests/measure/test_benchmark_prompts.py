"""Benchmark prompts: every YAML of conf/benchmark on small files of the real shape, the search order, the errors."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from hass_lightning.data import benchmarks
from hass_lightning.data.benchmarks import BenchmarkPrompts, InlinePrompts

CONF = Path(__file__).parents[2] / "conf" / "benchmark"
RECORDS = {
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["Write {this}.", "Again."]},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f(x):\n    return {}\n", "entry_point": "f"},
    "gsm8k": {"question": "How many?", "answer": "#### 3"},
    "spec_bench": {"question_id": 5, "category": "rag", "turns": ["Read this."], "reference": []},
    "alpaca": {"instruction": "Translate.", "input": "", "output": "x"},
    "cnn_dm": {"id": "abc", "article": "News.", "highlights": "x"},
    "natural_questions": {"question": "who?", "answer": ["x"]},
    "jsonl": {"id": "7", "category": "own", "messages": [{"role": "user", "content": "Hello"}]},
}
EXPECTED = {
    "mt_bench": ("81", "writing", ["Write {this}.", "Again."]),
    "humaneval": ("HumanEval/0", "", ["def f(x):\n    return {}"]),
    "gsm8k": ("0", "", ["How many?"]),
    "spec_bench": ("5", "rag", ["Read this."]),
    "alpaca": ("0", "", ["Translate."]),
    "cnn_dm": ("abc", "", ["Summarize: News."]),
    "natural_questions": ("0", "", ["who?"]),
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
def test_each_yaml_words_its_records(name, tmp_path, monkeypatch):
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
    assert {path.stem for path in CONF.glob("*.yaml")} == {*RECORDS, "smoke"}


def test_smoke_needs_nothing():
    conversations = instantiate(OmegaConf.load(CONF / "smoke.yaml")).load()
    assert max(len(each.messages) for each in conversations) == 2
    assert len(InlinePrompts("x", ["a", "b"], limit=1).load()) == 1
    with pytest.raises(ValueError, match="empty"):
        InlinePrompts("x", []).load()


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


def test_out_of_reach_says_which_file_to_give_and_where(monkeypatch, tmp_path):
    monkeypatch.setattr("hass_lightning.target.source._hub_answers", lambda: False)
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
    monkeypatch.setattr("hass_lightning.target.source._hub_answers", lambda: True)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or [{"question": "q"}]
    )
    found = BenchmarkPrompts("x", prompt="{question}!", hub="a/b", hub_config="main", hub_revision="r").load()
    assert found[0].question == "q!"
    assert asked == [(("a/b", "main"), {"split": "test", "revision": "r"})]


def numbered(tmp_path, count=50, **options):
    path = write(tmp_path / "n.jsonl", [{"question": f"q{i}"} for i in range(count)])
    return [c.question for c in BenchmarkPrompts("x", path=str(path), **options).load()]


def test_a_limit_is_a_seeded_nested_sample_in_order(tmp_path):
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


def test_repeated_ids_are_told_apart(tmp_path):
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
