"""The table of methods: a result file says what was measured, and the committed page is that of the committed files."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from study_factory import DEPTH, config_of, write_cell

from hass_lightning.measure.record import Record
from hass_lightning.report.methods import add_method
from hass_lightning.report.methods_page import methods_page
from hass_lightning.report.study import load_runs

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NAMES = ("gsm8k", "humaneval", "mt_bench")


def test_the_committed_page_is_made_of_the_committed_files():
    wanted = methods_page(EXPERIMENTS / "heads")
    assert (EXPERIMENTS / "heads.md").read_text() == wanted, "hass-report table=experiments/heads writes the page"


def train(folder, method, seeds=(0,), rows=5000):
    """Write finished runs of a method."""
    for seed in seeds:
        overrides = [
            f"experiment={method}",
            f"seed={seed}",
            "paths.runs_dir=/home/me/runs",
            "init_from=/home/me/runs/a",
        ]
        cell = write_cell(folder / f"{method}-{seed}", config_of("hass", 3, seed, kind=method), overrides)
        found = {"train_tokens": rows, "train_flops": 2.5e12, "data_hash": "d1"}
        (cell / "metrics.json").write_text(json.dumps(found))
    return folder


def benchmark(folder, accepted, questions=6, timed=True, names=NAMES):
    """Write records of heads by label, which accept `accepted[label]` tokens in each cycle; return their folder."""
    folder.mkdir(parents=True)
    lines = []
    for name in names:
        for number in range(questions):
            base = Record(name, f"q{number}", 0, "", "autoregressive", target="tiny/float32", num_tokens=41)
            base.accepted, base.seconds = [0] * 40, {"prefill": 0.0, "verify": 4.0}
            lines.append(base)
            for label, count in accepted.items():
                own = Record(name, f"q{number}", 0, label, "dynamic_tree", target="tiny/float32", num_tokens=41)
                own.accepted = [count] * (8 + number)
                own.drafted, own.settings = [DEPTH] * (8 + number), {"depth": DEPTH}
                own.seconds = {"prefill": 0.0, "verify": 2.0} if timed else {}
                lines.append(own)
    (folder / "records.jsonl").write_text("\n".join(record.to_json() for record in lines) + "\n")
    (folder / "provenance.json").write_text(json.dumps({"git_commit": "b" * 40, "git_dirty": True, "device": "A CPU"}))
    return str(folder)


def test_a_result_file_has_the_best_measured_values_and_no_path_of_the_machine(tmp_path, call_command):
    train(tmp_path / "runs", "hass")
    replayed = benchmark(tmp_path / "replayed", {"hass-0": 2}, questions=9, timed=False)
    timed = benchmark(tmp_path / "timed", {"hass-0": 1, "other": 3}, names=("gsm8k",))
    done = call_command(
        "report", f"table={tmp_path}/heads", "method=hass", f"runs={tmp_path}/runs", f"records=[{replayed},{timed}]"
    )
    assert done.code == 0, done.err
    files = json.loads(done.out.splitlines()[-1])["files"]
    text = Path(files["method"]).read_text()
    found = json.loads(text)
    assert "/home" not in text and str(tmp_path) not in text
    assert found["overrides"] == ["experiment=hass", "init_from=…/a"]
    assert (found["seeds"], found["rows"], found["flops"], found["data"]) == ([0], 5000, 2.5e12, ["d1"])
    assert (found["commit"], found["processor"]) == (["a" * 12, "b" * 12 + " with changes"], ["A CPU"])
    assert found["config"]["model.alignment.depth"] == 3
    results = {each["benchmark"]: each for each in found["results"]}
    assert set(results) == set(NAMES)
    for name, each in results.items():
        assert (each["decoder"], each["temperature"], each["num_questions"]) == ("dynamic_tree", 0.0, 9)
        assert each["tau"][0] == 3.0  # of the larger, replayed measurement
        assert each["speedup"] is None if name != "gsm8k" else each["speedup"][0] == 2.0
    page = Path(files["page"]).read_text()
    assert page == methods_page(tmp_path / "heads") and "## tiny/float32, dynamic_tree, T=0" in page
    assert Path(files["page"]) == tmp_path / "heads.md"


def test_several_seeds_have_an_interval_over_seeds(tmp_path):
    runs = load_runs(train(tmp_path / "runs", "hass", seeds=(2, 0, 1)))
    measured = benchmark(tmp_path / "measured", {"hass-0": 1, "hass-1": 2, "hass-2": 2})
    found = json.loads(add_method(tmp_path / "heads", "hass", runs, [measured]).read_text())
    assert found["seeds"] == [0, 1, 2]
    logs = np.log([2, 3, 3])
    interval = np.exp([logs.mean(), *stats.ttest_1samp(logs, 0).confidence_interval()])
    assert found["results"][0]["tau"] == pytest.approx(interval, abs=1e-4)


def test_the_page_sorts_by_mean_tau_and_says_what_is_not_comparable(tmp_path):
    accepted = {"a": 1, "b": 3, "c": 2, "d": 2}
    for name in accepted:
        train(tmp_path / "runs" / name, name, rows=9000 if name == "b" else 5000)
        options = {"questions": 5} if name == "c" else {}
        options |= {"names": NAMES[:2]} if name == "d" else {}
        measured = benchmark(tmp_path / f"of_{name}", {f"{name}-0": accepted[name]}, **options)
        add_method(tmp_path / "heads", name, load_runs(tmp_path / "runs" / name), [measured])
    table = methods_page(tmp_path / "heads").split("\n## ")[1].splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    header, _, *rows = lines
    assert header[:3] == ["method", "mean τ", "gsm8k τ"] and "mt_bench speedup" in header
    by_name = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(by_name) == ["b", "c", "a", "d"]  # d lacks a benchmark, so it has no mean
    assert [row["mean τ"] for row in by_name.values()] == ["4.00", "3.00", "2.00", "–"]
    assert [row["not comparable"] for row in by_name.values()] == [
        "other rows", "other questions", "–", "other benchmarks, other questions, other answer length, other draft tree"
    ]  # fmt: skip


def test_mistakes_are_named(tmp_path):
    runs = load_runs(train(train(tmp_path / "runs", "hass"), "eagle"))
    measured = benchmark(tmp_path / "measured", {"hass-0": 2})
    assert add_method(tmp_path / "heads", "hass", runs, [measured]).name == "hass.json"  # one of two cells
    for method, records, message in [
        ("eagle3", [measured], "method=eagle3 fits 0 cells"),
        ("eagle", [measured], "no decoder was measured with every head"),
        ("../x", [measured], "letters, digits"),
        ("hass", [], "records is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_method(tmp_path / "heads", method, runs, records)
