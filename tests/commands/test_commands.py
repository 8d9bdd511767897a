"""The commands from the command line: files, the JSON line, one-sentence errors, interruption, loggers.

The smoke experiment runs once as a separate process; tests that need no new process call commands in this one.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from command_environment import command_environment
from hass_lightning.runs.ledger import Entry, Ledger

SMOKE = ("experiment=smoke", "logger=csv")
DECODE_LITTLE = ("callbacks.decoding.num_prompts=1", "callbacks.decoding.num_checked=1")
RESULT_KEYS = {
    "acceptance_length", "speedup", "num_prompts", "num_checked", "num_identical", "train_seconds", "run_dir",
}  # fmt: skip
RUN_FILES = {
    ".hydra/config.yaml", "provenance.json", "metrics.json", "checkpoints/best.ckpt", "draft/model.safetensors",
    "draft/config.json", "records.jsonl", "report.html", "csv/metrics.csv",
}  # fmt: skip


def last_json(text):
    """Return the JSON object of the last line."""
    return json.loads(text.strip().splitlines()[-1])


def error_lines(done):
    return [line for line in done.err.splitlines() if line.startswith("error:")]


# --- the whole pipeline ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, cache_dir):
    """experiment=smoke in a process, with W&B offline: .out, .err and its working folder."""
    import subprocess
    import sys
    from types import SimpleNamespace

    folder = tmp_path_factory.mktemp("smoke")
    done = subprocess.run(
        [sys.executable, "-m", "hass_lightning.commands.train", "experiment=smoke"],
        cwd=folder, env=command_environment(folder, cache_dir), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr, folder=folder, run=folder / "runs" / "smoke")


def test_smoke_ends_with_one_line_of_json(smoke):
    result = last_json(smoke.out)
    assert set(result) >= RESULT_KEYS
    assert Path(result["run_dir"]) == smoke.run
    assert result["num_prompts"] == 4
    assert result["num_identical"] == result["num_checked"] == 2
    assert 1 <= result["acceptance_length"] <= 5
    assert result["acceptance_length_low"] <= result["acceptance_length"] <= result["acceptance_length_high"]
    assert result["speedup"] > 0
    assert result["train_seconds"] > 0


def test_smoke_leaves_every_file_of_a_run_folder(smoke):
    missing = {name for name in RUN_FILES if not (smoke.run / name).is_file()}
    assert not missing
    assert json.loads((smoke.run / "metrics.json").read_text())["num_prompts"] == 4
    provenance = json.loads((smoke.run / "provenance.json").read_text())
    assert provenance["argv"][1:] == ["experiment=smoke"]
    assert {"git_commit", "versions", "seed", "device", "config_hash"} <= set(provenance)
    lines = [json.loads(line) for line in (smoke.run / "records.jsonl").read_text().splitlines()]
    assert {line["decoder"] for line in lines} == {"autoregressive", "dynamic_tree"}
    report = (smoke.run / "report.html").read_text()
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=.(?:https?:)?//", report), "it asks the network"


def test_smoke_logs_each_term_by_step_and_the_rest(smoke):
    header = (smoke.run / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    steps = [f"train/{term}/step{step}" for term in ("feature", "soft_ce", "top_k") for step in (1, 2, 3)]
    accuracy = [f"train/accuracy/step{step}" for step in (1, 2, 3)]
    others = ["train/loss", "lr-AdamW", "train/tokens_per_second", "train/gradient_norm", "val/acceptance_length"]
    decoding = ["decode/acceptance_length", "decode/speedup", "decode/tokens_per_second", "decode/accept_rate/depth1"]
    assert not set(steps + accuracy + others + decoding) - set(header)
    assert {"val/accuracy/step5", "val/forced_accuracy/step1"} <= set(header)  # validation unrolls to its own depth


def test_smoke_writes_a_wandb_run_without_a_network(smoke):
    (file,) = (smoke.run / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 1000
    assert (smoke.run / "wandb_id").read_text() in file.name


def test_a_finished_run_prints_its_result_again_without_training(smoke, call_command, tmp_path):
    shutil.copytree(smoke.run, tmp_path / "runs" / "smoke")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "smoke" / "checkpoints").iterdir()}
    done = call_command("train", "experiment=smoke")
    assert done.code == 0, done.err
    assert last_json(done.out) == last_json(smoke.out)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "smoke" / "checkpoints").iterdir()}
    assert before == after
    # a file of conf/ may change between runs with the same overrides
    settings = tmp_path / "runs" / "smoke" / "resume_config.json"
    settings.write_text(settings.read_text().replace('"model.optimizer.lr": ', '"model.optimizer.lr": 7'))
    refused = call_command("train", "experiment=smoke")
    assert refused.code == 1 and "model.optimizer.lr" in refused.err and "fresh=true" in refused.err


def test_hass_benchmark_measures_a_run_again(smoke, corpus, call_command, tmp_path):
    own = tmp_path / "conf" / "decoding" / "mine.yaml"  # a custom decoder on the search path
    own.parent.mkdir(parents=True)
    own.write_text("_target_: hass_lightning.decoding.Chain\ndepth: 2\n")
    arguments = ("target=tiny", "data=smoke", "data.num_validation=8", f"draft={smoke.run}", "limit=2", corpus)
    decoders = ("decoders=[autoregressive,dynamic_tree,chain,draft_model,mine]", "small_model=tiny")
    decoders += (f"hydra.searchpath=[file://{tmp_path}/conf]",)
    limits = ("max_new_tokens=16", "num_checked=1", *decoders)
    done = call_command("benchmark", *arguments, *limits)
    assert done.code == 0, done.err
    result = last_json(done.out)
    by_decoder = {row["decoder"]: row for row in result["rows"]}
    assert set(by_decoder) == {"autoregressive", "dynamic_tree", "chain", "draft_model", "mine"}
    # the target itself drafts: all four and the bonus token
    assert by_decoder["draft_model"]["acceptance_length"] == 5.0
    assert by_decoder["dynamic_tree"]["num_identical"] == 2
    folder = Path(result["run_dir"])
    assert "Predicted against measured speedup" in (folder / "report.html").read_text()
    costs = (folder / "cost_model.json").read_bytes()
    # a second start measures nothing: the records are the same
    records = (folder / "records.jsonl").read_bytes()
    again = call_command("benchmark", *arguments, *limits)
    assert (folder / "records.jsonl").read_bytes() == records
    assert (folder / "cost_model.json").read_bytes() == costs
    assert last_json(again.out) == result


def test_a_run_folder_is_enough(smoke, corpus, call_command, tmp_path):
    few = ("limit=2", "max_new_tokens=16", "num_checked=1")
    done = call_command("benchmark", f"draft={smoke.run}", f"++{corpus}", *few)
    assert done.code == 0, done.err
    rows = {row["decoder"]: row for row in last_json(done.out)["rows"]}
    assert set(rows) == {"autoregressive", "dynamic_tree"} and rows["dynamic_tree"]["num_identical"] == 2
    done = call_command("export", f"draft={smoke.run}", "format=hub", "output_dir=served")
    assert done.code == 0, done.err
    assert (tmp_path / "served" / "model.safetensors").is_file()
    done = call_command("generate", f"draft={smoke.run}", "prompt=Why?", "max_new_tokens=8", "output=json")
    assert done.code == 0, done.err
    assert last_json(done.out)["num_tokens"] <= 8


def test_runs_of_a_sweep_are_replayed_on_questions_not_used_for_selection(smoke, corpus, call_command, tmp_path):
    sweep = tmp_path / "study"
    for cell, status in (("one", "completed"), ("two", "completed"), ("three", "failed")):
        shutil.copytree(smoke.run / "draft", sweep / cell / "draft")
        Ledger(sweep).append(Entry(cell, status, [], "", str(sweep / cell)))
    words = ("target=tiny", "data=smoke", "data.num_validation=8", corpus, "skip=5", "max_new_tokens=16")
    done = call_command("benchmark", *words, f"drafts=[{sweep}]", "replay=true")
    assert done.code == 0, done.err
    result = last_json(done.out)
    rows = {(row["draft"], row["decoder"]): row for row in result["rows"]}
    assert set(rows) == {("", "autoregressive"), ("one", "dynamic_tree"), ("two", "dynamic_tree")}
    one = rows["one", "dynamic_tree"]
    assert (one["num_prompts"], one["speedup"]) == (3, None)  # of eight, five selected the checkpoint
    decoded = last_json(call_command("benchmark", *words, f"draft={smoke.run}", "name=decoded").out)
    (row,) = [row for row in decoded["rows"] if row["decoder"] == "dynamic_tree"]
    assert row["acceptance_length"] == one["acceptance_length"] and row["speedup"] > 0


@pytest.mark.slow
def test_tuning_writes_a_tree_and_measures_it_on_other_prompts(smoke, corpus, call_command):
    arguments = ("target=tiny", "data=smoke", "data.num_validation=8", f"draft={smoke.run}", "limit=8", corpus)
    done = call_command("benchmark", *arguments, "max_new_tokens=24", "num_checked=0", "tune=true")
    assert done.code == 0, done.err
    result = last_json(done.out)
    rows = {row["decoder"]: row for row in result["rows"]}
    assert {"autoregressive", "tuned_tree", "eagle2_tree"} <= set(rows)
    assert rows["tuned_tree"]["num_prompts"] == 6  # two of the eight were used for tuning
    predicted = {(each["num_nodes"], each["depth"], each["width"]) for each in result["cost_model"]}
    assert {tuple(result["tuned"].values()), (60, 6, 10)} <= predicted
    written = (Path(result["run_dir"]) / "tuned_tree.yaml").read_text()
    assert f"num_nodes: {result['tuned']['num_nodes']}\n" in written


@pytest.fixture
def corpus(smoke):
    """The override for the corpus that the smoke run wrote."""
    return f"data.source.output_dir={smoke.folder}/runs/data/tiny-smoke"


def test_hass_prepare_leaves_nothing_for_training_to_extract(call_command, tmp_path):
    prepared = call_command("prepare", *SMOKE)
    assert prepared.code == 0, prepared.err
    result = last_json(prepared.out)
    assert (result["num_train_conversations"], result["num_validation_conversations"]) == (32, 8)
    assert result["num_train_tokens"] > result["num_train_rows"] > 0
    shards = {path: path.stat().st_mtime_ns for path in Path(result["train_features"]).iterdir()}
    trained = call_command("train", *SMOKE, "trainer.max_steps=1", "callbacks.decoding=null")
    assert trained.code == 0, trained.err
    assert "training features: reusing" in trained.out
    assert {path: path.stat().st_mtime_ns for path in Path(result["train_features"]).iterdir()} == shards


@pytest.mark.parametrize(
    ("overrides", "logged"),
    [
        (
            ["trainer.accumulate_grad_batches=3", "trainer.log_every_n_steps=1", "trainer.val_check_interval=2",
             "+callbacks@callbacks.early_stopping=early_stopping"],
            "val/acceptance_length",
        ),
        (
            ["model.draft.vocab_size=64", "model/loss=eagle", "model.alignment.depth=1", "data.noise=0.1",
             "trainer.precision=bf16-mixed", "trainer.gradient_clip_algorithm=value"],
            "train/dropped_rows",
        ),
    ],
    ids=["accumulation and early stopping", "EAGLE with noise, pruned, in bf16, clipped by value"],
)  # fmt: skip
def test_other_settings_run_to_the_end(call_command, corpus, overrides, logged):
    done = call_command("train", *SMOKE, corpus, *DECODE_LITTLE, *overrides)
    assert done.code == 0, done.err
    result = last_json(done.out)
    assert result["num_identical"] == result["num_checked"] == 1
    assert logged in (Path(result["run_dir"]) / "csv" / "metrics.csv").read_text()


@pytest.mark.slow
def test_tensorboard_needs_one_override(call_command, corpus):
    pytest.importorskip("tensorboard")
    overrides = ("logger=tensorboard", "trainer.max_steps=2", "callbacks.decoding=null")
    done = call_command("train", "experiment=smoke", corpus, *overrides)
    assert done.code == 0, done.err
    assert list((Path(last_json(done.out)["run_dir"]) / "tensorboard").glob("events.out.*"))


# --- errors ----------------------------------------------------------------------------------------------------------

BAD_LINES = '{"messages": [{"role": "alien", "content": "x"}]}\n{"a": 1}\nno json\n'


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        ("train", ["data=jsonl"], ["data.source.path"]),
        ("train", ["data=jsonl", "data.source.path=nothing.jsonl"], ["nothing.jsonl", "data.source.path"]),
        pytest.param(
            "train", ["data=jsonl", "data.source.path=empty.jsonl"], ["empty.jsonl", "messages"], marks=pytest.mark.slow
        ),
        ("train", ["data=jsonl", "data.source.path=bad.jsonl"], ["bad.jsonl", "unknown role 'alien'"]),
        pytest.param(
            "train", ["data.max_length=4"], ["data.max_length", "longer than 4 tokens"], marks=pytest.mark.slow
        ),
        ("train", ["data.batch_size=64"], ["data.batch_size"]),
        pytest.param("train", ["data.source.num_questions=5"], ["num_questions=5"], marks=pytest.mark.slow),
        ("train", ["target.path=folder"], ["target.path", "config.json"]),
        pytest.param("train", ["target.path=/nonexistent"], ["target.path"], marks=pytest.mark.slow),
        ("train", ["target.path=owner/name"], ["owner/name", "hf download", "target.path"]),
        pytest.param(
            "train", ["target.attn_implementation=eager"], ["target.attn_implementation=eager"], marks=pytest.mark.slow
        ),
        ("train", ["+target.nokey=1"], ["nokey", "target"]),
        ("train", ["model.alignment.depth=0"], ["model.alignment.depth=0"]),
        pytest.param(
            "train", ["model.draft.vocab_size=999999"], ["model.draft.vocab_size=999999"], marks=pytest.mark.slow
        ),
        ("train", ["trainer.max_epochs=null"], ["trainer.max_epochs", "trainer.max_steps"]),
        ("train", ["trainer.devices=auto"], ["trainer.devices=auto", "number"]),
        ("train", ["trainer.gradient_clip_algorithm=bogus"], ["gradient_clip_algorithm", "bogus"]),
        ("train", ["trainer=deepspeed_zero2", "trainer.gradient_clip_algorithm=value"], ["gradient_clip_algorithm"]),
        pytest.param("train", ["decoding.width=0"], ["decoding.width=0"], marks=pytest.mark.slow),
        ("prepare", ["data=jsonl", "data.source.path=nothing.jsonl"], ["nothing.jsonl"]),
        ("benchmark", ["temperatures=[-1]", "draft=folder"], ["temperature", "-1"]),
        ("benchmark", ["draft=folder"], ["folder", "config.json"]),
        ("benchmark", ["tune=true", "replay=true"], ["tune=true", "replay=true"]),
        ("benchmark", ["target=tiny", "decoders=[autoregressive,nothing]"], ["conf/decoding/nothing.yaml"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_of_the_user_is_one_sentence_that_names_the_key(
    call_command, corpus, tmp_path, command, overrides, words
):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text(BAD_LINES)
    (tmp_path / "folder").mkdir()
    base = () if command == "benchmark" else SMOKE
    if not any("data" in override for override in overrides) and base:
        base = (*SMOKE, corpus)
    done = call_command(command, *base, *overrides)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert len(error_lines(done)) == 1, done.err
    (line,) = error_lines(done)
    assert [word for word in words if word not in line] == [], line
    assert '"run_dir"' not in done.out


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["trainer.max_epoch=1"], "max_epoch"),
        (["data=nothing"], "data/nothing"),
        (["experiment=smok"], "experiment/smok"),
    ],
)
def test_unknown_key_or_choice_is_named_without_a_traceback(call_command, overrides, word):
    done = call_command("train", *SMOKE, *overrides)
    assert done.code == 1
    assert word in done.err
    assert "Traceback" not in done.err


def test_internal_error_keeps_its_traceback(call_command, monkeypatch):
    from hass_lightning.data.datamodule import FeatureDataModule

    monkeypatch.setattr(FeatureDataModule, "stores", lambda self: self.no_such_attribute)
    done = call_command("train", *SMOKE)
    assert done.code == 1
    assert "no_such_attribute" in done.err
    assert not error_lines(done)


def test_traceback_of_a_user_error_can_be_requested(call_command, monkeypatch):
    monkeypatch.setenv("HASS_LIGHTNING_TRACE", "1")
    done = call_command("train", *SMOKE, "data=jsonl", "data.source.path=nothing.jsonl")
    assert done.code == 1
    assert "read_records" in done.err


# --- interruption (slow) ---------------------------------------------------------------------------------------------

LONGER = (
    *SMOKE, "data.source.num_questions=300", "data.source.answer_max_tokens=64", "trainer.max_steps=80",
    "trainer.max_epochs=null", "callbacks.last_checkpoint.every_n_train_steps=5", "callbacks.decoding.num_prompts=8",
    "callbacks.decoding.max_new_tokens=64", "data.source.batch_size=4",
)  # fmt: skip


def lines_in(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def run_folder(folder):
    """Return the only run folder in `folder`."""
    return next(iter((folder / "runs").glob("smoke*")), folder / "nothing")


STAGES = {
    "questions": lambda root, cache: lines_in(root / "runs/data/tiny-smoke/questions.jsonl") > 20,
    "answers": lambda root, cache: lines_in(root / "runs/data/tiny-smoke/texts.jsonl") > 20,
    "features": lambda root, cache: bool(list(cache.glob("features/*/shard-*.safetensors"))),
    "fit": lambda root, cache: bool(list(root.glob("runs/*/checkpoints/last.ckpt"))),
    "decoding": lambda root, cache: lines_in(run_folder(root) / "records.jsonl") > 3,
}


def wait_for(condition, process, timeout=900):
    """Wait until the condition is true while the process runs."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the stage was not reached"
        time.sleep(0.005)


def kept_files(root, cache):
    """Return the files of a finished stage with their modification times."""
    done = [*cache.glob("features/*/shard-*.safetensors"), *root.glob("runs/*/trained")]
    if (root / "runs/data/tiny-smoke/manifest.json").exists():
        done += [root / "runs/data/tiny-smoke/corpus.jsonl"]
    return {path: path.stat().st_mtime_ns for path in done}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache_dir):
    """The result and the head of the longer run without interruption."""
    import subprocess
    import sys

    root, cache = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache")
    command = [sys.executable, "-m", "hass_lightning.commands.train", *LONGER]
    environment = command_environment(root, cache)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return last_json(done.stdout), (run_folder(root) / "draft" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_run_killed_in_any_stage_and_restarted_equals_an_uninterrupted_one(
    start_command, uninterrupted, tmp_path, stage
):
    cache = tmp_path / "cache"
    environment = {"HASS_LIGHTNING_CACHE": str(cache)}
    process = start_command("train", *LONGER, env=environment)
    wait_for(lambda: STAGES[stage](tmp_path, cache), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = kept_files(tmp_path, cache)
    again = start_command("train", *LONGER, env=environment)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    result, head = uninterrupted
    same = ("acceptance_length", "simulated_acceptance_length", "num_prompts", "num_checked", "num_identical")
    assert {name: last_json(out)[name] for name in same} == {name: result[name] for name in same}
    assert (run_folder(tmp_path) / "draft" / "model.safetensors").read_bytes() == head
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    if stage == "fit":
        assert "resuming from" in out
    if stage == "decoding":
        assert "resuming from" not in out
        assert kept, "the finished training was not marked"
    # the curves contain all attempts
    curves = [path.read_text() for path in (run_folder(tmp_path) / "csv").glob("*.csv")]
    assert {"train/loss", "decode/speedup"} <= set(",".join(text.splitlines()[0] for text in curves).split(","))


def wandb_records(folder, *options):
    import subprocess
    import sys

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", *options, "--json", file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_wandb_holds_config_and_metrics(smoke):
    summary = wandb_records(smoke.run, "--summary")
    assert '"depth"' in summary  # the config: model.alignment.depth and more
    for name in ("train/loss", "val/acceptance_length", "decode/acceptance_length", "decode/speedup"):
        assert name in summary
    records = [json.loads(line) for line in wandb_records(smoke.run).splitlines()]
    assert {"run", "history", "exit"} <= {record["type"] for record in records}


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_a_closed_wandb_run_and_resumes(start_command, tmp_path):
    overrides = [word.replace("logger=csv", "logger=wandb") for word in LONGER if "every_n" not in word]
    process = start_command("train", *overrides)
    csv = tmp_path / "runs"
    wait_for(lambda: any(lines_in(path) > 1 for path in csv.glob("*/csv/metrics.csv")), process)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    run = run_folder(tmp_path)
    assert (run / "checkpoints" / "last.ckpt").exists(), err
    assert not (run / "metrics.json").exists()
    assert '"type":"exit"' in wandb_records(run)
    again = start_command("train", *overrides)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert "resuming from" in out


# --- several processes (slow) ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_cpu", "deepspeed_zero2"])
def test_smoke_on_two_processes(run_command, trainer):
    if trainer.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    done = run_command("train", *SMOKE, f"trainer={trainer}", "data.batch_size=2")
    assert done.code == 0, done.err[-3000:]
    result = last_json(done.out)
    assert set(result) >= RESULT_KEYS
    assert result["num_identical"] == result["num_checked"] == 2
    lines = [line for line in done.out.splitlines() if line.startswith("{")]
    assert len(lines) == 1, "the other process also printed a result"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu", "deepspeed_zero2"])
def test_smoke_as_a_sweep(run_command, tmp_path, trainer):
    if trainer.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    done = run_command(
        "train", "-m", *SMOKE, f"trainer={trainer}", "model/loss=eagle,hass", *DECODE_LITTLE, timeout=900
    )
    assert done.code == 0, done.err[-3000:]
    last_json(done.out)
    cells = [json.loads(path.read_text()) for path in tmp_path.glob("runs/sweeps/*/*/metrics.json")]
    assert len(cells) == 2
    assert all(cell["num_identical"] == cell["num_checked"] for cell in cells)
    terms = [
        json.loads((path / "draft" / "config.json").read_text())["hass_lightning"]["loss_terms"]
        for path in tmp_path.glob("runs/sweeps/*/*/")
        if (path / "draft").exists()
    ]
    assert sorted(len(term) for term in terms) == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "number"), [("ddp_cpu", signal.SIGINT), ("deepspeed_zero2", signal.SIGKILL)])
def test_interrupted_run_of_two_processes_resumes(start_command, tmp_path, trainer, number):
    if trainer.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    every = 5 if number == signal.SIGKILL else 1000
    overrides = (
        *SMOKE, *DECODE_LITTLE, f"trainer={trainer}", "data.batch_size=2", "trainer.max_steps=60",
        "trainer.max_epochs=null", "trainer.val_check_interval=60",
        f"callbacks.last_checkpoint.every_n_train_steps={every}",
    )  # fmt: skip
    process = start_command("train", *overrides)
    reached = (
        (lambda: list(tmp_path.glob("runs/*/checkpoints/last.ckpt/latest")))
        if number == signal.SIGKILL
        else (lambda: any(lines_in(path) > 1 for path in tmp_path.glob("runs/*/csv/metrics.csv")))
    )
    wait_for(lambda: bool(reached()), process)
    os.killpg(process.pid, number)
    process.wait(timeout=120)
    assert (run_folder(tmp_path) / "checkpoints" / "last.ckpt").exists()
    again = start_command("train", *overrides)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err[-3000:]
    assert "resuming from" in out
    assert last_json(out)["num_identical"] == 1


@pytest.mark.slow
def test_one_process_and_two_with_half_the_batch_train_the_same_head(run_command, tmp_path):
    """The mean is over all tokens of the same global batches; only the order of the sums differs."""
    from safetensors.torch import load_file

    heads = []
    for trainer, size in (("cpu", 4), ("ddp_cpu", 2)):
        overrides = (f"trainer={trainer}", f"data.batch_size={size}", f"name={trainer}", "callbacks.decoding=null")
        done = run_command("train", *SMOKE, "data.noise=0.1", *overrides)
        assert done.code == 0, done.err[-3000:]
        heads.append(load_file(Path(last_json(done.out)["run_dir"]) / "draft" / "model.safetensors"))
    for name, value in heads[0].items():
        difference = (value - heads[1][name]).norm() / value.norm()
        assert difference < 1e-3, (name, difference)
