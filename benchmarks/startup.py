"""Seconds until a command answers: `import hass_lightning`, `hass-train --help`, the first token of `hass-generate`.

    python benchmarks/startup.py                # medians of five
    python benchmarks/startup.py src ../old/src # interleaved for several checkouts

Each is a new process, with the files in the page cache (one run before the first measured one).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hass_lightning.runs.machine import processor_name

RUNS = 5
SOURCE = "import sys; sys.path.insert(0, {!r}); "
SCRIPT = "import importlib; importlib.import_module('hass_lightning.commands.scripts').{}()"  # as the console script
PROMPT = ("prompt=Why is the sky blue?", "max_new_tokens=4", "baseline_tokens=0")
COMMANDS = {
    "import hass_lightning": ("import hass_lightning", []),
    "hass-train --help": (SCRIPT.format("train"), ["--help"]),
    "hass-generate, first token": (SCRIPT.format("generate"), list(PROMPT)),
}


def seconds(code: str, words: list[str], source: str) -> float:
    """Seconds from the start of the process to its first output, or to its end without one."""
    command = [sys.executable, "-c", SOURCE.format(source) + code, *words]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    spent = time.perf_counter() - start
    process.stdout.read()
    if process.wait() != 0:
        raise SystemExit(f"{code} failed")
    return spent


def main() -> None:
    """Print a line for each command and checkout: median and range."""
    sources = [str(Path(source).resolve()) for source in sys.argv[1:] or ["src"]]
    print(f"{processor_name()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, (code, words) in COMMANDS.items():
        times: dict[str, list[float]] = {source: [] for source in sources}
        for run in range(RUNS + 1):
            for source in sources:
                spent = seconds(code, words, source)
                if run:
                    times[source].append(spent)
        for source, found in times.items():
            where = f" ({source})" if len(sources) > 1 else ""
            print(f"{name}{where}: {statistics.median(found):.2f} s [{min(found):.2f}, {max(found):.2f}]", flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
