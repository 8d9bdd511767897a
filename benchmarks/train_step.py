"""Tokens/s and peak memory of a training step against `naive_hass.py`, which has the costs of the official code.

    python benchmarks/train_step.py [--threads 2] [--repeats 3] [--skip llama] [--device cuda] [--attention flex]

Prints tables and one line of JSON with `tokens_per_second_ratio` and `peak_memory_ratio` by alignment depth (ours over
the naive step), for a pruned vocabulary and for the compiled over the eager loss, and the memory with the shape of
LLaMA-3-8B's head. The target is SmolLM2-135M in fp32, the batch four conversations of the packaged corpus, padded or
truncated to 512 tokens, with their loss mask and target features.
Both steps use the same batches and weights and a clipped AdamW update; their losses must agree to 1e-4. They are
interleaved in one process. Memory is the peak of the resident memory (on a GPU: of the allocated memory) minus that in
use once model, batch and optimizer state are loaded.
"""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from time import process_time

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from hass_lightning.data.tokens import encode_all
from hass_lightning.draft import Alignment, EagleDraft
from hass_lightning.losses import DraftLoss, FeatureRegression, SoftCrossEntropy, TopK
from hass_lightning.runs.config import config_folder
from hass_lightning.target_model.lm_head import TargetHead
from hass_lightning.training.module import HassModule
from hass_lightning.types import FeatureBatch
from machine import Memory, now, rounded
from naive_hass import naive_step

BATCH, LENGTH = 4, 512
PRUNED = 8192
LLAMA_TOKENS = {"ours": (512, 1024, 2048), "naive": (128, 256, 512)}  # the naive step at 2,048 would need about 30 GB


@dataclass
class Case:
    """Config of a head, the target's embedding and LM head, and batches."""

    config: LlamaConfig
    head: TargetHead
    batches: list[FeatureBatch]
    frequent: torch.Tensor | None = None  # tokens of the pruned vocabulary
    token_ids: torch.Tensor | None = None  # tokens of the draft vocabulary, None: all


def smollm2(num_batches: int, device: str) -> Case:
    """Build the case from the packaged corpus and the quickstart's target."""
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose("train", overrides=["target.dtype=float32", f"target.device={device}"])
    target = instantiate(config.target)
    conversations = islice(instantiate(config.data.source).load(target), 64)
    tokens = encode_all(target.tokenizer, conversations, 2048, target.eos_token_ids)
    batches = []
    for number in range(num_batches):
        part = tokens[number * BATCH : (number + 1) * BATCH]
        input_ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        loss_mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        for row, sequence in enumerate(part):
            length = min(LENGTH, len(sequence))
            input_ids[row, :length], loss_mask[row, :length] = sequence.input_ids[:length], sequence.loss_mask[:length]
        loss_mask[:, -1] = False  # the token to predict is cut off
        features = target.encode(input_ids.to(device)).clone()
        target_ids = torch.cat([target.head.logits(rows).argmax(-1)[None] for rows in features])
        lengths = torch.tensor([len(sequence) for sequence in part])
        batches.append(FeatureBatch(input_ids, loss_mask, lengths, features, target_ids).to(device))
    every = torch.cat([sequence.input_ids for sequence in tokens])
    frequent = torch.bincount(every, minlength=target.head.vocab_size).topk(PRUNED).indices.sort().values
    head = TargetHead(target.head.embed_tokens.clone(), target.head.lm_head.clone())
    return Case(target.config, head, batches, frequent)


def llama3_8b(num_tokens: int, device: str) -> Case:
    """Build a case with random weights in the shape of LLaMA-3-8B's head; all positions but the last have a loss."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    weight = (torch.randn(501, 4096, device=device) * 0.02).repeat(256, 1)  # 501 rows repeated 256 times, for speed
    input_ids = torch.randint(0, 128_256, (1, num_tokens))
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    mask[:, -1] = False
    features = torch.randn(1, num_tokens, 4096)
    batch = FeatureBatch(input_ids, mask, torch.tensor([num_tokens]), features, input_ids.clone())
    return Case(config, TargetHead(weight, weight), [batch.to(device)])


class Trainer:
    """A training step (`form`: ours or naive) with its own weights and optimizer."""

    def __init__(
        self, case: Case, form: str, depth: int, adam: bool = True, attention: str = "auto", compile: bool = False
    ):
        torch.manual_seed(0)
        self.case, self.form, self.depth = case, form, depth
        self.draft = EagleDraft.from_target(case.config, attention=attention).to(case.head.lm_head.device)
        # a small learning rate keeps the weights of both forms comparable from step to step
        make = partial(torch.optim.AdamW, fused=form == "ours") if adam else torch.optim.SGD
        self.optimizer = make(self.draft.parameters(), lr=1e-6)
        terms = {"feature": FeatureRegression(), "soft_ce": SoftCrossEntropy(0.1), "top_k": TopK()}
        loss = DraftLoss(terms, compile=compile)
        self.module = HassModule(
            self.draft, loss, Alignment(depth), case.head, torch.optim.AdamW, token_ids=case.token_ids
        )

    def step(self, batch: FeatureBatch) -> float:
        """Run forward, backward, clipping and optimizer, and return the loss summed over alignment steps."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.form == "ours":
            total = self.module.aligned_loss(batch, batch.features).total
            total.backward()
            loss = float(total.detach())
        else:
            embeddings, features = self.case.head.embed(batch.input_ids[:, 1:]), batch.features
            parts = (features[:, :-1], features[:, 1:], batch.loss_mask[:, :-1])
            loss = naive_step(self.draft, self.case.head.lm_head, embeddings, *parts, self.depth)
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 0.5)
        self.optimizer.step()
        return loss


def operations(case: Case, form: str, depth: int) -> float:
    """Count the floating-point operations of the matrix products of one step, averaged over the batches."""
    c, total = case.config, 0.0
    hidden, wide, vocab = c.hidden_size, c.intermediate_size, len(case.head.draft_vocabulary(case.token_ids))
    head_dim = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
    queries, keys = c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim
    for batch in case.batches:
        tokens = batch.input_ids[:, 1:].numel()
        positions = int(batch.loss_mask[:, :-1].sum()) if form == "ours" else tokens
        total += 2 * positions * hidden * vocab  # the target
        for step in range(1, depth + 1):
            bands = 1 if form == "ours" else step
            fuse = tokens * 2 * hidden * hidden * bands * 2  # forward, weight gradient
            keys_values = tokens * hidden * 2 * keys * bands * 3
            own = 3 * (tokens * hidden * queries + positions * (queries * hidden + 3 * hidden * wide))
            lm_head = positions * hidden * vocab * 2  # forward, feature gradient
            square = tokens * batch.input_ids.shape[1] * queries
            attention = square * (1 + 2.5 / 1) if form == "ours" else square * 2 * bands * 3
            total += 2 * (fuse + keys_values + own + lm_head + attention)
    return total / len(case.batches)


def machine_rates(device: str) -> tuple[float, float]:
    """Measure (FLOP/s of a large matrix product, bytes/s of a copy) with `cpu_seconds`, the best of five."""
    a, b, block = (torch.randn(size, device=device) for size in ((512, 576), (576, 16_384), (1 << 25,)))
    output, other = torch.empty(512, 16_384, device=device), torch.zeros(1 << 25, device=device)
    best = {"product": float("inf"), "copy": float("inf")}
    for _ in range(5):
        for name, work in (("product", lambda: torch.mm(a, b, out=output)), ("copy", lambda: other.copy_(block))):
            start = cpu_seconds(device)
            work()
            best[name] = min(best[name], cpu_seconds(device) - start)
    return 2 * 512 * 576 * 16_384 / best["product"], 2 * 4 * (1 << 25) / best["copy"]


def cpu_seconds(device: str) -> float:
    """Return the CPU seconds of all threads so far; for a GPU, the clock."""
    return process_time() if device == "cpu" else now(device)


def first_tokens(batch: FeatureBatch, count: int) -> FeatureBatch:
    """Return the first `count` tokens of the batch, with a loss mask that is true everywhere."""
    cut = {name: getattr(batch, name)[:, :count] for name in ("input_ids", "features", "target_ids")}
    return replace(batch, **cut, loss_mask=torch.ones_like(batch.loss_mask[:, :count]))


def timed(trainers: dict[str, Trainer], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Measure median seconds, CPU seconds and peak memory of a step, interleaved over the same batches.

    The losses of `naive` and `ours` must agree.
    """
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in trainers}
    memory = Memory(device)
    for trainer in trainers.values():  # creates the optimizer state and compiles the loss
        trainer.step(first_tokens(trainer.case.batches[0], 16))
    for number in range(repeats):
        losses = {}
        for name in random.Random(number).sample(list(trainers), len(trainers)):
            trainer = trainers[name]
            trainer.optimizer.zero_grad(set_to_none=True)
            resident = memory.forget_peak()
            start = now(device), cpu_seconds(device)
            losses[name] = trainer.step(trainer.case.batches[number % len(trainer.case.batches)])
            wall, cpu = now(device) - start[0], cpu_seconds(device) - start[1]
            found[name].append((wall, cpu, memory.peak() - resident))
        assert abs(losses["ours"] - losses["naive"]) < 1e-4 * abs(losses["naive"]), losses
    keys = ("seconds", "cpu_seconds", "peak_mb")
    return {name: dict(zip(keys, map(median, zip(*each, strict=True)), strict=True)) for name, each in found.items()}


def llama_peak(form: str, num_tokens: int, device: str, attention: str) -> float:
    """Measure peak memory in MB of one step with the shape of LLaMA-3-8B's head, depth 3, SGD (no optimizer state)."""
    case = llama3_8b(num_tokens, device)
    trainer = Trainer(case, form, 3, adam=False, attention=attention)
    memory = Memory(device)
    resident = memory.forget_peak()
    trainer.step(case.batches[0])
    return memory.peak() - resident


def llama_row(options: list[str]) -> dict:
    """Compare peak memory with the shape of LLaMA-3-8B's head at 2,048 tokens; extrapolated for the naive step."""
    found: dict = {"model": "peak = fixed + per_token x tokens (least squares over the measured sizes)"}
    for form in ("naive", "ours"):
        peaks = {}
        for size in LLAMA_TOKENS[form]:  # in a separate process, because gigabytes of memory are not all released
            own = [sys.executable, __file__, *options, "--llama", form, str(size)]
            done = subprocess.run(own, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
            peaks[size] = float(done.stdout.splitlines()[-1])
        x = torch.tensor([[1.0, size] for size in peaks], dtype=torch.float64)
        y = torch.tensor(list(peaks.values()), dtype=torch.float64)
        fixed, per_token = torch.linalg.lstsq(x, y[:, None]).solution.flatten().tolist()
        at_2048 = peaks.get(2048, fixed + 2048 * per_token)
        found[form] = {"measured_mb": peaks, "fixed_mb": fixed, "per_token_mb": per_token, "at_2048_mb": at_2048}
    found["peak_memory_ratio"] = found["ours"]["at_2048_mb"] / found["naive"]["at_2048_mb"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=["llama"])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--attention", default="auto", help="model.draft.attention of our step")
    parser.add_argument("--llama", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.llama:
        print(llama_peak(arguments.llama[0], int(arguments.llama[1]), arguments.device, arguments.attention))
        return
    console = Console(width=140)
    device, attention = arguments.device, arguments.attention
    rate, copy_rate = machine_rates(device)
    full = smollm2(arguments.repeats, device)
    marked = sum(float(batch.loss_mask.float().mean()) for batch in full.batches) / len(full.batches)
    rows: dict[str, dict] = {}
    for depth in arguments.depths:
        trainers = {"naive": Trainer(full, "naive", depth), "ours": Trainer(full, "ours", depth, attention=attention)}
        if depth == 3:
            pruned = replace(full, token_ids=full.frequent)
            for name, on in (("pruned", False), ("pruned, compiled", True)):
                trainers[name] = Trainer(pruned, "ours", depth, attention=attention, compile=on)
            trainers["ours, compiled"] = Trainer(full, "ours", depth, attention=attention, compile=True)
        for name, seconds in timed(trainers, arguments.repeats, device).items():
            floor = operations(trainers[name].case, trainers[name].form, depth) / rate
            tokens_per_second = BATCH * LENGTH / seconds["seconds"]
            rows[f"{depth}/{name}"] = {**seconds, "tokens_per_second": tokens_per_second, "floor": floor}
            print(json.dumps(rounded({f"{depth}/{name}": rows[f"{depth}/{name}"]})), file=sys.stderr, flush=True)

    def ratio(key: str, name: str, depth: int) -> float:
        return rows[f"{depth}/{name}"][key] / rows[f"{depth}/naive"][key]

    cases = [(str(depth), "ours", depth) for depth in arguments.depths]
    cases += [("pruned", "pruned", 3)] if 3 in arguments.depths else []
    if 3 in arguments.depths:
        speeds = {name: rows[f"3/{name}"]["seconds"] for name in ("ours", "pruned")}
        compiled = {name: seconds / rows[f"3/{name}, compiled"]["seconds"] for name, seconds in speeds.items()}
    result: dict = {
        "tokens_per_second_ratio": {case: ratio("tokens_per_second", *of) for case, *of in cases},
        "cpu_seconds_ratio": {case: 1 / ratio("cpu_seconds", *of) for case, *of in cases},
        "peak_memory_ratio": {case: ratio("peak_mb", *of) for case, *of in cases},
    }
    if 3 in arguments.depths:
        result["compiled_over_eager"] = compiled
    if {1, 3} <= set(arguments.depths):
        cost = {key: rows["3/ours"][key] / rows["1/ours"][key] for key in ("seconds", "cpu_seconds", "floor")}
        result["depth3_over_depth1"] = cost | {"time_over_flops": cost["cpu_seconds"] / cost["floor"]}
    table = Table(
        "depth/form", "tokens/s", "s/step", "CPU s", "lower bound s", "CPU over bound", "peak MB", title="SmolLM2"
    )
    for name, row in rows.items():
        numbers = [f"{row[key]:.2f}" for key in ("seconds", "cpu_seconds", "floor")]
        over = row["cpu_seconds"] / row["floor"]
        table.add_row(name, f"{row['tokens_per_second']:.0f}", *numbers, f"{over:.2f}", f"{row['peak_mb']:.0f}")
    console.print(table)
    console.print(f"loss positions: {marked:.1%}")
    if "llama" not in arguments.skip:
        result["llama3_8b_head"] = llama_row(
            ["--threads", str(arguments.threads), "--device", device, "--attention", attention]
        )
        console.print(result["llama3_8b_head"])
    machine = {"gflops": rate / 1e9, "copy_gb_per_second": copy_rate / 1e9, "threads": arguments.threads}
    machine["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine["device"] = device if device == "cpu" else torch.cuda.get_device_name(device)
    print(json.dumps(rounded(result | {"marked": marked, "machine": machine, "rows": rows})))


if __name__ == "__main__":
    main()
