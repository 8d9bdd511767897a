"""One cell over two nodes of a real SLURM, and under torchrun: the same head as on one node, to the last bit."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_toys import wait_for

from command_environment import command_environment
from hass_lightning.runs.ledger import Ledger

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SHORT = (
    "experiment=smoke", "callbacks.decoding=null", "optimized_metric=simulated_acceptance_length",
    "data.source.num_questions=24", "data.source.num_validation=4", "data.num_validation=4", "data.batch_size=2",
    "trainer.max_epochs=null", "trainer.max_steps=40", "trainer.val_check_interval=40", "trainer.log_every_n_steps=1",
    "trainer.enable_model_summary=false",
)  # fmt: skip
TRAIN = (sys.executable, "-m", "hass_lightning.commands.train")
TWO_NODES = ("trainer.num_nodes=2", "trainer.devices=1")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("nodes")


def run(work, name, *command):
    """Run a command in a folder of its own, on the corpus and the features of this module; its run folder."""
    root = work / name
    root.mkdir()
    done = subprocess.run(command, cwd=root, env=environment(work, root), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1  # of the first rank alone
    return Path(json.loads(lines[0])["run_dir"]), done.stdout + done.stderr


def environment(work, root):
    variables = command_environment(root, work / "cache", WANDB_MODE="offline", OMP_NUM_THREADS="1")
    return {name: value for name, value in variables.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def words(work, *more):
    return (*SHORT, f"data.source.output_dir={work}/corpus", "name=run", *more)


def head(folder):
    return (folder / "draft" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def one_node(work):
    """The head of two processes on one node, by strategy."""
    found = {}

    def train(trainer):
        if trainer not in found:
            folder, _ = run(work, f"one-{trainer}", *TRAIN, *words(work, f"trainer={trainer}", "trainer.devices=2"))
            found[trainer] = head(folder)
        return found[trainer]

    return train


def srun(*options):
    return ("srun", "-N2", "--ntasks-per-node=1", "-c1", "--kill-on-bad-exit=1", *options)


@pytest.mark.parametrize("trainer", ["ddp_cpu", "deepspeed_zero2"])
def test_two_nodes_train_the_head_of_one(work, one_node, trainer):
    if trainer.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    folder, said = run(work, f"two-{trainer}", *srun(), *TRAIN, *words(work, f"trainer={trainer}", *TWO_NODES))
    assert "rank 1 of 2 on" in said and "waits for the first process at hass1, port " in said
    runs = folder.parent
    assert [path for path in runs.iterdir() if path.is_dir()] == [folder]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    shards = list((work / "cache" / "features").glob("*/shard-*.safetensors"))
    assert len(shards) == len({path.parent for path in shards}) == 2  # training and validation, each made once
    assert head(folder) == one_node(trainer)


def test_two_agents_of_torchrun_train_the_same_head(work, one_node):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    root = work / "torchrun"
    root.mkdir()
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=1"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", *TRAIN[1:]]
    agents = [
        subprocess.Popen([*agent, *words(work, "trainer=ddp_cpu", *TWO_NODES)], cwd=root, text=True,
                         env=environment(work, root), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    outputs = [each.communicate(timeout=300) for each in agents]
    assert [each.returncode for each in agents] == [0, 0], outputs
    (folder,) = (root / "runs").glob("run*")
    assert head(folder) == one_node("ddp_cpu")


def test_a_cell_over_two_nodes_that_is_queued_again_ends_as_if_it_had_not_been(work, one_node, tmp_path):
    """USR1 before the time limit: DeepSpeed on two nodes saves, SLURM queues the job again, it goes on."""
    pytest.importorskip("deepspeed")
    # without wait, and slow enough to be interrupted: a checkpoint at every step
    command = [*TRAIN, "-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "study=again"]
    command += [*words(work, "trainer=deepspeed_zero2", *TWO_NODES), "callbacks.last_checkpoint.every_n_train_steps=1"]

    def launch(*more):
        done = subprocess.run([*command, *more], cwd=tmp_path, env=environment(work, tmp_path), capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    launch("hydra.launcher.wait=false")
    ledger = Ledger(tmp_path / "runs" / "sweeps" / "again")
    wait_for(lambda: list(ledger.folder.glob("*/checkpoints/last.ckpt/latest")), 600)
    (entry,) = ledger.latest().values()
    subprocess.run(["scancel", "--signal=USR1", str(entry.job)], check=True)
    wait_for(lambda: "requeued" in [each.status for each in ledger.entries()], 60)
    wait_for(lambda: "PENDING" in state(entry.job), 60)
    subprocess.run(["scontrol", "update", f"JobId={entry.job}", "StartTime=now"], check=True)  # SLURM waits two minutes
    out = launch()
    assert json.loads(out.splitlines()[-1])["num_completed"] == 1
    (last,) = ledger.latest().values()
    assert [each.status for each in ledger.entries()] == ["queued", "running", "requeued", "running", "completed"]
    assert "resuming from" in (Path(last.folder) / "job.log").read_text()
    assert head(Path(last.folder)) == one_node("deepspeed_zero2")


def test_a_process_that_dies_ends_its_cell_within_a_minute_and_is_named(work, tmp_path):
    command = [*TRAIN, "-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "study=dies"]
    command += ["hydra.launcher.wait=false", *words(work, "trainer=ddp_cpu", *TWO_NODES), "trainer.max_steps=100000"]
    command += ["trainer.val_check_interval=100000", "callbacks.last_checkpoint.every_n_train_steps=5"]
    subprocess.run(command, cwd=tmp_path, env=environment(work, tmp_path), capture_output=True, check=True)
    ledger = Ledger(tmp_path / "runs" / "sweeps" / "dies")
    wait_for(lambda: list(ledger.folder.glob("*/checkpoints/last.ckpt")), 600)
    (entry,) = ledger.latest().values()
    second = subprocess.run(["scontrol", "show", "hostnames", entry.node], capture_output=True, text=True, check=True)
    second = second.stdout.split()[1]
    os.kill(process_of(entry.job, rank=1), signal.SIGKILL)
    started = time.monotonic()
    wait_for(lambda: ledger.entries()[-1].status == "failed", 60)
    assert time.monotonic() - started < 60
    assert ledger.entries()[-1].error == f"rank 1 on {second} has died (Killed)"


def process_of(job, rank):
    """The process of a rank of an array's job."""
    array, task = job.split("_")
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}", f"SLURM_PROCID={rank}"}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = set((folder / "environ").read_text(errors="replace").split("\0"))
            if wanted <= variables and f"SLURM_NODEID={rank}" in variables:
                return int(folder.name)
    raise AssertionError(f"rank {rank} of job {job} does not run")


def state(job):
    return subprocess.run(["squeue", "-hrj", job, "-o%T"], capture_output=True, text=True, check=False).stdout
