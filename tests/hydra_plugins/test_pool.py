"""The pool with small commands instead of trainings; split of GPUs and threads; command lines and environments."""

import sys
import time

import pytest

from hass_lightning.runs.ledger import RESULT_FILE_VARIABLE, Ledger
from hydra_plugins.hass_lightning_launcher import _process, _resources
from hydra_plugins.hass_lightning_launcher._pool import Cell, Pool, Stopped
from hydra_plugins.hass_lightning_launcher._process import entry_point, job_environment, quote

WRITE = f"import json, os; open(os.environ['{RESULT_FILE_VARIABLE}'], 'w').write(json.dumps({{'metric': 7}}));"


def cell(tmp_path, name, code, config_hash="h"):
    command = [sys.executable, "-S", "-c", code]
    return Cell(name, 0, [f"name={name}"], command, tmp_path / name, config_hash)


def run(tmp_path, *cells, slots=1, **values):
    pool = Pool(Ledger(tmp_path), [None] * slots, cwd=str(tmp_path), **values)
    pool.run(cells)
    return [None if item.outcome is None else item.outcome.status for item in cells]


def test_failure_is_recorded_and_other_cells_run(tmp_path):
    cells = [
        cell(tmp_path, "good", WRITE),
        cell(tmp_path, "bad", "print('before'); raise RuntimeError('no luck')"),
        cell(tmp_path, "killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        cell(tmp_path, "silent", ""),
    ]
    assert run(tmp_path, *cells, slots=2) == ["completed", "failed", "failed", "completed"]
    good, bad, killed, silent = (item.outcome for item in cells)
    assert good.metric == 7 and silent.metric is None
    assert bad.error == "RuntimeError: no luck (exit code 1)"
    assert killed.error == "no output (killed by SIGKILL)"
    assert (tmp_path / "bad" / "job.log").read_text().startswith("before")


def test_only_incomplete_cells_run_again(tmp_path):
    count = "open('count', 'a').write('x');"
    cells = [cell(tmp_path, "good", count), cell(tmp_path, "bad", count + "raise SystemExit(3)")]
    assert run(tmp_path, *cells) == ["completed", "failed"]
    assert run(tmp_path, *(cell(tmp_path, name, count) for name in ("good", "bad"))) == ["completed", "completed"]
    assert (tmp_path / "count").read_text() == "xxx"


def test_changed_config_runs_again_and_keeps_the_old_folder(tmp_path):
    run(tmp_path, cell(tmp_path, "x", WRITE))
    changed = cell(tmp_path, "x", "print('second')", config_hash="new")
    assert run(tmp_path, changed) == ["completed"]
    assert changed.outcome.metric is None
    assert [path.name for path in tmp_path.glob("x.h-*")] and (tmp_path / "x" / "job.log").read_text() == "second\n"


@pytest.mark.parametrize("times, status", [(1, "completed"), (9, "failed")])
def test_preempted_job_is_restarted_up_to_max_requeues(tmp_path, times, status):
    code = f"f = open('n', 'a+'); f.write('x'); f.seek(0); raise SystemExit(75 if len(f.read()) <= {times} else 0)"
    assert run(tmp_path, cell(tmp_path, "x", code), max_requeues=2) == [status]
    assert len((tmp_path / "n").read_text()) == min(times, 2) + 1


def test_restarted_job_drops_fresh(tmp_path):
    code = "import sys; open('n', 'a').write(str(sys.argv[1:])); raise SystemExit(75 * ('fresh=true' in sys.argv))"
    asked = cell(tmp_path, "x", code)
    asked.command += ["fresh=true", "y=1"]
    assert run(tmp_path, asked, max_requeues=2) == ["completed"]
    assert (tmp_path / "n").read_text() == "['fresh=true', 'y=1']['y=1']"


def test_no_job_starts_that_would_end_after_the_deadline(tmp_path):
    sleeps = [cell(tmp_path, name, "import time; time.sleep(0.6)") for name in "abcd"]
    statuses = run(tmp_path, *sleeps, deadline=time.monotonic() + 1.2)
    assert statuses[0] == "completed" and statuses[-1] is None
    assert len(Ledger(tmp_path).latest()) == sum(status == "completed" for status in statuses)


def test_result_of_a_completed_orphan_is_used(tmp_path):
    first = cell(tmp_path, "x", WRITE)
    run(tmp_path, first)
    ledger = Ledger(tmp_path)
    text = ledger.path.read_text().splitlines()
    ledger.path.write_text(text[0] + "\n")  # as if the launcher had been killed after the start
    again = cell(tmp_path, "x", "raise SystemExit('must not run')")
    assert run(tmp_path, again) == ["completed"]
    assert again.outcome.metric == 7


def test_remaining_processes_of_a_job_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(_process, "LEFTOVER_SECONDS", 0.3)
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); open('pid', 'w').write(str(p.pid))"
    job = cell(tmp_path, "x", code + "; raise SystemExit(1)")
    started = time.monotonic()
    assert run(tmp_path, job) == ["failed"]
    assert time.monotonic() - started < 20
    time.sleep(0.2)
    status = tmp_path.joinpath("/proc", (tmp_path / "pid").read_text(), "status")
    assert not status.exists() or "\nState:\tZ" in status.read_text()


def test_signal_stops_all_jobs(tmp_path):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    kill = "import os, signal, time; time.sleep(0.5); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    pool = Pool(Ledger(tmp_path), [None] * 2, cwd=str(tmp_path), grace_seconds=0.5)
    with pytest.raises(Stopped):
        pool.run([cell(tmp_path, "a", stubborn), cell(tmp_path, "b", kill), cell(tmp_path, "c", WRITE)])
    assert {name: entry.status for name, entry in Ledger(tmp_path).latest().items()} == {"a": "stopped", "b": "stopped"}


def test_gpus_are_split_evenly():
    split = _resources.split_gpus
    assert split(1, None, ["0", "1"]) == [None]
    assert split(2, None, ["0", "1", "2", "3"]) == [["0", "1"], ["2", "3"]]
    assert split(2, 1, ["4", "GPU-5"]) == [["4"], ["GPU-5"]]
    assert split(3, None, ["0", "1"]) == [["0"], ["1"], ["0"]]
    assert split(2, 0, ["0"]) == [None, None] == split(2, None, [])
    with pytest.raises(ValueError, match=r"n_jobs=2.*gpus_per_job=2 needs 4 GPUs and 3 are visible"):
        split(2, 2, ["0", "1", "2"])


def test_cores_are_split_unless_omp_num_threads_is_set(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(_resources.os, "sched_getaffinity", lambda _: range(16))
    assert _resources.slot_environment(1, None, 2) == {}
    assert _resources.slot_environment(2, ["3", "4"], 2) == {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "3,4"}
    assert _resources.slot_environment(64, None, 1) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _resources.slot_environment(2, None, 1) == {}


def test_visible_gpus_follow_cuda_visible_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, MIG-7,")
    assert _resources.visible_gpus() == ["2", "MIG-7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert _resources.visible_gpus() == []


def test_rank_variables_are_not_inherited(monkeypatch):
    leaked = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*leaked, "TORCHELASTIC_RUN_ID", "PL_GLOBAL_SEED", RESULT_FILE_VARIABLE):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKING", "kept")
    found = job_environment({"X": "1"})
    assert found["X"] == "1" and found["RANKING"] == "kept"
    assert not {*leaked, "TORCHELASTIC_RUN_ID", "PL_GLOBAL_SEED", RESULT_FILE_VARIABLE} & set(found)


def test_entry_point_and_quoting():
    assert entry_point(quote) == ["-m", "hydra_plugins.hass_lightning_launcher._process"]
    assert quote("/a b/it's") == r"'/a b/it\'s'"
