"""Whole sweeps of a toy command, started as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher

from hass_lightning.cli import config_folder
from hass_lightning.ledger import Ledger

TOY = Path(__file__).with_name("toy")
RANKS = {"LOCAL_RANK": "1", "RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


class Sweep:
    """Starts the toy in a folder and reads what its jobs noted."""

    def __init__(self, folder):
        self.folder = folder
        self.runs_file = folder / "runs.jsonl"

    def start(self, *arguments, **env):
        command = [sys.executable, "-m", "toyapp", "--config-path", str(TOY / "conf"), "-m", *arguments]
        command += [f"hydra.searchpath=[file://{config_folder()}]"]
        env = {"PYTHONPATH": str(TOY), "OMP_NUM_THREADS": "1", "TOY_RUNS": str(self.runs_file), **RANKS, **env}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments, code=0, **env):
        process = self.start(*arguments, **env)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code, output
        return output

    def runs(self):
        if not self.runs_file.exists():
            return []
        return [json.loads(line) for line in self.runs_file.read_text().splitlines()]

    def ledger(self):
        (folder,) = (self.folder / "runs" / "sweeps").iterdir()
        return Ledger(folder)

    def wait_for_runs(self, number):
        deadline = time.monotonic() + 60
        while len(self.runs()) < number:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def test_hydra_finds_the_plugin():
    assert "SubprocessLauncher" in [launcher.__name__ for launcher in Plugins.instance().discover(Launcher)]


def test_a_grid_survives_a_failing_cell_and_runs_only_that_again(sweep):
    arguments = ("a=1,2", "b=1,2", "hydra.launcher.n_jobs=2")
    output = sweep.run(*arguments, code=1, TOY_FAILS="2")
    assert "2 completed, 2 failed" in output and "a is 2 (exit code 1)" in output
    runs = sweep.runs()
    assert sorted((run["a"], run["b"]) for run in runs) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len({run["pid"] for run in runs}) == 4
    assert all(run["ranks"] == {} for run in runs)
    latest = sweep.ledger().latest()
    assert sorted((entry.status, entry.metric) for entry in latest.values() if entry.metric) == [
        ("completed", 11),
        ("completed", 12),
    ]
    failed = next(entry for entry in latest.values() if entry.status == "failed")
    assert failed.error == "a is 2 (exit code 1)" and failed.seconds > 0
    overrides = (Path(failed.folder) / ".hydra" / "overrides.yaml").read_text()
    assert "a=2" in overrides and "n_jobs" not in overrides
    assert "error: a is 2" in (Path(failed.folder) / "job.log").read_text()

    output = sweep.run(*arguments, TOY_FAILS="1")  # the completed ones would fail now, if they ran
    assert len(sweep.runs()) == 6
    assert json.loads(output.splitlines()[-1])["num_completed"] == 4
    latest = sweep.ledger().latest()
    assert sorted(entry.metric for entry in latest.values()) == [11, 12, 21, 22]
    assert all(entry.result == {"sum": sum(divmod(entry.metric, 10))} for entry in latest.values())


def test_two_launches_at_once_share_the_cells(sweep):
    both = [sweep.start("a=1,2,3", "sleep=0.4") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(run["a"] for run in sweep.runs()) == [1, 2, 3]
    assert all(json.loads(output.splitlines()[-1])["num_completed"] == 3 for output in outputs)


def test_a_killed_launcher_leaves_a_job_that_is_taken_over(sweep):
    first = sweep.start("a=1,2", "sleep=60")
    sweep.wait_for_runs(1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = sweep.start("a=1,2", "sleep=60")
    sweep.wait_for_runs(2)
    Path(f"{sweep.runs_file}.go").touch()
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    assert sorted(run["a"] for run in sweep.runs()) == [1, 2]
    assert sorted(entry.metric for entry in sweep.ledger().latest().values()) == [11, 21]


def test_ctrl_c_ends_the_jobs(sweep):
    process = sweep.start("a=1,2,3", "sleep=60", "hydra.launcher.n_jobs=2", "hydra.launcher.grace_seconds=5")
    sweep.wait_for_runs(2)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert [entry.status for entry in sweep.ledger().latest().values()] == ["stopped", "stopped"]
    for run in sweep.runs():
        with pytest.raises(ProcessLookupError):
            os.kill(run["pid"], 0)


def test_optuna_gets_the_metric_and_a_repeated_study_costs_nothing(sweep):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=1"]
    arguments += ["hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3", "a=range(1,9)", "hydra.launcher.n_jobs=3"]
    output = sweep.run(*arguments, "hydra.sweeper.max_failure_rate=1.0")
    best = max(run["a"] for run in sweep.runs()) * 10 + 1
    assert f"Best value: {best}.0" in output
    num_runs = len(sweep.runs())
    output = sweep.run(*arguments, "hydra.sweeper.max_failure_rate=1.0")
    assert f"Best value: {best}.0" in output and len(sweep.runs()) == num_runs
