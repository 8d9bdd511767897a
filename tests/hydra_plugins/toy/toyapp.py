"""A command for tests of the launcher: records that it ran, then waits, fails or returns a number."""

import json
import os
import time
from pathlib import Path

from hass_lightning.commands.command import command


@command("toy")
def main(config):
    ranks = {key: value for key, value in os.environ.items() if "RANK" in key or "WORLD" in key or "MASTER" in key}
    with open(os.environ["TOY_RUNS"], "a") as file:
        note = {"a": config.a, "b": config.b, "pid": os.getpid(), "ranks": ranks, "omp": os.environ["OMP_NUM_THREADS"]}
        file.write(json.dumps(note) + "\n")
    if f"{config.a}" in os.environ.get("TOY_MEMORY", "").split(","):
        much = [b"a" * 100_000_000]
        while sum(map(len, much)) < 3_000_000_000:
            much.append(b"a" * 100_000_000)
            time.sleep(0.2)
    sleep = 0 if f"{config.a}" in os.environ.get("TOY_QUICK", "").split(",") else config.sleep
    deadline = time.monotonic() + sleep
    while time.monotonic() < deadline and not Path(os.environ["TOY_RUNS"] + ".go").exists():
        time.sleep(0.05)
    if f"{config.a}" in os.environ.get("TOY_FAILS", "").split(","):
        raise ValueError(f"a is {config.a}")
    return {"_metric": 10 * config.a + config.b, "sum": config.a + config.b}


if __name__ == "__main__":
    main()
