"""Compare a sweep in which every cell extracts its own features with one in which the cells share them.

python benchmarks/shared_features.py FOLDER [NUM_CELLS] [WORD ...]
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from hass_lightning.runs.ledger import Ledger

WORDS = [
    "data.max_answer_tokens=6000", "data.num_validation=8", "trainer.max_epochs=1", "trainer.val_check_interval=1.0",
    "callbacks.decoding=null", "optimized_metric=simulated_acceptance_length", "logger=csv",
    "trainer.enable_model_summary=false",
]  # fmt: skip


def sweep(folder, name, num_cells, words):
    """Run a sweep. Return its wall-clock and CPU seconds, and how many feature sets its cells reused."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = ["hass-train", "-m", f"study={name}", f"seed=range({num_cells})", "data.seed=0", *words]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cells = [Path(entry.folder) for entry in Ledger(folder / "runs" / "sweeps" / name).latest().values()]
    reused = sum(len(re.findall("reusing", (cell / "job.log").read_text())) for cell in cells)
    return {"wall": round(time.monotonic() - started, 1), "processor": round(processor, 1), "reused": reused}


def main(folder, num_cells=4, *words):
    folder = Path(folder).absolute()
    folder.mkdir(parents=True)
    os.environ |= {"HASS_LIGHTNING_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    words = [*WORDS, *words]
    num_cells = int(num_cells)
    subprocess.run(["hass-prepare", "data.max_answer_tokens=1", "data.num_validation=1", f"paths.cache_dir={folder}/t"],
                   cwd=folder, check=True, capture_output=True)  # fmt: skip
    for name in ("shared", *(f"own{cell}" for cell in range(num_cells))):  # each has the converted target
        subprocess.run(["cp", "-r", folder / "t", folder / name], check=True)
        subprocess.run(["rm", "-rf", folder / name / "features"], check=True)
    own = sweep(folder, "own", num_cells, [*words, f"paths.cache_dir={folder}/own${{seed}}"])
    shared = sweep(folder, "shared", num_cells, [*words, f"paths.cache_dir={folder}/shared"])
    ratios = {f"ratio_{key}": round(own[key] / shared[key], 2) for key in ("wall", "processor")}
    print(json.dumps({"cells": num_cells, "own": own, "shared": shared, **ratios}))


if __name__ == "__main__":
    main(*sys.argv[1:])
