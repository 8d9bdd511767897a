"""Sweeps by array jobs of a real SLURM: what is submitted, what is not, and how jobs that ended are called."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from slurm_toys import wait_for

from hass_lightning.runs import slurm

pytestmark = pytest.mark.slurm


def test_a_cell_is_submitted_once_and_at_most_so_many_run(sweep):
    words = ("a=1,2,3", "b=1", "sleep=60", "hydra.launcher.max_concurrent=1", "hydra.launcher.wait=false")
    both = [sweep.start(*words) for _ in range(2)]  # two launches at once
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("submitted 3 cells" in output for output in outputs) == [False, True], outputs
    wait_for(lambda: len(sweep.started()) == 1)
    again = sweep.submit(*words)  # one is running, two are queued
    assert "0 to submit, 3 completed, queued or running" in again.out
    assert again.result["num_queued_or_running"] == 3
    table = sweep.run(*words, "status=true")
    assert (table.result["num_queued"], table.result["num_running"]) == (2, 1), table.out
    sweep.go()
    done = sweep.run(*words[:-1])  # waits for the jobs of another launch
    assert done.result["num_completed"] == 3 and "num_queued_or_running" not in done.result
    assert sorted(sweep.started()) == [1, 2, 3]
    assert [sweep.entry(a).metric for a in (1, 2, 3)] == [11, 21, 31]
    assert "a=3,b=1,sleep=60  completed" in done.out
    entries = [entry for entry in sweep.ledger().entries() if entry.status in ("running", "completed")]
    assert [entry.status for entry in entries] == ["running", "completed"] * 3  # one after the other


def test_jobs_of_a_launcher_killed_while_submitting_are_found(sweep):
    words = ("a=1,2", "b=1", "hydra.launcher.options={hold: true}")
    sweep.submit(*words)
    sweep.ledger().path.unlink()  # as if it had been killed between sbatch and the ledger
    (note,) = sweep.ledger().folder.glob(".slurm/*/job_id")
    job = note.read_text()
    note.unlink()
    sweep.ledger().path.touch()
    assert "0 to submit" in sweep.submit(*words).out
    assert [sweep.entry(a).job for a in (1, 2)] == [f"{job}_0", f"{job}_1"]


def test_arrays_are_no_larger_than_the_cluster_allows(sweep, tmp_path):
    limit = slurm.largest_array()
    too_large, largest = (
        subprocess.run(["sbatch", "--hold", "--parsable", f"--array=0-{last}", "--output=/dev/null", "--wrap=true"],
                       cwd=tmp_path, capture_output=True, text=True, check=False)
        for last in (limit, limit - 1)
    )  # fmt: skip
    subprocess.run(["scancel", largest.stdout.strip()], check=True)
    assert "Invalid job array specification" in too_large.stderr and largest.returncode == 0
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    real = f'exec {shutil.which("scontrol")} "$@"'
    scontrol.write_text(f'#!/bin/sh\n[ "$1 $2" = "show config" ] && echo "MaxArraySize = 2" || {real}\n')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    done = sweep.run("a=1,2,3", "b=1", "hydra.launcher.max_concurrent=2", PATH=path)
    assert "submitted 2 cells" in done.out and "submitted 1 cell " in done.out and done.result["num_completed"] == 3
    first, second, third = (sweep.entry(a).job.split("_") for a in (1, 2, 3))
    assert first[0] == second[0] != third[0] and (first[1], second[1], third[1]) == ("0", "1", "0")
    entries = [entry for entry in sweep.ledger().entries() if entry.status in ("running", "completed")]
    assert [entry.cell for entry in entries[-2:]] == [sweep.entry(3).cell] * 2  # the second array after the first


def said(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def restart(node):
    subprocess.run(["slurmd", "-N", node], check=True)
    wait_for(lambda: "idle" in said("sinfo", "-hn", node, "-o%T"), 60)


def lose(daemon, job):
    """Kill the daemon of a node and all that the only job of an array runs there, as if the node had lost its power."""
    number = said("squeue", "-hj", job, "-o%A").strip()
    os.kill(int(daemon.read_text()), signal.SIGKILL)
    subprocess.run(["pkill", "-KILL", "-f", rf"slurmstepd: \[{number}\."], check=False)
    mark = f"SLURM_ARRAY_JOB_ID={job.split('_')[0]}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.timeout(600)
def test_how_jobs_ended_is_said_by_name_and_the_same_command_runs_them_again(sweep, slurm, tmp_path):
    """Cell 1 completes; 2 is cancelled while it runs; 3 reaches its time limit; 4 needs too much memory."""
    words = ("a=1,2,3,4", "b=1", "sleep=600", "study=ended", "hydra.launcher.time=1", "hydra.launcher.memory=1G",
             "hydra.launcher.signal_seconds=0")  # fmt: skip
    other = type(sweep)(tmp_path / "other")
    other.folder.mkdir()
    lost = ("a=5", "b=1", "sleep=600", "hydra.launcher.options={no-requeue: true, nodelist: hass3}")
    other.submit(*lost)
    wait_for(lambda: other.started() == [5])
    sweep.submit(*words, TOY_QUICK="1", TOY_MEMORY="4")
    wait_for(lambda: sorted(sweep.started()) == [1, 2, 3, 4])
    subprocess.run(["scancel", sweep.entry(2).job], check=True)
    daemon = slurm / "run" / "hass3.pid"
    if daemon.exists():
        os.kill(int(daemon.read_text()), signal.SIGKILL)
        wait_for(lambda: said("squeue", "-hrj", other.entry(5).job, "-t", "NODE_FAIL"), 90)
        restart("hass3")
        other.submit(*lost, "status=true")
        assert other.entry(5).error == f"node failed (SLURM job {other.entry(5).job})"
    wait_for(lambda: not said("squeue", "-h", "--name=ended"), 180)
    assert sweep.run(*words, "status=true").result["num_failed"] == 3
    assert sweep.entry(1).status == "completed"
    assert sweep.entry(2).error == f"cancelled (SLURM job {sweep.entry(2).job})"
    assert sweep.entry(3).error == f"timed out (SLURM job {sweep.entry(3).job})"
    assert sweep.entry(4).error.startswith("out of memory")
    sweep.go()
    again = sweep.run(*words)
    assert "3 to submit, 1 completed" in again.out and again.result["num_completed"] == 4
    assert sorted(sweep.started()) == [1, 2, 2, 3, 3, 4, 4]


@pytest.mark.timeout(300)
def test_a_cell_whose_node_is_lost_is_run_by_another_one(sweep, slurm):
    daemon = slurm / "run" / "hass3.pid"
    if not daemon.exists():
        pytest.skip("only with start_slurm.sh")
    words = ("a=1", "b=1", "sleep=600")
    sweep.submit(*words, "hydra.launcher.options={exclude: 'hass1,hass2'}")
    wait_for(lambda: sweep.started() == [1])
    job = sweep.entry(1).job
    lose(daemon, job)
    wait_for(lambda: "PENDING" in said("squeue", "-hrj", job, "-o%T"), 90)  # queued again
    assert "0 to submit" in sweep.submit(*words).out
    subprocess.run(["scontrol", "update", f"JobId={job}", "ExcNodeList=", "StartTime=now"], check=True)
    sweep.go()
    assert sweep.run(*words).result["num_completed"] == 1
    assert [entry.node for entry in sweep.ledger().entries() if entry.status == "completed"] != ["hass3"]
    restart("hass3")


def test_the_plan_has_what_is_asked_of_slurm_and_starts_nothing(sweep, call_command, tmp_path):
    words = (
        "-m",
        "experiment=smoke",
        "hydra/launcher=slurm",
        "study=planned",
        "model.alignment.depth=1,2",
        "plan=true",
    )
    more = ("hydra.launcher.account=lab", "hydra.launcher.partition=cpu", "hydra.launcher.memory=8G",
            "hydra.launcher.setup=[module load x]", "hydra.launcher.max_concurrent=1",
            "hydra.launcher.time=1:00:00")  # fmt: skip
    done = call_command("train", *words, *more, "trainer=deepspeed_zero2", "trainer.num_nodes=2")
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    (job,) = found["jobs"]
    assert job["num_cells"] == 2 and found["setup"] == ["module load x"] and found["hours"] >= 0
    asked = {"--account=lab", "--partition=cpu", "--time=1:00:00", "--mem=8G", "--nodes=2", "--ntasks-per-node=2"}
    assert asked <= set(job["sbatch"])
    assert not [option for option in job["sbatch"] if "gpu" in option]  # the partition has none
    assert not Path(tmp_path / "runs" / "sweeps" / "planned" / ".slurm").exists()
