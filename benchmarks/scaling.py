"""Scaling of time with tree nodes, context, sequence length, vocabulary and alignment depth, with fitted exponents.

    python benchmarks/scaling.py [--threads 2] [--repeats 3] [--plot benchmarks/scaling_cost.html] [--device cuda]

Shape of SmolLM2-135M, fp32. A training step is the forward and backward pass of the head (random features, loss mask
true everywhere). Prints a table, writes a plot, and prints one line of JSON with `exponents` (the slope of log time
over log size, over all sizes and over the larger half, where the constant part is small).
"""

import argparse
import json
import os
import random
from collections.abc import Callable
from statistics import median

import numpy as np
import plotly.graph_objects as go
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from hass_lightning.draft import Alignment, EagleDraft
from hass_lightning.losses import DraftLoss, FeatureRegression, SoftCrossEntropy, TopK
from hass_lightning.runs.config import config_folder
from hass_lightning.target_model import TargetHead, TargetModel
from hass_lightning.training.module import HassModule
from hass_lightning.types import FeatureBatch
from machine import now

CONTEXT, LENGTH, VOCABULARY = 200, 256, 8192  # defaults where another size varies
Work = Callable[[], object]


def verify(target: TargetModel, num_nodes: int, context: int) -> Work:
    """Return a forward over a chain of `num_nodes` with the LM head, with `context` cached tokens."""
    cache = target.new_cache(1, context + num_nodes)
    cache.length = context  # zeros, because the content does not affect the time
    ids = torch.randint(0, 40_000, (1, num_nodes), device=target.device)

    @torch.inference_mode()
    def work() -> None:
        target.head.logits(target.forward(ids, cache)[0]).max(-1)

    return work


def top_tokens(target: TargetModel, size: int) -> Work:
    """Return the logits, top 3 and log-sum-exp of three nodes over a draft vocabulary of `size`."""
    weight = torch.randn(size, target.hidden_size, device=target.device)
    rows = torch.randn(3, target.hidden_size, device=target.device)
    vocabulary = TargetHead(weight, weight).draft_vocabulary()

    @torch.inference_mode()
    def work() -> None:
        logits = vocabulary.logits(rows)
        logits.topk(3)
        logits.logsumexp(-1)

    return work


def train(target: TargetModel, length: int, size: int, depth: int) -> Work:
    """Return the forward and backward pass of one sequence."""
    torch.manual_seed(0)
    draft = EagleDraft.from_target(target.config).to(target.device)
    loss = DraftLoss({"feature": FeatureRegression(), "soft_ce": SoftCrossEntropy(0.1), "top_k": TopK()})
    weight = torch.randn(size, target.hidden_size, device=target.device) * 0.05
    module = HassModule(draft, loss, Alignment(depth), TargetHead(weight, weight), torch.optim.AdamW)
    ids = torch.randint(0, size, (1, length))
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[:, -1] = False
    batch = FeatureBatch(ids, mask, torch.tensor([length]), torch.randn(1, length, target.hidden_size), ids.clone())
    batch = batch.to(target.device)

    def work() -> None:
        draft.zero_grad(set_to_none=True)
        module.aligned_loss(batch, batch.features).total.backward()

    return work


def studies(target: TargetModel) -> dict[str, dict[int, Work]]:
    """Return the work to time by name of the study and size."""
    return {
        "verify: nodes": {n: verify(target, n, CONTEXT) for n in (1, 2, 4, 8, 16, 32, 64)},
        "verify 8: context": {n: verify(target, 8, n) for n in (128, 256, 512, 1024, 2048, 4096)},
        "guess: draft vocabulary": {n: top_tokens(target, n) for n in (4096, 8192, 16_384, 32_768, 49_152)},
        "train: sequence length": {n: train(target, n, VOCABULARY, 3) for n in (64, 128, 256, 512, 1024)},
        "train: vocabulary": {n: train(target, LENGTH, n, 3) for n in (4096, 8192, 16_384, 32_768, 49_152)},
        "train: alignment depth": {n: train(target, LENGTH, VOCABULARY, n) for n in (1, 2, 3, 4, 5)},
    }


def timed(works: dict[int, Work], repeats: int, device: str) -> dict[int, float]:
    """Measure median milliseconds of each size, in random order after a warm-up."""
    found: dict[int, list[float]] = {size: [] for size in works}
    for number in range(repeats + 1):
        for size in random.Random(number).sample(list(works), len(works)):
            start = now(device)
            works[size]()
            if number > 0:
                found[size].append(1000 * (now(device) - start))
    return {size: median(values) for size, values in found.items()}


def exponent(times: dict[int, float]) -> float:
    """Fit the slope of log time over log size."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", default="scaling_cost.html")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with initialize_config_dir(config_folder(), version_base="1.3"):
        overrides = ["target.dtype=float32", f"target.device={arguments.device}"]
        target = instantiate(compose("train", overrides=overrides).target)
    figure = go.Figure()
    table = Table("size varied", "sizes", "ms", "exponent", "larger half", title="cost")
    result: dict = {"milliseconds": {}, "exponents": {}}
    for name, works in studies(target).items():
        times = timed(works, arguments.repeats, arguments.device)
        larger = dict(list(times.items())[len(times) // 2 :])
        result["milliseconds"][name] = {size: round(value, 3) for size, value in times.items()}
        result["exponents"][name] = {"all": round(exponent(times), 3), "larger_half": round(exponent(larger), 3)}
        numbers = (", ".join(map(str, times)), ", ".join(f"{value:.1f}" for value in times.values()))
        table.add_row(name, *numbers, f"{exponent(times):.2f}", f"{exponent(larger):.2f}")
        figure.add_scatter(x=list(times), y=list(times.values()), name=f"{name} (exponent {exponent(larger):.2f})")
    figure.update_layout(title="Time by size (shape of SmolLM2-135M)", template="plotly_white")
    figure.update_xaxes(type="log", title="size").update_yaxes(type="log", title="milliseconds")
    figure.write_html(arguments.plot, include_plotlyjs="cdn")
    Console(width=150).print(table)
    result["machine"] = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    result["machine"]["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
