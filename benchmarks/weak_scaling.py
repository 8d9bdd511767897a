"""Weak scaling: the same work a process with 1 and 2 processes, and the bytes each strategy sends in a step.

    python benchmarks/weak_scaling.py [--steps 24] [--strategies ddp_cpu deepspeed_zero1 deepspeed_zero2 …]

Every run trains the quickstart's head (SmolLM2-135M, depth 1 unless `--overrides` says otherwise) on 4 conversations a
process and step, one thread a process, in a network namespace of its own (`unshare -rn`), where nothing but its
processes talks, so that the kernel's counter of the loopback device counts exactly what they send to each other. Bytes
and seconds a step are differences of two lengths of run: start-up, checkpoint and the one validation drop out. The
features are extracted before, outside the namespace.
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
# /sys shows the devices of the namespace it was mounted in; /proc/net those of the reader
COUNTER = "awk '$1 == \"lo:\" {print $10}' /proc/net/dev"


def run(strategy: str, num_processes: int, steps: int, folder: Path, overrides: list[str]) -> tuple[int, float]:
    """(bytes sent over loopback, seconds of training) of one run."""
    words = [
        *OVERRIDES,
        *overrides,
        f"trainer={strategy}",
        f"trainer.devices={num_processes}",
        f"trainer.max_steps={steps}",
    ]
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


def measure(strategy: str, num_processes: int, steps: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Bytes and seconds a step."""
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
    parser.add_argument("--overrides", nargs="*", default=[], help="further words for hass-train")
    arguments = parser.parse_args()
    words = [word for word in (*OVERRIDES, *arguments.overrides) if word.startswith(("experiment", "data", "target"))]
    subprocess.run([sys.executable, "-m", "hass_lightning.prepare", *words], check=True, stdout=sys.stderr)
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
