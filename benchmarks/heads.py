"""Training several heads in one pass, against training each of them for itself.

    python benchmarks/heads.py [--threads 1] [--repeats 7] [--batches 4] [--batch-size 4] \
        [--vocabularies 8192 full]

The heads are the four cells of the paper's 2 x 2 (EAGLE's or HASS's loss, depth 1 or 3) on SmolLM2-135M, with the
pruned vocabulary of the quickstart and with the full one, and with features from disk and computed online. A step reads
a batch, computes losses and gradients, clips and updates, for all heads. Both sides run on the same batches,
interleaved in one process, each beginning every other time, and their weights must be equal to the last bit after the
same steps.
"""

import argparse
import json
from copy import deepcopy
from statistics import median
from time import process_time

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from hass_lightning.data.batches import FeatureDataset, collate
from hass_lightning.data.features import OnlineFeatures, extract_features
from hass_lightning.losses import compute_together
from hass_lightning.runs.config import config_folder
from hass_lightning.training.from_config import build_module
from machine import now, rounded

CELLS = {
    "eagle": ["model/loss=eagle", "model.alignment.depth=1"],
    "had": ["model/loss=hass", "model.alignment.depth=1"],
    "hca": ["model/loss=eagle", "model.alignment.depth=3"],
    "hass": ["model/loss=hass", "model.alignment.depth=3"],
}
COMMON = ["experiment=hass", "target.dtype=float32", "model.draft.start=random", "data.max_answer_tokens=20000"]


class Heads:
    """Heads with their optimizers."""

    def __init__(self, modules):
        self.modules = modules
        self.optimizers = [module.make_optimizer(list(module.draft.parameters())) for module in modules]

    def step(self, read):
        """Train all heads on a batch that is read once."""
        batch, noisy = read()
        prepared = self.modules[0].prepare(batch, noisy)
        normalizer = max(1, len(prepared.wanted))
        outputs = compute_together([module.start_loss(prepared, normalizer) for module in self.modules])
        torch.stack([output.total for output in outputs]).sum().backward()
        for module, optimizer in zip(self.modules, self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(list(module.draft.parameters()), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def build(data, vocab_size):
    """Return a module per cell."""
    modules = []
    for words in CELLS.values():
        with initialize_config_dir(config_folder(), version_base="1.3"):
            size = "null" if vocab_size is None else vocab_size
            config = compose("train", overrides=[*COMMON, *words, f"model.draft.vocab_size={size}"])
        torch.manual_seed(0)
        modules.append(build_module(config, data)[0])
    for module in modules:
        module.head, module.vocabulary = modules[0].head, modules[0].vocabulary
    return modules


def measure(modules, store, batches, repeats):
    """Return seconds and CPU seconds of a round over all batches, apart and together, and whether weights are equal."""
    dataset = FeatureDataset(store)

    def reader(keys):
        return lambda: collate(dataset.__getitems__(keys))

    apart = [Heads([module]) for module in deepcopy(modules)]
    together = [Heads(deepcopy(modules))]
    seconds = {"apart": [], "together": []}
    cpu = {"apart": [], "together": []}
    sides = [("apart", apart), ("together", together)]
    for number in range(repeats + 1):
        for name, groups in sides if number % 2 else sides[::-1]:
            started, used = now(), process_time()
            for keys in batches:
                for heads in groups:
                    heads.step(reader(keys))
            seconds[name].append(now() - started)
            cpu[name].append(process_time() - used)
    ends = [[each.draft.state_dict() for heads in groups for each in heads.modules] for _, groups in sides]
    equal = all(torch.equal(a[name], b[name]) for a, b in zip(*ends, strict=True) for name in a)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)][1:]  # the first round warms up
    return {
        "seconds_apart": median(seconds["apart"][1:]) / len(batches),
        "seconds_together": median(seconds["together"][1:]) / len(batches),
        "ratio": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "cpu_ratio": median([a / b for a, b in zip(*cpu.values(), strict=True)][1:]),
        "equal": equal,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--vocabularies", nargs="+", default=["8192", "full"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose("train", overrides=COMMON)
    target = instantiate(config.target)
    data = instantiate(config.data)(target=target)
    tokens = sorted(data.tokens()[0], key=len)
    middle = (len(tokens) - arguments.batches * arguments.batch_size) // 2
    tokens = tokens[middle:][: arguments.batches * arguments.batch_size]  # batches of the median length
    batches = [
        [(0, first + n) for n in range(arguments.batch_size)] for first in range(0, len(tokens), arguments.batch_size)
    ]
    stores = {"cached": extract_features(target, tokens), "online": OnlineFeatures(target, tokens)}
    table = Table(title=f"{len(CELLS)} heads, {sum(map(len, tokens)) // len(tokens)} tokens a sequence")
    for header in ("vocabulary", "features", "apart, s", "together, s", "ratio", "range", "CPU ratio", "equal"):
        table.add_column(header, justify="right")
    found = {}
    for size in arguments.vocabularies:
        vocab_size = None if size == "full" else int(size)
        modules = build(data, vocab_size)
        for name, store in stores.items():
            each = found[f"{size}/{name}"] = measure(modules, store, batches, arguments.repeats)
            table.add_row(
                size, name, f"{each['seconds_apart']:.2f}", f"{each['seconds_together']:.2f}",
                f"{each['ratio']:.2f}", f"{each['ratio_low']:.2f}–{each['ratio_high']:.2f}",
                f"{each['cpu_ratio']:.2f}", str(each["equal"]),
            )  # fmt: skip
    Console(width=120).print(table)
    print(json.dumps(rounded(found)))


if __name__ == "__main__":
    main()
