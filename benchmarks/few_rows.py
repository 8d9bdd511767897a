"""Time of a forward over few tokens: PyTorch's kernels against the packed weights of `target.packed=auto`.

    python benchmarks/few_rows.py [--threads 2] [--repeats 15] [--dtype float32 bfloat16]

Two copies of the quickstart's target run interleaved in one process. Prints a table per dtype (medians) and one line of
JSON: for each number of tokens, milliseconds of both, and the cost relative to a forward of one token.
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

from hass_lightning.runs.config import config_folder
from hass_lightning.target_model import TargetModel

SIZES = (1, 2, 4, 8, 16, 32, 60)
PROMPT = 200
MODES = ("false", "auto")


class Side:
    """A target with a cached prompt."""

    def __init__(self, dtype: str, mode: str):
        with initialize_config_dir(config_folder(), version_base="1.3"):
            overrides = [f"target.dtype={dtype}", f"target.packed={mode}"]
            self.target: TargetModel = instantiate(compose("train", overrides=overrides).target)
        self.cache = self.target.new_cache(1, PROMPT + max(SIZES))
        self.target.forward(torch.arange(100, 100 + PROMPT)[None], self.cache)
        self.cache.advance(PROMPT)

    def seconds(self, token_ids: torch.Tensor) -> tuple[float, float, torch.Tensor]:
        """Time a forward of `token_ids` [1, N] after the prompt: seconds of layers and LM head; returns also logits."""
        count = token_ids.shape[1]
        mask = torch.ones(1, 1, count, PROMPT + count, dtype=torch.bool)
        mask[..., PROMPT:] = torch.ones(count, count).tril().bool()
        positions = torch.arange(PROMPT, PROMPT + count)[None]
        start = perf_counter()
        features = self.target.forward(token_ids, self.cache, positions, mask)
        middle = perf_counter()
        logits = self.target.head.logits(features[0])
        return middle - start, perf_counter() - middle, logits


def compared(dtype: str, repeats: int, console: Console) -> list[dict]:
    """Compare both modes in one dtype."""
    sides = {mode: Side(dtype, mode) for mode in MODES}
    times: dict[tuple[int, str], list[tuple[float, float]]] = {(size, mode): [] for size in SIZES for mode in MODES}
    equal = dict.fromkeys(SIZES, True)
    for number in range(repeats + 1):
        torch.manual_seed(number)
        for size in random.Random(number).sample(SIZES, len(SIZES)):
            token_ids = torch.randint(0, 40_000, (1, size))
            logits = {}
            for mode in random.Random(size + number).sample(MODES, len(MODES)):
                *seconds, logits[mode] = sides[mode].seconds(token_ids)
                if number > 0:  # the first round is a warm-up
                    times[size, mode].append(tuple(seconds))
            equal[size] &= torch.equal(logits["false"], logits["auto"])
    columns = ("tokens", "library: layers, LM head, ms", "packed: layers, LM head, ms", "ratio", "in single tokens")
    table = Table(*columns, "equal bits", title=dtype)

    def milliseconds(size: int, mode: str) -> list[float]:
        return [1000 * median(part) for part in zip(*times[size, mode], strict=True)]

    single = sum(milliseconds(1, "auto"))
    rows = []
    for size in SIZES:
        library, packed = (milliseconds(size, mode) for mode in MODES)
        row = {"tokens": size, "library_ms": library, "packed_ms": packed, "ratio": sum(library) / sum(packed)}
        row |= {"cost": sum(packed) / single, "equal": equal[size]}
        rows.append(row)
        both = (" + ".join(f"{part:.1f}" for part in each) for each in (library, packed))
        table.add_row(str(size), *both, f"{row['ratio']:.2f}", f"{row['cost']:.2f}", str(equal[size]))
    console.print(table)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=140)
    rows = {dtype: compared(dtype, arguments.repeats, console) for dtype in arguments.dtype}
    machine = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": arguments.threads}
    print(json.dumps(machine | {"rows": rows}))


if __name__ == "__main__":
    main()
