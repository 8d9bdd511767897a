"""A run that reports success left a result, and a failed run reports its failure, also to W&B and a scheduler."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hass_lightning.runs.ledger import REQUEUE_EXIT_CODE
from hass_lightning.runs.ranks import is_first_process, settle_ranks

LEFT_OVER = {
    "srun task": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
    "RANK": {"RANK": "1"}, "LOCAL_RANK": {"LOCAL_RANK": "1"}, "NODE_RANK": {"NODE_RANK": "1"},
    "torchrun": {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    "not a number": {"RANK": "none", "SLURM_PROCID": "1"},
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("variables", LEFT_OVER.values(), ids=LEFT_OVER)
def test_single_process_is_the_first_whatever_the_environment(environment, caplog, variables):
    environment(variables)
    settle_ranks(1)
    assert is_first_process()
    assert "=1" in caplog.text and "is ignored" in caplog.text


def test_single_process_with_rank_variables_of_another_launch_writes_all_files(train, environment, monkeypatch):
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    environment(LEFT_OVER["srun task"] | {"RANK": "1"})
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning reads it when it is imported there
    done = train()
    assert done.code == 0, done.err
    run = Path(done.result["run_dir"])
    assert [name for name in ("metrics.json", "report.html", "provenance.json", "csv/metrics.csv", "draft/config.json")
            if not (run / name).exists()] == []  # fmt: skip


def test_a_batch_job_without_srun_starts_its_processes_itself(environment, caplog):
    environment({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    settle_ranks(2)
    assert not {"SLURM_NTASKS", "SLURM_PROCID"} & os.environ.keys()
    assert "srun did not start this process" in caplog.text


def test_on_several_machines_it_is_refused(environment):
    environment({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    with pytest.raises(ValueError, match=r"trainer\.num_nodes=2.*srun"):
        settle_ranks(4, num_nodes=2)


def test_the_tasks_of_srun_and_torchrun_keep_their_ranks(environment, caplog):
    srun = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}
    environment(srun)
    settle_ranks(2)
    assert not is_first_process() and not caplog.text
    with pytest.raises(ValueError, match="SLURM_NTASKS=2"):
        settle_ranks(8)
    environment({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"})
    settle_ranks(4, num_nodes=2)
    assert os.environ["RANK"] == "3"


@pytest.mark.slow
def test_a_batch_job_with_two_tasks_trains_without_srun(run_command, short_run):
    ids = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    tasks = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job = ids | tasks | {"SLURM_JOB_NODELIST": os.uname().nodename}
    done = run_command("train", *short_run, "trainer=ddp_cpu", "data.batch_size=2", env=job)
    assert done.code == 0, done.err[-3000:]
    assert json.loads(done.out.splitlines()[-1])["train_tokens"] > 0


# --- W&B -------------------------------------------------------------------------------------------------------------


def exit_code_in_wandb(run):
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    (ended,) = [record for record in records if record["type"] == "exit"]
    return int(json.dumps(ended).split('"exit_code":')[1].split(",")[0].strip(" }")), {r["type"] for r in records}


@pytest.mark.slow
def test_a_failed_run_has_failed_in_wandb(run_command, short_run, tmp_path):
    words = [word for word in short_run if word != "logger=csv"]
    done = run_command("train", *words, "model.optimizer.lr=1e30", "name=failed")
    assert done.code == 1 and "not finite" in done.err
    (run,) = tmp_path.glob("runs/failed*")
    assert exit_code_in_wandb(run)[0] == 1


@pytest.mark.slow
def test_a_preempted_run_is_preempted_in_wandb(start_command, short_run, tmp_path):
    words = [word for word in short_run if word != "logger=csv"]
    process = start_command("train", *words, "trainer.max_steps=5000", "trainer.max_epochs=null", "name=stopped",
                            "callbacks.last_checkpoint.every_n_train_steps=5")  # fmt: skip
    while not list(tmp_path.glob("runs/stopped*/checkpoints/last.ckpt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == REQUEUE_EXIT_CODE
    (run,) = tmp_path.glob("runs/stopped*")
    code, types = exit_code_in_wandb(run)
    assert code == REQUEUE_EXIT_CODE and "preempting" in types
