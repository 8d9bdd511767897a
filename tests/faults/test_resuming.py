"""An interrupted run resumes where it was: its own checkpoint, every signal, one process per folder, one layout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hass_lightning.runs.ledger import REQUEUE_EXIT_CODE
from hass_lightning.runs.lock import only_one_here
from hass_lightning.training.resume import Layout, given_checkpoint, refuse_other_layout

LONG = ("trainer.max_steps=2000", "trainer.max_epochs=null", "callbacks.last_checkpoint.every_n_train_steps=5")


def wait_for(found, process, seconds=240):
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def checkpoint_of(result):
    return Path(result["run_dir"]) / "checkpoints" / "last.ckpt"


# --- which checkpoint ------------------------------------------------------------------------------------------------


def test_own_checkpoint_takes_precedence_over_ckpt_path(train):
    given = checkpoint_of(train().result)
    words = ("name=cont", f"ckpt_path={given}", "trainer.max_steps=6")
    first = train(*words)
    assert f"resuming from {given}" in first.out
    run = Path(first.result["run_dir"])
    for name in ("metrics.json", "trained"):
        (run / name).unlink()
    second = train(*words)
    assert f"resuming from {checkpoint_of(first.result)}" in second.out
    assert second.result["data_hash"] == first.result["data_hash"]


def test_ckpt_path_accepts_a_run_folder(train):
    run = Path(train().result["run_dir"])
    last = str(run / "checkpoints" / "last.ckpt")
    assert given_checkpoint(str(run)) == given_checkpoint(str(run / "checkpoints")) == given_checkpoint(last) == last
    assert given_checkpoint(None) is None


@pytest.mark.parametrize("value", ["best", "last", "nothing.ckpt", "text.ckpt", "empty"])
def test_invalid_ckpt_path_is_refused_at_the_start(train, tmp_path, value):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    done = train(f"ckpt_path={value}")
    assert done.code == 1
    assert f"ckpt_path={value}" in done.error and "last.ckpt" in done.error
    assert "Loading weights" not in done.err


# --- another layout --------------------------------------------------------------------------------------------------


def deepspeed(stage=2, devices=2, precision="32-true"):
    strategy = {"_target_": "hass_lightning.training.strategy.CPUDeepSpeedStrategy", "stage": stage}
    return {"strategy": strategy, "devices": devices, "num_nodes": 1, "precision": precision}


SINGLE = {"strategy": "auto", "devices": 1, "num_nodes": 1, "precision": "32-true"}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder as DeepSpeed writes it on two processes."""
    last = tmp_path / "runs" / "z2" / "checkpoints" / "last.ckpt"
    (last / "checkpoint").mkdir(parents=True)
    (last / "latest").write_text("checkpoint")
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states", "zero_pp_rank_1_mp_rank_00_optim_states"):
        torch.save({}, last / "checkpoint" / f"{name}.pt")
    return last


OTHERS = {
    "one process": deepspeed(devices=1), "stage 3": deepspeed(stage=3), "stage 0": deepspeed(stage=0),
    "bf16": deepspeed(precision="bf16-mixed"), "ddp": SINGLE | {"strategy": "ddp", "devices": 2}, "single": SINGLE,
}  # fmt: skip


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_deepspeed_checkpoint_of_another_layout_is_refused_with_an_alternative(folder, settings):
    Layout.of_run(deepspeed()).write(folder)
    refuse_other_layout(str(folder), deepspeed())
    with pytest.raises(ValueError, match="another layout") as refused:
        refuse_other_layout(str(folder), settings)
    sentence = str(refused.value)
    assert str(folder) in sentence and "stage 2 on 2 process(es)" in sentence
    assert f"ckpt_path=null init_from={folder.parents[1]}" in sentence


def test_layout_is_inferred_from_file_names(folder):
    refuse_other_layout(str(folder), deepspeed(stage=3))  # stage and precision are unknown
    with pytest.raises(ValueError, match=r"on 2 process\(es\)"):
        refuse_other_layout(str(folder), deepspeed(devices=1))


def test_a_single_file_is_read_by_any_number_of_processes_but_not_by_deepspeed(tmp_path):
    file = tmp_path / "last.ckpt"
    torch.save({}, file)
    for settings in (SINGLE, SINGLE | {"strategy": "ddp", "devices": 4}):
        refuse_other_layout(str(file), settings)
    with pytest.raises(ValueError, match="one file"):
        refuse_other_layout(str(file), deepspeed())


@pytest.mark.slow
def test_deepspeed_run_resumes_and_is_refused_with_another_layout(run_command, short_run):
    pytest.importorskip("deepspeed")
    two = ("trainer=deepspeed_zero2", "data.batch_size=2", "trainer.precision=32-true")
    first = run_command("train", *short_run, *two, "name=z2")
    assert first.code == 0, first.err[-3000:]
    last = checkpoint_of(json.loads(first.out.splitlines()[-1]))
    assert json.loads((last / "layout.json").read_text()) == {"processes": 2, "stage": 2, "precision": "32-true"}
    more = run_command("train", *short_run, *two, "name=more", f"ckpt_path={last}", "trainer.max_steps=6")
    assert more.code == 0, more.err[-3000:]
    one = run_command("train", *short_run, "name=one", f"ckpt_path={last}", "trainer.max_steps=6")
    assert one.code == 1 and "another layout" in one.err and "Traceback" not in one.err
    words = ("name=new", f"init_from={last.parents[1]}")  # as the message says
    assert run_command("train", *short_run, *words).code == 0


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers",
    [("SIGTERM",), ("SIGUSR1",), ("SIGHUP",), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")],
    ids=" then ".join,
)
def test_every_preemption_signal_saves_and_requests_a_restart(start_command, short_run, tmp_path, numbers):
    process = start_command("train", *short_run, *LONG, "name=stopped")
    wait_for(lambda: list(tmp_path.glob("runs/stopped*/checkpoints/last.ckpt")), process)
    for name in numbers:
        os.kill(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=120)
    assert process.returncode == REQUEUE_EXIT_CODE, err
    (last,) = tmp_path.glob("runs/stopped*/checkpoints/last.ckpt")
    step = torch.load(last, weights_only=True)["global_step"]
    assert step >= 5
    assert f"{numbers[0]}: this step is finished and saved first" in out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("stuck", [False, True])
def test_signal_ends_any_stage_even_inside_a_library_call(name, stuck):
    program = f"""
import ctypes, time
from hass_lightning.runs import signals
signals.STUCK_SECONDS = 0.5
def block():  # as a rendezvous does: C goes on waiting after a signal
    mutex = ctypes.create_string_buffer(64)
    lib = ctypes.CDLL(None)
    lib.pthread_mutex_init(mutex, None)
    lib.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    lib.pthread_mutex_lock(mutex)
with signals.preemptible():
    if {stuck}:
        block()
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=20) == REQUEUE_EXIT_CODE


# --- two at once -----------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from hass_lightning.runs.lock import only_one_here
with only_one_here(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_second_start_waits_and_names_the_process(tmp_path, caplog):
    first = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, "3"], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with only_one_here(tmp_path):
        assert first.wait(timeout=20) == 0
    assert f"process {first.pid} on {os.uname().nodename}" in caplog.text and str(tmp_path) in caplog.text


def test_lock_of_a_killed_process_is_released(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, "600"], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    began = time.monotonic()
    with only_one_here(tmp_path):
        assert time.monotonic() - began < 5


@pytest.mark.slow
def test_the_same_run_started_twice_trains_once(start_command, short_run):
    words = (*short_run, "name=same", "trainer.max_steps=30", "trainer.max_epochs=null")
    both = [start_command("train", *words) for _ in range(2)]
    ended = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    results = [out.splitlines()[-1] for out, _ in ended]
    assert results[0] == results[1]
    waited = [out for out, _ in ended if "waiting for its end" in out]
    assert len(waited) == 1 and "is finished: its result follows" in waited[0]
