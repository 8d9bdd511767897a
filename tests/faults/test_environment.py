"""Machines without git, read-only caches, and logs without a terminal."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command_environment import command_environment
from hass_lightning.runs import provenance


def test_a_machine_without_git_only_has_no_commit_in_its_provenance(monkeypatch, tmp_path):
    assert provenance._git("--version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None
    assert provenance._git("rev-parse", "HEAD") is None


def test_a_run_without_git_trains(train, monkeypatch, tmp_path):
    for name in ("env", "uname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    done = train("trainer.max_steps=1")
    assert done.code == 0, done.err
    assert json.loads((Path(done.result["run_dir"]) / "provenance.json").read_text())["git_commit"] is None


LINE = re.compile(r"step (\d+) of 4, loss \d+\.\d+, \d+\.\d+ steps/s, \d+:\d\d:\d\d left")


def test_a_log_has_lines_with_step_loss_rate_and_time_left(train):
    done = train()
    steps = [int(step) for step in LINE.findall(done.out)]
    assert steps[0] == 1 and steps[-1] == 4


def test_the_progress_can_be_turned_off(train):
    done = train("trainer.enable_progress_bar=false")
    assert done.code == 0, done.err
    assert not LINE.search(done.out)


def can_mount():
    unshare = shutil.which("unshare")
    return unshare and not subprocess.run([unshare, "-m", "true"], capture_output=True, check=False).returncode


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
def test_read_only_cache_works_if_complete_and_is_named_otherwise(short_run, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    environment = command_environment(tmp_path, cache)
    command = [sys.executable, "-m", "hass_lightning.commands.train", *short_run]

    def run(*words, read_only):
        ahead = f"mount --bind {cache} {cache} && mount -o remount,ro,bind {cache} && " if read_only else ""
        line = ["unshare", "-m", "bash", "-c", ahead + 'exec "$@"', "bash", *command, *words]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    warm = run("name=warm", read_only=False)
    assert warm.returncode == 0, warm.stderr
    again = run("name=again", read_only=True)
    assert again.returncode == 0, again.stderr
    cold = run("name=cold", "data.max_answer_tokens=300", read_only=True)  # other sequences, so other features
    errors = [line for line in cold.stderr.splitlines() if line.startswith("error:")]
    assert cold.returncode == 1 and len(errors) == 1, cold.stderr
    assert str(cache) in errors[0] and "paths.cache_dir" in errors[0]
    other = run("name=other", "target.path.seed=5", read_only=True)  # a target that the cache does not hold
    assert other.returncode == 1 and f"paths.cache_dir={cache} has no target" in other.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_feature_cache_is_a_one_sentence_error(tiny, tmp_path):
    import torch

    from hass_lightning.data.features import extract_features
    from hass_lightning.types import Tokens

    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"paths\.cache_dir"):
        extract_features(tiny, [Tokens("a", torch.arange(8), torch.ones(8, dtype=torch.bool))], tmp_path)


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}


def test_a_terminal_without_utf8_gets_help_and_errors(run_command):
    shown = run_command("train", "--help", env=ASCII)
    assert shown.code == 0 and "experiment" in shown.out, shown.err
    words = ("data=jsonl", 'data.source.path="Größe.jsonl"', "target=tiny", 'name="τ"')
    refused = run_command("train", *words, env=ASCII)
    assert refused.code == 1 and "Traceback" not in refused.err
    assert "jsonl does not exist" in refused.err


@pytest.mark.slow
def test_a_run_without_utf8_ends_like_any_other(short_run, run_command, tmp_path):
    rows = [{"question": f"Größe {n}?", "answer": "Nicht τ × 2, sondern 日本."} for n in range(16)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    words = ("experiment=smoke", "data=jsonl", f"data.source.path={tmp_path}/x.jsonl", "data.num_validation=4",
             "data.batch_size=4", "trainer.max_steps=4", "logger=csv")  # fmt: skip
    done = run_command("train", *words, env=ASCII)
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["num_identical"] >= 1
