"""Long unattended jobs: interrupted sweeps, ranks that die, servers that fail, changed configs."""

import contextlib
import csv
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from command_environment import command_environment
from hass_lightning.runs.ledger import REQUEUE_EXIT_CODE, Ledger
from hass_lightning.runs.provenance import refuse_other_config
from hass_lightning.training.wandb_logging import offline_without_server

# the tiny target, few steps, no decoding
SHORT = (
    "experiment=smoke", "logger=csv", "callbacks.decoding=null", "optimized_metric=simulated_acceptance_length",
    "data.source.num_questions=24", "data.source.num_validation=4", "data.num_validation=4", "data.batch_size=2",
    "trainer.max_epochs=null", "trainer.log_every_n_steps=1",
)  # fmt: skip
ONLY_STEPS = (*SHORT, "trainer.max_steps=60", "trainer.val_check_interval=60")


def wait_for(condition, *processes, seconds=900):
    end = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < end
        time.sleep(0.02)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def losses(run_dir):
    """Return train/loss by step over all attempts (the last one counts)."""
    found = {}
    files = sorted((run_dir / "csv").glob("metrics.*"), key=lambda path: path.stat().st_mtime)
    for path in files:
        with path.open() as file:
            found |= {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    return found


def validation(run_dir):
    """Return the last value of every val/… column."""
    found = {}
    with (run_dir / "csv" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found |= {name: float(value) for name, value in row.items() if name.startswith("val/") and value}
    return found


# --- a changed config, a silent server -------------------------------------------------------------------------------


def test_another_config_is_refused_by_its_keys_once_a_run_has_begun(tmp_path):
    config = OmegaConf.create(
        {"paths": {"root": "a"}, "lr": 0.1, "depth": 3, "folder": "${paths.root}/x", "data": {"num_workers": 0}}
    )
    refuse_other_config(tmp_path, config, begun=False)
    for free in ({"paths": {"root": "b"}}, {"data": {"num_workers": 4}}):
        refuse_other_config(tmp_path, OmegaConf.merge(config, free), begun=True)
    changed = OmegaConf.merge(config, {"lr": 0.2, "more": 1})
    with pytest.raises(ValueError, match=r"lr=0\.2 \(was 0\.1\), more=1 \(was None\).*fresh=true.*name="):
        refuse_other_config(tmp_path, changed, begun=True)
    refuse_other_config(tmp_path, changed, begun=False)  # nothing was trained yet
    refuse_other_config(tmp_path, changed, begun=True)


def test_a_wandb_server_that_never_replies_means_offline(monkeypatch, silent_server, caplog):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    with caplog.at_level("INFO"):
        offline_without_server()
    assert os.environ["WANDB_MODE"] == "offline"
    assert f"{silent_server} does not answer" in caplog.text


@pytest.mark.slow
def test_run_ends_although_its_wandb_server_never_replies(run_command, silent_server):
    environment = {"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": silent_server, "WANDB_MODE": ""}
    words = [word for word in SHORT if word != "logger=csv"]
    done = run_command("train", *words, "trainer.max_steps=2", env=environment, timeout=120)
    assert done.code == 0, done.err[-2000:]
    assert list((Path(json.loads(done.out.splitlines()[-1])["run_dir"]) / "wandb").glob("offline-run-*"))


# --- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_sweeps_killed_in_the_middle_run_each_cell_once(start_command, tmp_path):
    """8 cells with ddp_cpu and 4 with DeepSpeed, simultaneously on one cache, killed with all processes, and again."""
    pytest.importorskip("deepspeed")
    environment = {"HASS_LIGHTNING_CACHE": str(tmp_path / "cache")}
    common = ("-m", *SHORT, "trainer.max_steps=6", "trainer.val_check_interval=6")
    cells = ("model.alignment.depth=1,2", "seed=0,1")
    sweeps = {
        "ddp": (*common, "trainer=ddp_cpu", "study=ddp", *cells, "model/loss=eagle,hass"),
        "zero": (*common, "trainer=deepspeed_zero2", "study=zero", *cells),
    }
    ledgers = {name: Ledger(tmp_path / "runs" / "sweeps" / name) for name in sweeps}

    def completed(name):
        return {entry.cell for entry in ledgers[name].entries() if entry.status == "completed"}

    first = {name: start_command("train", *words, env=environment) for name, words in sweeps.items()}
    wait_for(lambda: all(len(completed(name)) >= 1 for name in sweeps), *first.values(), seconds=600)
    jobs = [child for process in first.values() for child in children(process.pid)]
    for process in first.values():
        process.kill()
    for job in jobs:  # each leads the process group of its ranks
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job, signal.SIGKILL)
    before = {name: completed(name) for name in sweeps}
    assert all(0 < len(done) < number for done, number in zip(before.values(), (8, 4), strict=True))
    again = {name: start_command("train", *words, env=environment) for name, words in sweeps.items()}
    for name, number in (("ddp", 8), ("zero", 4)):
        out, err = again[name].communicate(timeout=900)
        assert again[name].returncode == 0, err[-3000:]
        assert json.loads(out.splitlines()[-1])["num_completed"] == number
        entries = ledgers[name].entries()
        starts = [entry.cell for entry in entries if entry.status == "running"]
        assert len(set(starts)) == number
        assert all(starts.count(cell) == 1 for cell in before[name]), "a completed cell was started again"
        ends = [entry.cell for entry in entries if entry.status == "completed"]
        assert sorted(ends) == sorted(set(starts)), "a cell completed twice or never"
        latest = ledgers[name].latest().values()
        assert all(entry.metric is not None and entry.data and entry.seconds for entry in latest)
        assert len(list(Path(ledgers[name].folder).glob("*/draft/model.safetensors"))) == number
    shards = list((tmp_path / "cache" / "features").glob("*/shard-*.safetensors"))
    assert len(shards) == len({path.parent for path in shards}) == 2  # training and validation, each extracted once


def test_a_sweep_is_planned_and_not_started(call_command, tmp_path):
    words = ("-m", *SHORT, "trainer.max_steps=6", "model.alignment.depth=1,2", "study=planned", "plan=true")
    done = call_command("train", *words)
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    assert (found["num_cells"], found["num_completed"]) == (2, 0)
    assert found["hours"] >= 0 and found["disk_gb"] >= 0 and found["memory_gb"] > 0
    assert not [path for path in tmp_path.glob("runs/sweeps/planned/*") if path.is_dir()]
    alone = call_command("train", *SHORT, "trainer.max_steps=6", "plan=true")
    assert alone.code == 0, alone.err
    assert json.loads(alone.out.splitlines()[-1])["training_hours"] > 0
    assert not list(tmp_path.glob("runs/*/provenance.json"))


# --- several processes: equalities and faults ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cache_dir):
    """Uninterrupted runs over the same global batches, started on demand."""
    import subprocess
    import sys

    found = {}

    def run(trainer):
        if trainer not in found:
            root = tmp_path_factory.mktemp("straight")
            words = [
                *ONLY_STEPS,
                f"trainer={trainer}",
                "name=run",
                *(["data.batch_size=4"] if trainer == "cpu" else []),
            ]
            subprocess.run(
                [sys.executable, "-m", "hass_lightning.commands.train", *words],
                cwd=root, env=command_environment(root, cache_dir), capture_output=True, check=True,
            )  # fmt: skip
            found[trainer] = next((root / "runs").glob("run*"))
        return found[trainer]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_cpu", "deepspeed_zero0", "deepspeed_zero1", "deepspeed_zero2"])
def test_processes_and_stages_have_the_loss_curve_of_one_process(straight, trainer):
    if trainer.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    one, other = losses(straight("cpu")), losses(straight(trainer))
    assert list(one) == list(other) == list(range(60))
    assert list(other.values()) == pytest.approx(list(one.values()), rel=1e-3)
    sums, theirs = (
        validation(straight("cpu")),
        validation(straight(trainer)),
    )  # reduced once
    assert len(sums) > 10
    assert theirs == pytest.approx(sums, rel=1e-3)


def interrupt(process, run_dir, trainer):
    """Preempt all ranks or kill one; return the exit code, the output, and the duration."""
    started = time.monotonic()
    if trainer == "ddp_cpu":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(children(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    return process.returncode, err, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_cpu", "deepspeed_zero2"])
def test_two_processes_stopped_and_resumed_equal_an_uninterrupted_run(start_command, straight, tmp_path, trainer):
    """Bitwise equal; and the exported head is the consolidated checkpoint."""
    if trainer.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    words = (*ONLY_STEPS, f"trainer={trainer}", "name=run", "callbacks.last_checkpoint.every_n_train_steps=5")
    process = start_command("train", *words)
    wait_for(lambda: list(tmp_path.glob("runs/run*/checkpoints/last.ckpt")), process)
    (run_dir,) = tmp_path.glob("runs/run*")
    code, err, seconds = interrupt(process, run_dir, trainer)
    if trainer == "ddp_cpu":
        assert code == REQUEUE_EXIT_CODE, err[-3000:]
    else:
        assert code not in (0, REQUEUE_EXIT_CODE)
        assert seconds < 60
        assert "of this run has died" in err or "terminated with code -9" in err, err[-3000:]
    again = start_command("train", *words)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err[-3000:]
    assert "resuming from" in out
    expected = straight(trainer)
    head = (run_dir / "draft" / "model.safetensors").read_bytes()
    assert head == (expected / "draft" / "model.safetensors").read_bytes()
    resumed, uninterrupted = losses(run_dir), losses(expected)
    assert len(resumed) >= 30  # a killed attempt loses what its logger had buffered
    assert resumed == {step: uninterrupted[step] for step in resumed}
    last = run_dir / "checkpoints" / "last.ckpt"
    if trainer.startswith("deepspeed"):
        from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

        convert_zero_checkpoint_to_fp32_state_dict(str(last), str(tmp_path / "whole.pt"))
        last = tmp_path / "whole.pt"
    state = torch.load(last, weights_only=True)["state_dict"]
    exported = load_file(run_dir / "draft" / "model.safetensors")
    assert all(torch.equal(state[f"draft.{name}"], value) for name, value in exported.items())


PLANTED = """
import os
from hass_lightning.losses import LossTerm

class NanInTheSecondProcess(LossTerm):
    calls = 0

    def forward(self, rows):
        self.calls += 1
        value = rows.draft_features.square().mean(-1)
        return value * float("nan") if os.environ.get("LOCAL_RANK") == "1" and self.calls > 20 else value
"""


@pytest.mark.slow
def test_nan_in_one_rank_ends_all_ranks_with_its_cause(start_command, tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    words = (*ONLY_STEPS, "trainer=ddp_cpu", "+model.loss.terms.mine={_target_: planted.NanInTheSecondProcess}")
    result = tmp_path / "result.json"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = start_command("train", *words, env={"PYTHONPATH": path, "HASS_LIGHTNING_RESULT_FILE": str(result)})
    _, err = process.communicate(timeout=180)
    assert process.returncode not in (0, REQUEUE_EXIT_CODE)
    assert "error: the loss is not finite at step" in err, err[-3000:]
    assert "terms: mine/step" in json.loads(result.read_text())["error"]  # the error in the ledger


def by_torchrun(rank):
    """Two machines with one process each."""
    same = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}
    return same | {"RANK": rank, "GROUP_RANK": rank, "NODE_RANK": rank}


def by_srun(rank):
    """One machine with two tasks."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "x", "SLURM_STEP_ID": "0"}
    same = job | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    return same | {"SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}


@pytest.mark.slow
@pytest.mark.parametrize(("variables", "devices", "nodes"), [(by_torchrun, 1, 2), (by_srun, 2, 1)])
def test_externally_launched_ranks_write_one_result(start_command, variables, devices, nodes):
    """The global rank decides which process writes, whatever starts the ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    world = (f"trainer.devices={devices}", f"trainer.num_nodes={nodes}")
    words = (*SHORT, "trainer.max_steps=4", "trainer=ddp_cpu", *world)
    ranks = [start_command("train", *words, env=place | variables(rank)) for rank in "01"]
    outputs = [rank.communicate(timeout=180) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [sum(line.startswith("{") for line in out.splitlines()) for out, _ in outputs] == [1, 0]


@pytest.mark.slow
def test_zero_3_trains_and_exports_the_whole_head(run_command):
    pytest.importorskip("deepspeed")
    uneven = ("data.num_validation=5", "data.batch_size=1")  # three batches, and two processes that could deadlock
    done = run_command("train", *SHORT, "trainer.max_steps=4", "trainer=deepspeed_zero3", *uneven)
    assert done.code == 0, done.err[-3000:]
    folder = Path(json.loads(done.out.splitlines()[-1])["run_dir"])
    head = load_file(folder / "draft" / "model.safetensors")
    assert head["fc.weight"].shape == (64, 128) and head["fc.weight"].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "trainer"),
    [
        ("llama2_7b_chat", ()),
        ("llama2_13b_chat", ("trainer.precision=32-true",)),
        ("llama3_8b_instruct", ("trainer=deepspeed_zero2", "trainer.gradient_clip_algorithm=norm")),
        ("llama3_70b_instruct", ("model/loss=hass", "model.optimizer.lr=1.0e-5")),
    ],
)
def test_a_recipe_runs_with_the_tiny_target_to_the_end(run_command, tmp_path, recipe, trainer):
    pytest.importorskip("datasets")
    folder = tmp_path / "sharegpt"
    folder.mkdir()
    lines = [
        {
            "id": str(n),
            "conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "yes " * (n % 5 + 1)}],
        }
        for n in range(40)
    ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    words = (
        f"experiment=reproduce/{recipe}",
        *trainer,
        "target=tiny",
        f"data.source.path={folder}",
        "data.num_validation=4",
    )
    little = (
        "logger=csv",
        "trainer.max_steps=3",
        "callbacks.decoding.num_prompts=1",
        "callbacks.decoding.max_new_tokens=4",
    )
    done = run_command("train", *words, *little, "trainer.accelerator=cpu", "trainer.devices=2", timeout=180)
    assert done.code == 0, done.err[-3000:]
    assert json.loads(done.out.splitlines()[-1])["num_prompts"] == 1
