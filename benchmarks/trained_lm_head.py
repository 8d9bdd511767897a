"""Peak memory of the loss of a head that trains its own LM head (EAGLE-3): in chunks, and in one piece by autograd.

    python benchmarks/trained_lm_head.py [--rows 512 1024 2048 4096] [--vocabulary 49152] [--depth 3]

Sizes of SmolLM2-135M (D = 576), float32, soft cross-entropy alone. The parameters, their gradient, the target's LM head
and the features are in use before; the figure is the peak of the resident memory above that. Every measurement is a
process of its own. Gradients of both forms must agree to 1e-4.
"""

import argparse
import json
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hass_lightning.losses import DraftLoss, SoftCrossEntropy
from hass_lightning.target_model.draft_vocabulary import DraftVocabulary
from machine import Memory

HIDDEN = 576


def peak(form: str, rows: int, size: int, depth: int) -> dict[str, float]:
    """Return the MB that loss and backward add, and the norm of the LM head's gradient."""
    torch.manual_seed(0)
    steps = [torch.randn(rows, HIDDEN, requires_grad=True) for _ in range(depth)]
    target, lm_head = torch.randn(rows, HIDDEN), nn.Linear(HIDDEN, size, bias=False)
    vocabulary = DraftVocabulary(torch.randn(size, HIDDEN) / HIDDEN**0.5)
    lm_head.weight.grad = torch.zeros_like(lm_head.weight)
    memory = Memory()
    before = memory.forget_peak()
    if form == "chunks":
        loss = DraftLoss({"soft_ce": SoftCrossEntropy()}, compile=False)
        wanted = torch.zeros(rows, dtype=torch.int64)
        total = loss(steps, target, vocabulary, wanted, rows, draft_logits=lm_head, trained=[lm_head.weight]).total
    else:
        p = vocabulary.logits(target, decoding=False).softmax(-1)
        total = sum(-(p * lm_head(features).log_softmax(-1)).sum() for features in steps) / rows
    total.backward()
    return {"mb": memory.peak() - before, "norm": float(lm_head.weight.grad.norm())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(1)
        print(json.dumps(peak(given.one[0], int(given.one[1]), given.vocabulary, given.depth)))
        return
    table, results = Table("loss positions", "chunks, MB", "one piece, MB", "ratio"), {}
    sizes = ["--vocabulary", str(given.vocabulary), "--depth", str(given.depth)]
    for rows in given.rows:
        found = {}
        for form in ("chunks", "whole"):
            command = [sys.executable, __file__, "--one", form, str(rows), *sizes]
            found[form] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert abs(found["chunks"]["norm"] / found["whole"]["norm"] - 1) < 1e-4, found
        results[rows] = {form: round(each["mb"]) for form, each in found.items()}
        chunks, whole = results[rows]["chunks"], results[rows]["whole"]
        table.add_row(f"{rows:,}", f"{chunks:,}", f"{whole:,}", f"{chunks / whole:.2f}")
    Console().print(table)
    print(json.dumps({"vocabulary": given.vocabulary, "depth": given.depth, "mb": results}))


if __name__ == "__main__":
    main()
