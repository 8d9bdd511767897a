"""Processes of a run that wait for each other: what they say, when they give up, and who is named when one dies."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from hass_lightning.training.rendezvous import Rendezvous, seconds_of

SHORT = (
    "experiment=smoke", "logger=csv", "callbacks.decoding=null", "optimized_metric=simulated_acceptance_length",
    "data.source.num_questions=24", "data.source.num_validation=4", "data.num_validation=4", "data.batch_size=2",
    "trainer.max_epochs=null", "trainer.log_every_n_steps=1", "trainer=ddp_cpu", "trainer.devices=1",
    "trainer.num_nodes=2",
)  # fmt: skip


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def torchrun_variables(rank, port, host="127.0.0.1"):
    """Of two machines with one process each."""
    return {
        "MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "GROUP_RANK": str(rank), "NODE_RANK": str(rank),
    }  # fmt: skip


def test_a_duration_is_seconds_or_written_out():
    assert [seconds_of(each) for each in (300, 0.5, "00:00:05:00", {"minutes": 5})] == [300, 0.5, 300, 300]
    for wrong in ("5 minutes", True, None, [1], {"minuets": 5}, "1:2:3:x", float("nan")):
        with pytest.raises(TypeError):
            seconds_of(wrong)


def test_all_processes_meet_and_know_each_other():
    port, found = free_port(), {}

    def wait(rank):
        found[rank] = Rendezvous("127.0.0.1", port, rank, 3).wait(60)

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # the first process comes last
    for thread in threads:
        thread.join()
    here = f"process {os.getpid()} on {socket.gethostname()}"
    names = {rank: known for rank, (_, known) in found.items()}
    assert names == {rank: {0: here, 1: here, 2: here} for rank in range(3)}


@pytest.mark.parametrize(
    ("rank", "host", "problem"),
    [
        (1, "no.such.host.invalid", r"the address no\.such\.host\.invalid cannot be resolved"),
        (1, "127.0.0.1", "no process answers there"),
        (0, "127.0.0.1", "ranks 1, 2 did not come"),
    ],
)
def test_a_process_gives_up_with_address_port_and_rank(caplog, rank, host, problem):
    port, started = free_port(), time.monotonic()
    with (
        caplog.at_level("INFO"),
        pytest.raises(ConnectionError, match=f"rank {rank} of 3 .* at {host}, port {port}: {problem}"),
    ):
        Rendezvous(host, port, rank, 3).wait(2)
    assert time.monotonic() - started < 20
    assert f"rank {rank} of 3 on {socket.gethostname()} waits for" in caplog.text
    assert f"{host}, port {port} (at most 2 s)" in caplog.text


def test_a_port_that_is_taken_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"rank 0 of 2 .* port {port}: another program listens there"):
            Rendezvous("127.0.0.1", port, 0, 2).wait(60)


PEERS = """
import sys, time
from hass_lightning.training import peers
from hass_lightning.training.rendezvous import Rendezvous
peers.GRACE_SECONDS = 1.0
rank, port = map(int, sys.argv[1:])
store, names = Rendezvous("127.0.0.1", port, rank, 3).wait(60)
watched = peers.Peers.meet(store, rank, names, "127.0.0.1")
print("met", flush=True)
if sys.stdin.readline() == "leave\\n":
    watched.leave(in_peace=True)
    sys.exit(0)
"""


@pytest.fixture
def three():
    port = free_port()
    processes = [
        subprocess.Popen([sys.executable, "-c", PEERS, str(rank), str(port)], text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "met\n", process.communicate()
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("dead", [0, 2])
def test_a_killed_process_is_named_by_all_others(three, dead):
    three[dead].send_signal(signal.SIGKILL)
    for rank, process in enumerate(three):
        if rank != dead:
            assert process.wait(timeout=30) == 1
            expected = f"rank {dead} (process {three[dead].pid} on {socket.gethostname()}) of this run has died"
            assert expected in process.stderr.read()


def test_a_process_that_is_done_is_not_called_dead(three):
    for process in (three[1], three[0]):
        process.communicate("leave\n", timeout=30)
        assert process.returncode == 0
    time.sleep(2)
    assert three[2].poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_run_ends_soon_after_one_of_its_processes_and_names_it(start_command, tmp_path, dead):
    port = free_port()
    words = (*SHORT, "trainer.max_steps=100000", "trainer.val_check_interval=100000", "name=run")
    ranks = [
        start_command("train", *words, "callbacks.last_checkpoint.every_n_train_steps=5",
                      env=torchrun_variables(rank, port))
        for rank in range(2)
    ]  # fmt: skip
    end = time.monotonic() + 180
    while not list(tmp_path.glob("runs/run*/checkpoints/last.ckpt")):
        assert all(rank.poll() is None for rank in ranks) and time.monotonic() < end, [r.communicate() for r in ranks]
        time.sleep(0.1)
    ranks[dead].kill()
    started = time.monotonic()
    out, err = ranks[1 - dead].communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert ranks[1 - dead].returncode == 1
    named = f"rank {dead} (process {ranks[dead].pid} on {socket.gethostname()}) of this run has died"
    assert named in err.splitlines()[-1], err[-3000:]
    assert f"rank {1 - dead} of 2 on {socket.gethostname()} waits for" in out


@pytest.mark.slow
def test_a_run_that_cannot_resolve_its_first_process_says_so(start_command):
    environment = torchrun_variables(1, free_port(), host="no.such.host.invalid")
    words = (*SHORT, "trainer.max_steps=4", "trainer.rendezvous_timeout={seconds: 5}")
    process = start_command("train", *words, env=environment)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "rank 1 of 2 on" in err.splitlines()[-1] and "no.such.host.invalid cannot be resolved" in err, err[-3000:]
