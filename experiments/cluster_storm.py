"""A sweep under random scancel, lost nodes and preemption, compared with an undisturbed one (experiments/cluster.md).

eval "$(tests/slurm/start_slurm.sh | tail -n 1)"
python experiments/cluster_storm.py FOLDER [NUM_SEEDS] --calm
python experiments/cluster_storm.py FOLDER [NUM_SEEDS] [SEED]

Four cells for each of the NUM_SEEDS seeds. The same command continues after an interruption.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from hass_lightning.runs.ledger import Ledger

WORDS = [
    "experiment=smoke", "callbacks.decoding=null", "optimized_metric=simulated_acceptance_length", "logger=csv",
    "data.source.num_questions=24", "data.source.num_validation=4", "data.num_validation=4", "data.batch_size=2",
    "trainer.max_epochs=null", "trainer.max_steps=20", "trainer.val_check_interval=20",
    "trainer.enable_model_summary=false", "callbacks.last_checkpoint.every_n_train_steps=2",
]  # fmt: skip
GRID = {"model/loss": "eagle,hass", "model.alignment.depth": "1,2"}  # and seeds
STORM = ["study=storm", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.max_concurrent=2",
         "hydra.launcher.wait=false"]  # fmt: skip
SECONDS_BETWEEN = (60.0, 150.0)  # two disturbances, with cells that take minutes on a busy machine
KINDS = ("scancel", "USR1", "slurmd", "scancel", "USR1", "power")  # of disturbances, repeated
DOWN_SECONDS = 45.0  # until a killed slurmd is started again
AGAIN_SECONDS = 1500.0  # the same command is started again at the latest


def say(*words):
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def slurm(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def processes_of(node):
    """The slurmstepd of all jobs on a node, then the processes that they started."""
    parents, tasks = set(), set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(line.partition("=")[::2] for line in (folder / "environ").read_text().split("\0"))
            if variables.get("SLURMD_NODENAME") != node or variables.get("SLURM_CONF") != os.environ["SLURM_CONF"]:
                continue
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if (Path("/proc") / parent / "comm").read_text().startswith("slurmstepd"):
                parents.add(int(parent))
            tasks.add(int(folder.name))
        except (OSError, UnicodeDecodeError):  # it has ended
            continue
    return [*parents, *(tasks - parents)]


class Storm:
    def __init__(self, num_seeds, folder, seed):
        self.num_cells, self.num_seeds, self.folder, self.random = 4 * num_seeds, num_seeds, folder, random.Random(seed)
        self.spool = Path(os.environ["SLURM_CONF"]).parent
        self.log = folder / "disturbances.jsonl"
        self.down = None  # (node, when it is started again)

    def disturbances(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def launch(self):
        """Start the sweep's command; what it ends with."""
        words = [*WORDS, f"data.source.output_dir={self.folder}/corpus", f"seed=range({self.num_seeds})"]
        words += [f"{key}={values}" for key, values in GRID.items()]
        done = subprocess.run(
            ["hass-train", "-m", *words, *STORM], cwd=self.folder, capture_output=True, text=True, check=False
        )
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else sys.exit(done.stderr[-3000:])

    def disturb(self, number):
        jobs = slurm("squeue", "-h", "-r", "--name=storm", "-o%i")
        running = slurm("squeue", "-h", "-r", "--name=storm", "-tR", "-o%i")
        kind = KINDS[number % len(KINDS)]
        if kind == "scancel" and running:
            target = self.random.choice([*running, *self.random.sample(jobs, min(2, len(jobs)))])
            slurm("scancel", target)
        elif kind == "USR1" and running:
            target = self.random.choice(running)
            slurm("scancel", "--signal=USR1", target)
        elif kind in ("slurmd", "power") and running and not self.down:
            target = self.random.choice(slurm("squeue", "-h", "--name=storm", "-tR", "-o%N"))
            os.kill(int((self.spool / "run" / f"{target}.pid").read_text()), signal.SIGKILL)
            for process in processes_of(target) if kind == "power" else ():
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.down = (target, time.monotonic() + DOWN_SECONDS)
        else:
            return
        say(kind, target)
        with open(self.log, "a") as file:
            file.write(json.dumps({"kind": kind, "target": target, "time": time.time()}) + "\n")

    def tend(self):
        """Start a killed slurmd again."""
        if self.down and time.monotonic() > self.down[1]:
            subprocess.run(["slurmd", "-N", self.down[0]], check=True)
            say("slurmd", self.down[0], "again")
            self.down = None

    def run(self, num_disturbances):
        next_disturbance = time.monotonic() + 20
        asked_again = time.monotonic() + AGAIN_SECONDS
        while True:
            if time.monotonic() > asked_again or not slurm("squeue", "-h", "--name=storm", "-o%i"):
                found = self.launch()
                say(found)
                asked_again = time.monotonic() + AGAIN_SECONDS
                if found["num_completed"] == self.num_cells and not self.down:
                    break
            self.tend()
            number = len(self.disturbances())
            if number < num_disturbances and time.monotonic() > next_disturbance:
                self.disturb(number)
                next_disturbance = time.monotonic() + self.random.uniform(*SECONDS_BETWEEN)
            time.sleep(1)

    def report(self):
        ledger = Ledger(self.folder / "runs" / "sweeps" / "storm")
        found = {point(entry): Path(entry.folder) for entry in ledger.latest().values() if entry.status == "completed"}
        entries = ledger.entries()
        completed = Counter(entry.cell for entry in entries if entry.status == "completed")
        logs = [(folder / "job.log").read_text() for folder in found.values()]
        trained = [log.count('"run_dir"') - log.count(" is finished") for log in logs]  # else it prints its result
        errors = Counter((entry.error or "").split(" (")[0] for entry in entries if entry.status == "failed")
        resumed = sum("resuming from" in log for log in logs)
        print(json.dumps({
            "cells": self.num_cells, "disturbances": Counter(each["kind"] for each in self.disturbances()),
            "entries": Counter(entry.status for entry in entries), "called": errors, "resumed": resumed,
            "lost": self.num_cells - len(found),
            "completed_twice": sum(number > 1 for number in completed.values()),
            "trained_twice": sum(number > 1 for number in trained),
            "equal": sum(head(self.folder / "calm" / name_of(key)) == head(folder) for key, folder in found.items()),
        }, indent=1))  # fmt: skip


def point(entry):
    """The point of the grid that a cell is."""
    return tuple(sorted(word for word in entry.overrides if word.split("=")[0] in ("seed", *GRID)))


def name_of(key):
    return ",".join(word.split("/")[-1] for word in key)


def run_undisturbed(folder, num_seeds):
    """Every cell by itself, one after the other, in forks of this process: the package is imported only once."""
    importlib.import_module("hass_lightning.commands.train")  # before the forks
    train = importlib.import_module("hass_lightning.commands.scripts").train
    choices = [[f"{name}={value}" for value in values.split(",")] for name, values in GRID.items()]
    for key in itertools.product(*choices, [f"seed={seed}" for seed in range(num_seeds)]):
        run_dir = folder / "calm" / name_of(sorted(key))
        process = os.fork()
        if process == 0:
            quoted = f"hydra.run.dir='{run_dir}'"
            sys.argv = ["hass-train", *WORDS, f"data.source.output_dir={folder}/corpus", *key, quoted]
            sys.exit(train())
        if os.waitpid(process, 0)[1] or not head(run_dir):
            sys.exit(f"{run_dir} has failed")
        say(run_dir.name)


def head(folder):
    return (folder / "draft" / "model.safetensors").read_bytes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_seeds", type=int, nargs="?", default=10)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--calm", action="store_true", help="the same cells, undisturbed; may run meanwhile")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HASS_LIGHTNING_ROOT": str(folder), "HASS_LIGHTNING_CACHE": str(folder / "cache")}
    storm = Storm(args.num_seeds, folder, args.seed)
    if args.calm:
        run_undisturbed(folder, args.num_seeds)
    else:
        storm.run(num_disturbances=2 * args.num_seeds)
        storm.report()
