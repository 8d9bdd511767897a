"""What a forward over a few tokens costs: the library's kernel against `target/linear.py`, interleaved in one process.

    python benchmarks/few_rows.py [--threads 2] [--repeats 15]

Prints a table (medians) and one line of JSON: by number of tokens, milliseconds of both and what the tokens cost in
forwards of one token. The target is the quickstart's in fp32.
"""

import argparse
import json
import random
from statistics import median
from time import perf_counter

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from hass_lightning.cli import config_folder
from hass_lightning.target import TargetModel, linear

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 60)
PROMPT = 200


def seconds(target: TargetModel, cache, num_tokens: int, most_rows: int) -> float:
    """One forward of `num_tokens` on top of the prompt, with the LM head; `most_rows` 0: the library's kernel."""
    linear.MOST_ROWS = most_rows
    token_ids = torch.randint(0, 40_000, (1, num_tokens))
    mask = torch.ones(1, 1, num_tokens, PROMPT + num_tokens, dtype=torch.bool)
    mask[..., PROMPT:] = torch.ones(num_tokens, num_tokens).tril().bool()
    positions = torch.arange(PROMPT, PROMPT + num_tokens)[None]
    start = perf_counter()
    features = target.forward(token_ids, cache, positions, mask)
    target.head.logits(features[0]).max(-1)
    return perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with initialize_config_dir(config_folder(), version_base="1.3"):
        target = instantiate(compose("train", overrides=["target.dtype=float32"]).target)
    cache = target.new_cache(1, PROMPT + max(SIZES))
    target.forward(torch.arange(100, 100 + PROMPT)[None], cache)
    cache.advance(PROMPT)
    most_rows = linear.MOST_ROWS
    times: dict[tuple[int, bool], list[float]] = {(size, ours): [] for size in SIZES for ours in (False, True)}
    for number in range(arguments.repeats + 1):
        order = list(times)
        random.Random(number).shuffle(order)
        for size, ours in order:
            spent = seconds(target, cache, size, most_rows if ours else 0)
            if number > 0:  # the first round warms up
                times[size, ours].append(spent)
    milliseconds = {key: 1000 * median(values) for key, values in times.items()}
    table = Table("tokens", "library ms", "few rows ms", "ratio", "cost in single tokens")
    rows = []
    for size in SIZES:
        library, ours = milliseconds[size, False], milliseconds[size, True]
        row = {"tokens": size, "library_ms": library, "few_rows_ms": ours, "ratio": library / ours}
        row["cost"] = ours / milliseconds[1, True]
        rows.append({key: round(value, 3) for key, value in row.items()})
        table.add_row(str(size), *(f"{row[key]:.2f}" for key in ("library_ms", "few_rows_ms", "ratio", "cost")))
    Console().print(table)
    capability = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"cpu_capability": capability, "threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
