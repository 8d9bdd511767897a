"""Sweeps of the toy command (tests/hydra_plugins/toy) on a SLURM."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from hass_lightning.runs.config import config_folder
from hass_lightning.runs.ledger import Ledger

TOY = Path(__file__).parents[1] / "hydra_plugins" / "toy"


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)
    return found


class Sweep:
    """A sweep of the toy command (tests/hydra_plugins/toy) with hydra/launcher=slurm."""

    def __init__(self, folder):
        self.folder, self.runs_file = folder, folder / "runs.jsonl"

    def start(self, *words, **env):
        command = [sys.executable, "-m", "toyapp", "--config-path", str(TOY / "conf"), "-m", *words]
        command += [f"hydra.searchpath=[file://{config_folder()}]", "hydra/launcher=slurm"]
        command += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.poll_seconds=0.5"]
        env = {"PYTHONPATH": str(TOY), "OMP_NUM_THREADS": "1", "TOY_RUNS": str(self.runs_file), **env}
        return subprocess.Popen(command, cwd=self.folder, env={**os.environ, **env}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def run(self, *words, code=0, **env):
        process = self.start(*words, **env)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        last = output.splitlines()[-1]
        return SimpleNamespace(out=output, result=json.loads(last) if last.startswith("{") else {})

    def submit(self, *words, **env):
        return self.run(*words, "hydra.launcher.wait=false", **env)

    def started(self):
        """`a` of every start of the command."""
        return (
            [json.loads(line)["a"] for line in self.runs_file.read_text().splitlines()]
            if self.runs_file.exists()
            else []
        )

    def ledger(self):
        (folder,) = (self.folder / "runs" / "sweeps").iterdir()
        return Ledger(folder)

    def entry(self, a):
        """The last entry of the cell with this `a`."""
        return next(entry for entry in self.ledger().latest().values() if f"a={a}" in entry.overrides)

    def go(self):
        """End the sleep of all cells."""
        Path(f"{self.runs_file}.go").touch()
