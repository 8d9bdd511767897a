"""Jobs as processes: command line, environment, start and exit.

The module name starts with an underscore so that Hydra's plugin scan skips it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from hass_lightning.runs.files import read_json, read_tail
from hass_lightning.runs.lock import Held

_NOT_ITS_OWN = re.compile(r".*HYDRA_FULL_ERROR|srun: |slurmstepd")  # lines of a log that do not state the error
LOG_TAIL = 20_000  # bytes at the end of a job's log that are searched for an error
LEFTOVER_SECONDS = 5.0  # time for the other ranks to exit after the first, before they are killed

# Variables that torchrun, srun, Lightning or DeepSpeed set for a rank. A job that inherited them would behave as a rank
# of another process group.
_RANK_VARIABLES = re.compile(
    r"(LOCAL_|NODE_|GROUP_|ROLE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|CROSS_\w+|"
    r"PL_GLOBAL_SEED|SLURM_(NTASKS|PROCID|LOCALID)|HASS_LIGHTNING_RESULT_FILE|HASS_LIGHTNING_SWEEP"
)
# Overrides that control the sweep. The other hydra overrides (searchpath, verbose, job.env_set) are passed to the jobs.
_SWEEP_OVERRIDES = re.compile(r"[+~]*hydra[./](launcher|sweeper|sweep|mode|run)\b")


def quote(value: str | Path) -> str:
    """Quote a string for use as a Hydra override value."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def entry_point(task_function: Callable[..., Any]) -> list[str]:
    """Return the Python arguments that run the program of a task function: `-m module`, or the path of a script."""
    module = inspect.unwrap(task_function).__module__
    if module != "__main__":
        return ["-m", module]
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return ["-m", spec.name]
    return [os.path.abspath(str(main.__file__))]


def _resolved(override: str, job: DictConfig) -> str:
    """Return a hydra override with the value that its `${…}` has in the config of the job."""
    key, _, value = override.partition("=")
    if "${" not in value:
        return override
    with open_dict(probe := job.copy()):
        probe["_value"] = value
    found = OmegaConf.select(probe, "_value", throw_on_resolution_failure=False)
    return override if found is None else f"{key}={quote(str(found))}"


def job_command(
    config: DictConfig, job: DictConfig, entry: Sequence[str], overrides: Sequence[str], folder: Path, num: int
) -> list[str]:
    """Return the command line of one job.

    Args:
        config: the config of the multirun, with the `hydra` node.
        job: the config of the job, in which `${…}` of the other hydra overrides is resolved. Hydra itself resolves its
            node without the rest of the config.
        entry: the result of `entry_point`.
        overrides: the task overrides of the job.
        folder: the folder of the job.
        num: the number of the job in this launch.
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
    own: Any = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    command += [_resolved(str(override), job) for override in own if not _SWEEP_OVERRIDES.match(str(override))]
    return [*command, "hydra.mode=RUN", f"hydra.run.dir={quote(folder)}", f"hydra.job.num={num}"]


def job_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without the variables of a distributed rank, and with `extra`."""
    kept = {key: value for key, value in os.environ.items() if not _RANK_VARIABLES.fullmatch(key)}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


class JobProcess:
    """A running job: a process group that writes to `<folder>/job.log` and `<folder>/result.json`."""

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str], cwd: str, lock: Held) -> None:
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
                start_new_session=True,  # a process group that can be signalled and gets no Ctrl-C by itself
                pass_fds=lock.descriptors,  # the job locks its cell as long as it runs
            )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def poll(self) -> int | None:
        """Return the exit code, or None while the job runs. Kills processes that the job left in its group."""
        code = self._process.poll()
        if code is not None and self.send(0):
            deadline = time.monotonic() + LEFTOVER_SECONDS
            while self.send(0) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.send(signal.SIGKILL)
        return code

    def send(self, number: int) -> bool:
        """Send a signal to the process group. Return False if the group is empty."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
            return True
        return False

    def result(self) -> dict[str, Any]:
        """Return the job's result file; empty if there is none or it is unreadable."""
        return read_json(self.result_file)

    def output(self) -> str:
        """Return the last lines that the job has printed."""
        return read_tail(self.log_file, LOG_TAIL, self._log_start)

    def error(self, code: int) -> str:
        """Return the cause of a failure in one line: the job's error message, or the last line of its output."""
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        own = self.result().get("error")
        if not own:
            lines = [line.strip() for line in self.output().splitlines()]
            output = [line for line in lines if line and not _NOT_ITS_OWN.match(line)]
            own = output[-1][:500] if output else "no output"
        return f"{own} ({ended})"


def outcome(result: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a ledger entry from a job's result file, which `commands.errors.write_result` wrote."""
    content = result.get("result") or {}
    return {"metric": result.get("metric"), "data": content.get("data_hash"), "result": content}
