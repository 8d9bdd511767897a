# ruff: noqa: E402
"""Fixtures for all tests: one torch thread, no network, a separate cache, the tiny target, commands as processes."""

import os

# before torch, transformers and wandb are imported, which read these once
os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
)
for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HASS_LIGHTNING_ROOT"):
    os.environ.pop(name, None)

import logging
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from command_environment import command_environment

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """The cache folder of this session: nothing is read from or written to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASS_LIGHTNING_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def same_environment():
    """Restores the environment after each test, whatever the test or a library (seed_everything) sets."""
    before = dict(os.environ)
    yield
    for key in set(os.environ) - set(before) - {"PYTEST_CURRENT_TEST"}:
        del os.environ[key]
    os.environ.update({key: value for key, value in before.items() if key != "PYTEST_CURRENT_TEST"})
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(cache_dir):
    """The target of conf/target/tiny.yaml. It is shared and must not be changed."""
    from hass_lightning.target_model import TargetModel
    from hass_lightning.target_model.tiny import tiny_llama

    return TargetModel.load(tiny_llama(seed=0), "tiny", dtype="float32", attn_implementation="sdpa")


@pytest.fixture
def silent_server():
    """The address of a loopback server that accepts connections and never replies."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def start_command(tmp_path, cache_dir):
    """Start `python -m hass_lightning.commands.<command> …` in tmp_path; running processes are stopped at the end."""
    started = []

    def start(command, *overrides, env=None, cwd=None):
        process = subprocess.Popen(
            [sys.executable, "-m", f"hass_lightning.commands.{command}", *overrides],
            cwd=cwd or tmp_path,
            env=command_environment(tmp_path, cache_dir, **(env or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate()


@pytest.fixture
def run_command(start_command):
    """Run a command as a process until it ends: .code, .out, .err."""

    def run(command, *overrides, timeout=600, **options):
        process = start_command(command, *overrides, **options)
        out, err = process.communicate(timeout=timeout)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    return run


@pytest.fixture
def call_command(tmp_path, monkeypatch, capfd):
    """Call a command inside this process (saves several seconds of imports): .code, .out, .err."""
    import importlib

    from hydra.core.global_hydra import GlobalHydra

    def call(command, *overrides):
        main = importlib.import_module(f"hass_lightning.commands.{command}").main
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HASS_LIGHTNING_ROOT", str(tmp_path))
        monkeypatch.setattr(sys, "argv", [f"hass-{command}", *overrides])
        # Lightning's handler still uses an earlier test's stderr
        monkeypatch.setattr(logging, "raiseExceptions", False)
        GlobalHydra.instance().clear()
        capfd.readouterr()
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        finally:
            for handler in set(root.handlers) - set(handlers):
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
            GlobalHydra.instance().clear()
        captured = capfd.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call
