"""Weak scaling with 1 and 2 processes, and the bytes that each strategy sends per step.

    python benchmarks/weak_scaling.py [--steps 24] [--strategies ddp_cpu deepspeed_zero1 deepspeed_zero2 …]

Every run trains the quickstart's head (SmolLM2-135M, depth 1 unless `--overrides` changes it) on 4 conversations per
process and step, with one thread per process. It runs in a separate network namespace (`unshare -rn`), so that the
kernel's counter of the loopback device counts only the traffic between its processes. Bytes and seconds per step are
differences between a long and a short run, which removes start-up, checkpoint and validation. Features are extracted
before, outside of the namespace.
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
    "experiment=quickstart", "logger=csv", "callbacks.decoding=null", "callbacks.progress=null", "data.batch_size=4",
    "data.max_answer_tokens=24000", "data.num_validation=8", "model.alignment.depth=1", "model.draft.start=random",
    "trainer.max_epochs=null",
)  # fmt: skip
# /sys shows the devices of the namespace in which it was mounted, /proc/net those of the reading process
COUNTER = "awk '$1 == \"lo:\" {print $10}' /proc/net/dev"


def run(strategy: str, num_processes: int, steps: int, folder: Path, overrides: list[str]) -> tuple[int, float]:
    """Return (bytes sent over loopback, seconds of training) of one run."""
    own_overrides = [
        *OVERRIDES,
        *overrides,
        f"trainer={strategy}",
        f"trainer.devices={num_processes}",
        f"trainer.max_steps={steps}",
    ]
    own_overrides += [f"trainer.val_check_interval={steps}", f"name={strategy}-{num_processes}-{steps}"]
    command = " ".join(f"'{part}'" for part in [sys.executable, "-m", "hass_lightning.commands.train", *own_overrides])
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


def measure(strategy: str, num_processes: int, steps: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Measure bytes and seconds per step."""
    short, long = (run(strategy, num_processes, number, folder, overrides) for number in (steps // 4, steps))
    number = steps - steps // 4
    return {
        "strategy": strategy, "num_processes": num_processes, "bytes_a_step": (long[0] - short[0]) / number,
        "seconds_a_step": (long[1] - short[1]) / number,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument(
        "--strategies", nargs="+", default=["ddp_cpu", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"]
    )
    parser.add_argument("--overrides", nargs="*", default=[], help="further overrides for hass-train")
    arguments = parser.parse_args()
    kept = [each for each in (*OVERRIDES, *arguments.overrides) if each.startswith(("experiment", "data", "target"))]
    subprocess.run([sys.executable, "-m", "hass_lightning.commands.prepare", *kept], check=True, stdout=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        common = (arguments.steps, Path(name), arguments.overrides)
        rows = [measure("cpu", 1, *common)]
        rows += [measure(strategy, 2, *common) for strategy in arguments.strategies]
    for row in rows:
        row["efficiency"] = rows[0]["seconds_a_step"] / row["seconds_a_step"]
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
