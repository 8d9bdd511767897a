"""Speedup of chain decoding over autoregressive decoding by batch size.

    python benchmarks/batch.py --draft runs/quickstart [--sizes 1 2 4 8] [--max-new-tokens 48] [--threads 2]

Greedy decoding of the held-out questions, with both decoders interleaved. In float32 their answers must be identical,
otherwise it stops. Prints a table and one line of JSON.
"""

import argparse
import json
import os
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

from hass_lightning.data.from_config import load_prompts
from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding import Autoregressive, Chain
from hass_lightning.measure.heads import decoding_models, load_drafts
from hass_lightning.runs.config import config_folder
from machine import now, rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", required=True, help="a run folder with a head")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--depth", type=int, default=3, help="depth of the chain")
    parser.add_argument("--limit", type=int, default=16, help="number of questions")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--override", nargs="*", default=[], help="overrides of conf/benchmark.yaml")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose("benchmark", overrides=[*arguments.override, f"limit={arguments.limit}"])
        target = instantiate(config.target)
        (models,) = decoding_models(load_drafts([arguments.draft]), target).values()
        questions = load_prompts("validation", config, target)
    prompts = [encode_prompt(target.tokenizer, question.messages[:1]) for question in questions]
    decoders = {"autoregressive": Autoregressive(), "chain": Chain(arguments.depth)}
    table = Table("batch", "autoregressive, tokens/s", "chain, tokens/s", "τ", "chain over autoregressive")
    result: dict = {}
    for size in arguments.sizes:
        speeds: dict[str, list[float]] = {name: [] for name in decoders}
        cycles = accepted = 0
        for start in range(0, len(prompts) - size + 1, size):
            answers = {}
            for name, decoder in decoders.items():
                begun = now(target.device)
                found = decoder.generate_batch(models, prompts[start : start + size], arguments.max_new_tokens)
                tokens = sum(len(each.token_ids) for each in found)
                speeds[name].append(tokens / (now(target.device) - begun))
                answers[name] = [each.token_ids for each in found]
            cycles += sum(len(each.accepted) for each in found)
            accepted += sum(sum(each.accepted) for each in found)
            assert target.dtype != torch.float32 or answers["chain"] == answers["autoregressive"]
        ratios = [chain / plain for chain, plain in zip(speeds["chain"], speeds["autoregressive"], strict=True)]
        row = {name: median(values) for name, values in speeds.items()}
        row |= {"tau": 1 + accepted / cycles, "ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
        result[size] = rounded(row)
        spread = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        table.add_row(str(size), f"{row['autoregressive']:.1f}", f"{row['chain']:.1f}", f"{row['tau']:.2f}", spread)
    Console(width=120).print(table)
    machine = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], "dtype": str(target.dtype)}
    print(json.dumps({"by_batch": result, "machine": machine}))


if __name__ == "__main__":
    main()
