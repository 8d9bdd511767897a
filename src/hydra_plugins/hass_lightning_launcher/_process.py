"""One job as a process: its command, its environment, its start and its end.

(Hydra's plugin scan skips modules whose name starts with an underscore.)
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

LEFTOVER_SECONDS = 5.0  # other ranks end a moment after the first; then they are killed

# What torchrun, srun, Lightning or DeepSpeed leave in the environment of a rank. A job that inherits them believes it
# is a rank of somebody else's process group.
_RANK_VARIABLES = re.compile(
    r"(LOCAL_|NODE_|GROUP_|ROLE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|CROSS_\w+|"
    r"PL_GLOBAL_SEED|SLURM_(NTASKS|PROCID|LOCALID)|HASS_LIGHTNING_RESULT_FILE|HASS_LIGHTNING_SWEEP"
)
# Overrides that steer the sweep itself. The other hydra overrides (searchpath, verbose, job.env_set) are for the jobs.
_SWEEP_OVERRIDES = re.compile(r"[+~]*hydra[./](launcher|sweeper|sweep|mode|run)\b")


def quote(value: str | Path) -> str:
    """A string as a Hydra override value."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def entry_point(task_function: Callable[..., Any]) -> list[str]:
    """How to start the program of a task function: `-m module`, or the path of a script."""
    module = inspect.unwrap(task_function).__module__
    if module != "__main__":
        return ["-m", module]
    main = sys.modules["__main__"]
    if getattr(main, "__spec__", None) is not None:
        return ["-m", main.__spec__.name]
    return [os.path.abspath(str(main.__file__))]


def job_command(
    config: DictConfig, entry: Sequence[str], overrides: Sequence[str], folder: Path, num: int
) -> list[str]:
    """The command line of one job.

    Args:
        config: the config of the multirun, with the `hydra` node.
        entry: what `entry_point` found.
        overrides: the job's own task overrides.
        folder: where the job writes.
        num: its number in this launch.
    """
    hydra = config.hydra
    command = [sys.executable, *entry]
    if hydra.job.config_name is not None:
        command += ["--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        flag = {"main": "--config-path", "command-line": "--config-dir"}.get(source.provider)
        if flag and source.path:
            is_file = source.schema == "file"
            command += [flag, os.path.abspath(source.path) if is_file else f"{source.schema}://{source.path}"]
    command += overrides
    command += [override for override in hydra.overrides.hydra if not _SWEEP_OVERRIDES.match(override)]
    return [*command, "hydra.mode=RUN", f"hydra.run.dir={quote(folder)}", f"hydra.job.num={num}"]


def job_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without the marks of a distributed rank, and with `extra`."""
    kept = {key: value for key, value in os.environ.items() if not _RANK_VARIABLES.fullmatch(key)}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


class JobProcess:
    """A started job: a process group that writes to `<folder>/job.log` and answers in `<folder>/result.json`."""

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str], cwd: str, lock: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock
        self.log_file = folder / "job.log"
        self.result_file = folder / "result.json"
        self.result_file.unlink(missing_ok=True)
        self.started = time.monotonic()
        with open(self.log_file, "ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=dict(env),
                start_new_session=True,  # a group to signal as a whole, and no Ctrl-C past the launcher
                pass_fds=[lock],  # the job holds its cell as long as it lives
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """The exit code once the job is over. What it left in its group (ranks that hang) is killed then."""
        code = self._process.poll()
        if code is not None and self.send(0):
            deadline = time.monotonic() + LEFTOVER_SECONDS
            while self.send(0) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.send(signal.SIGKILL)
        return code

    def send(self, number: int) -> bool:
        """Signal the whole group; False if nobody is left in it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
            return True
        return False

    def result(self) -> dict[str, Any]:
        """What the job wrote about itself; empty if it wrote nothing readable."""
        return read_result(self.result_file)

    def error(self, code: int) -> str:
        """Why it failed, in one line: its own words, else the last line of its output, else its exit code."""
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        own = self.result().get("error")
        if not own:
            with open(self.log_file, "rb") as file:
                file.seek(max(self._log_start, self.log_file.stat().st_size - 20_000))
                lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
            said = [line for line in lines if line and "HYDRA_FULL_ERROR" not in line]
            own = said[-1][:500] if said else "no output"
        return f"{own} ({ended})"


def read_result(path: Path) -> dict[str, Any]:
    """A job's result file (`cli.command` writes it); empty if there is none, or half of one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
