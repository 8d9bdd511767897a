"""The share of padding in the batches that the datamodule makes, and what packing could save.

    python benchmarks/padding.py [--sizes 4 8 16] [--epochs 3] [--override data=…]

Counts, over all batches of some epochs with the length bucketing of `data/order.py`: the share of positions that are
padding, with and without bucketing, and the share of a training step's FLOPs that is spent on it. The latter is the
most that packing could save; padding costs the head's `fc`, its key and value projections and the attention only,
because the rest of the layer and the LM head run on loss positions.
"""

import argparse
import json

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from hass_lightning.data.order import BatchOrder
from hass_lightning.draft.alignment import needed_rows
from hass_lightning.runs.config import config_folder
from hass_lightning.training.compute import BatchShape, step_flops
from machine import rounded


def padded_share(lengths, batches):
    """Return the share of the positions of all batches that are padding."""
    positions = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / positions


def flops(tokens, batch, padded, products, vocab_size, alignment):
    """Return the FLOPs of a step on a batch, padded to its longest sequence or without padding."""
    groups = [batch] if padded else [[index] for index in batch]
    total = 0.0
    for group in groups:
        masks = [tokens[index].loss_mask[None, :-1] for index in group]
        shape = BatchShape(
            len(group),
            max(len(tokens[index]) for index in group),
            sum(int(mask.sum()) for mask in masks),
            sum(int(needed_rows(mask, alignment.depth).sum()) for mask in masks),
        )
        total += step_flops(products, vocab_size, shape, alignment)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--override", nargs="*", default=[])
    arguments = parser.parse_args()
    overrides = ["target.head_only=true", "data.max_answer_tokens=null", *arguments.override]
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose("train", overrides=overrides)
    target = instantiate(config.target)
    data = instantiate(config.data)(target=target)
    tokens = data.tokens()[0]
    lengths = [len(sequence) for sequence in tokens]
    draft = instantiate(config.model.draft)(target.config)
    alignment = instantiate(config.model.alignment).at(0)
    vocab_size = draft.vocab_size or target.head.vocab_size
    table = Table(title=f"{len(tokens):,} sequences, {sum(lengths):,} tokens, mean {sum(lengths) / len(lengths):.0f}")
    for header in ("batch size", "padding, % of positions", "without length buckets", "padding, % of the step's FLOPs"):
        table.add_column(header, justify="right")
    found = {}
    for size in arguments.sizes:
        order = BatchOrder(lengths, size, data.seed, 1)
        batches = [batch for epoch in range(arguments.epochs) for batch in order.epoch(epoch)]
        plain = [list(range(first, first + size)) for first in range(0, len(lengths) - size + 1, size)]
        some = batches[:: max(1, len(batches) // 500)]
        costs = [
            sum(flops(tokens, batch, padded, draft.products(), vocab_size, alignment) for batch in some)
            for padded in (True, False)
        ]
        found[size] = {
            "padding": padded_share(lengths, batches),
            "padding_without_buckets": padded_share(lengths, plain),
            "flops_of_padding": 1 - costs[1] / costs[0],
        }
        table.add_row(str(size), *(f"{100 * share:.1f}" for share in found[size].values()))
    Console(width=120).print(table)
    print(json.dumps(rounded(found)))


if __name__ == "__main__":
    main()
