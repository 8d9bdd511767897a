"""Complete sweeps of a toy command, started from the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher

from hass_lightning.measure.heads import heads_of
from hass_lightning.report.study import load_runs
from hass_lightning.runs.config import config_folder
from hass_lightning.runs.ledger import Ledger

TOY = Path(__file__).with_name("toy")
RANKS = {"LOCAL_RANK": "1", "RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


class Sweep:
    """Starts the toy command in a folder and reads the records of its jobs."""

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


def test_only_failed_cells_of_a_grid_run_again(sweep):
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

    output = sweep.run(*arguments, TOY_FAILS="1")  # the completed ones would fail if they ran again
    assert len(sweep.runs()) == 6
    assert json.loads(output.splitlines()[-1])["num_completed"] == 4
    latest = sweep.ledger().latest()
    assert sorted(entry.metric for entry in latest.values()) == [11, 12, 21, 22]
    assert all(entry.result == {"sum": sum(divmod(entry.metric, 10))} for entry in latest.values())


def test_cells_have_readable_names(sweep):
    output = sweep.run("a=1,2", "b=1", "study=named")
    folder = sweep.folder / "runs" / "sweeps" / "named"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {".locks", "a=1,b=1", "a=2,b=1"}
    assert "#1 a=2,b=1 completed" in output and "a=2" in (folder / "a=2,b=1" / ".hydra" / "overrides.yaml").read_text()


def test_old_sweep_resumes_under_its_old_names(sweep):
    """The ledger was written before folders had readable names: a=1 completed there, a=2 failed."""
    folder = sweep.folder / "runs" / "sweeps" / "old"
    shutil.copytree(TOY.parent / "old_sweep", folder)
    assert [run.folder.name for run in load_runs(folder)] == ["dpnadgbpalha", "ignkbblmlhim"]
    output = sweep.run("a=1,2,3", "b=1", "study=old", TOY_FAILS="1")  # a=1 would fail if it ran
    assert "#0 dpnadgbpalha completed before" in output
    assert sorted(run["a"] for run in sweep.runs()) == [2, 3]
    cells = ["dpnadgbpalha", "ignkbblmlhim", "a=3,b=1"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {".locks", *cells}
    assert (folder / "ignkbblmlhim" / "job.log").is_file()
    assert [entry.metric for entry in sweep.ledger().latest().values()] == [11, 21, 31]
    for cell in cells:
        (folder / cell / "draft").mkdir()
    assert heads_of(str(folder)) == [str(folder / cell) for cell in cells]


def test_two_launches_at_once_share_the_cells(sweep):
    both = [sweep.start("a=1,2,3", "sleep=0.4") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(run["a"] for run in sweep.runs()) == [1, 2, 3]
    assert all(json.loads(output.splitlines()[-1])["num_completed"] == 3 for output in outputs)


def test_job_of_a_killed_launcher_is_adopted(sweep):
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


def test_ctrl_c_stops_the_jobs(sweep):
    process = sweep.start("a=1,2,3", "sleep=60", "hydra.launcher.n_jobs=2", "hydra.launcher.grace_seconds=5")
    sweep.wait_for_runs(2)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert [entry.status for entry in sweep.ledger().latest().values()] == ["stopped", "stopped"]
    for run in sweep.runs():
        with pytest.raises(ProcessLookupError):
            os.kill(run["pid"], 0)


def test_optuna_reads_the_metric_and_a_repeated_study_runs_no_job(sweep):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = ["hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=1"]
    arguments += ["hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3", "a=range(1,9)", "hydra.launcher.n_jobs=3"]
    output = sweep.run(*arguments, "hydra.sweeper.max_failure_rate=1.0")
    best = max(run["a"] for run in sweep.runs()) * 10 + 1
    assert f"Best value: {best}.0" in output
    num_runs = len(sweep.runs())
    output = sweep.run(*arguments, "hydra.sweeper.max_failure_rate=1.0")
    assert f"Best value: {best}.0" in output and len(sweep.runs()) == num_runs


def test_the_table_of_a_sweep_is_printed_and_nothing_is_started(sweep):
    sweep.run("a=1,2", "b=1", "study=table", code=1, TOY_FAILS="2")
    output = sweep.run("a=1,2,3", "b=1", "study=table", "status=true")
    lines = [line.split() for line in output.splitlines()]
    assert ["a=1,b=1", "completed", "11"] in [line[:3] for line in lines]
    assert ["a=2,b=1", "failed"] in [line[:2] for line in lines] and "a is 2 (exit code 1)" in output
    assert ["a=3,b=1", "missing"] in lines
    counts = json.loads(output.splitlines()[-1])
    assert (counts["num_cells"], counts["num_completed"], counts["num_failed"], counts["num_missing"]) == (3, 1, 1, 1)
    assert sorted(run["a"] for run in sweep.runs()) == [1, 2]


def test_slurm_needs_sbatch(sweep):
    output = sweep.run("a=1,2", "hydra/launcher=slurm", code=1, PATH=os.path.dirname(sys.executable))
    assert "error: hydra/launcher=slurm needs sbatch on this machine" in output and not sweep.runs()


def test_a_launcher_without_a_ledger_is_refused(sweep):
    target = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    output = sweep.run("a=1,2", f"hydra.launcher._target_={target}", code=1)
    assert "use hydra/launcher=slurm" in output and not sweep.runs()
