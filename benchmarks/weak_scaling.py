"""Weak scaling: the same work a process with 1 and 2 processes, and the bytes each strategy sends in a step.

    python benchmarks/weak_scaling.py [--steps 40] [--strategies ddp_cpu deepspeed_zero1 deepspeed_zero2 …]

Every run is `hass-train experiment=smoke` with 4 conversations a process and step, in a network namespace of its own
(`unshare -rn`), where nothing but its processes talks, so that the kernel's counter of the loopback device counts
exactly what they send to each other. Bytes a step: the difference of two lengths of run, so that start-up, checkpoints
and validation drop out; the same for seconds a step.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OVERRIDES = (
    "experiment=smoke", "logger=csv", "callbacks.decoding=null", "data.batch_size=4", "trainer.max_epochs=null",
    "trainer.log_every_n_steps=1", "callbacks.progress=null",
)  # fmt: skip
COUNTER = "cat /sys/class/net/lo/statistics/tx_bytes"


def run(strategy: str, num_processes: int, steps: int, folder: Path) -> tuple[int, float]:
    """(bytes sent over loopback, seconds of training) of one run."""
    words = [*OVERRIDES, f"trainer={strategy}", f"trainer.devices={num_processes}", f"trainer.max_steps={steps}"]
    words += [f"trainer.val_check_interval={steps}", f"name={strategy}-{num_processes}-{steps}"]
    command = " ".join(f"'{word}'" for word in [sys.executable, "-m", "hass_lightning.train", *words])
    script = f"ip link set lo up; {command} >&2; {COUNTER}"
    environment = os.environ | {"HASS_LIGHTNING_ROOT": str(folder), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        ["unshare", "-rn", "bash", "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    (run_dir,) = (folder / "runs").glob(f"{strategy}-{num_processes}-{steps}*")
    if not (run_dir / "trained").exists():
        raise RuntimeError(done.stderr[-3000:])
    return int(done.stdout.split()[-1]), json.loads((run_dir / "train_seconds.json").read_text())["train_seconds"]


def measure(strategy: str, num_processes: int, steps: int, folder: Path) -> dict[str, float]:
    """Bytes and seconds a step."""
    short, long = (run(strategy, num_processes, number, folder) for number in (steps // 4, steps))
    number = steps - steps // 4
    return {
        "strategy": strategy, "num_processes": num_processes, "bytes_a_step": (long[0] - short[0]) / number,
        "seconds_a_step": (long[1] - short[1]) / number,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--strategies", nargs="+", default=["ddp_cpu", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"]
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [measure("cpu", 1, arguments.steps, folder)]
        rows += [measure(strategy, 2, arguments.steps, folder) for strategy in arguments.strategies]
    for row in rows:
        row["efficiency"] = rows[0]["seconds_a_step"] / row["seconds_a_step"]
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
