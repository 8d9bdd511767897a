"""Tokens per second and time by phase of all decoders, and of those of transformers, on the same prompts.

    python benchmarks/decode.py --draft runs/quickstart [--limit 4] [--max-new-tokens 64] [--threads 2] \
        [--tree 8,3,3] [--decoders autoregressive dynamic_tree] [--override target.dtype=float32]

Greedy decoding, with all decoders interleaved. Prompts are MT-bench (first turns), HumanEval and GSM8K if
HASS_LIGHTNING_DATA is a folder with their files, otherwise the held-out questions of the corpus. The decoders of
transformers run an unmodified copy of the model in the same dtype: `generate` with the static and the dynamic cache,
prompt lookup, and assisted generation (with the first third of the target's layers as draft model,
`assistant_early_exit`, because there is no smaller model of this family). Prints a table per benchmark (medians over
prompts, quartiles in brackets), the time of each phase relative to the lower bound given by the measured memory
bandwidth and FLOP rate of the machine, and one line of JSON.
"""

import argparse
import json
import os
from collections import defaultdict
from statistics import median, quantiles
from time import perf_counter

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from hass_lightning.data.from_config import load_prompts
from hass_lightning.decoding import Autoregressive, Chain, DecodingModels, DynamicTree, PromptLookup
from hass_lightning.measure.benchmark import run_benchmark
from hass_lightning.measure.heads import decoding_models, load_drafts
from hass_lightning.measure.record import Record
from hass_lightning.runs.config import config_folder
from hass_lightning.types import Conversation, DecodeResult
from machine import rates, rounded

PHASES = ("prefill", "draft", "verify", "bookkeeping")
PUBLIC = ("mt_bench", "humaneval", "gsm8k")


class Transformers:
    """`generate` of transformers as a `Decoder`; its time has one phase."""

    acceptance = "none"

    def __init__(self, name: str, model, **options):
        self.name, self.model, self.options = name, model, options

    def check(self, models: DecodingModels) -> None:
        """Accept all models."""

    def generate(self, models, prompt, max_new_tokens, sampling=None, generator=None) -> DecodeResult:
        """Decode greedily."""
        ids = torch.tensor([prompt], device=self.model.device)
        ends = sorted(models.target.eos_token_ids)
        start = perf_counter()
        answer = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=ends, pad_token_id=ends[0], **self.options,
        )  # fmt: skip
        tokens = answer[0, len(prompt) :].tolist()
        return DecodeResult(tokens, [], [], [], {"verify": perf_counter() - start})


def transformers_decoders(target) -> dict[str, Transformers]:
    """Return four decoders of transformers, on an unmodified copy of the model."""
    model = AutoModelForCausalLM.from_pretrained(target.folder, dtype=target.dtype, attn_implementation="sdpa")
    model.to(target.device).eval()
    ways = {
        "hf_static_cache": {"cache_implementation": "static"},
        "hf_dynamic_cache": {},
        "hf_prompt_lookup": {"prompt_lookup_num_tokens": 8},
        "hf_assisted": {"assistant_early_exit": max(1, target.config.num_hidden_layers // 3)},
    }
    return {name: Transformers(name, model, **options) for name, options in ways.items()}


def lower_bounds(
    models: DecodingModels, machine: dict[str, float], rows: int, levels: int, width: int
) -> dict[str, float]:
    """Lower bounds in seconds of the phases of a cycle: reading the weights once per forward, and the products."""
    target, size = models.target, torch.finfo(models.target.dtype).bits // 8

    def least(parameters: float, tokens: int) -> float:
        return max(parameters * size / machine["matrix_vector"], 2 * parameters * tokens / machine["flops"])

    layers = sum(p.numel() for p in target.model.base_model.parameters()) - target.head.embed_tokens.numel()
    verify = least(layers + target.head.lm_head.numel(), rows)
    if models.draft is None or levels == 0:
        return {"verify": verify, "draft": 0.0}
    head = sum(p.numel() for p in models.draft.parameters()) + models.draft_vocabulary.weight.numel()
    return {"verify": verify, "draft": least(head, 2) + (levels - 1) * least(head, width)}


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0], 0.0, values[0])
    return {"median": median(values), "low": low, "high": high}


def row_of(records: list[Record], floor: dict[str, float]) -> dict:
    """Return the results of one decoder on one benchmark; `floor` are the lower bounds in seconds."""
    seconds = sum(r.total_seconds for r in records)
    shares = {phase: sum(r.seconds.get(phase, 0) for r in records) / seconds for phase in PHASES}
    row = {"tokens_per_second": spread([r.num_tokens / r.total_seconds for r in records]), "shares": shares}
    compared = [r.identical for r in records if r.identical is not None]
    row["identical"] = f"{sum(compared)}/{len(compared)}" if compared else ""
    cycles = [r for r in records if r.accepted]
    if not cycles:
        return row
    total = sum(len(r.accepted) for r in cycles)
    used = {phase: sum(r.seconds[phase] for r in cycles) / total for phase in PHASES[1:]}
    row["tau"] = sum(sum(r.accepted) + len(r.accepted) for r in cycles) / total
    row["milliseconds_a_cycle"] = {phase: 1000 * seconds for phase, seconds in used.items()}
    row["floor_milliseconds"] = {phase: 1000 * seconds for phase, seconds in floor.items()}
    row["over_floor"] = {phase: used[phase] / seconds for phase, seconds in floor.items() if seconds}
    row["bookkeeping_of_a_cycle"] = used["bookkeeping"] / sum(used.values())
    return row


def ratio(records: dict[str, list[Record]], first: str, second: str) -> dict[str, float]:
    """Return the ratio of tokens per second of `first` to `second`, over prompts."""
    pairs = zip(records[first], records[second], strict=True)
    return spread([a.num_tokens / a.total_seconds * b.total_seconds / b.num_tokens for a, b in pairs])


def load_first_turns(benchmark: str, config, target, limit: int) -> list[Conversation]:
    """Load the prompts of a benchmark, limited to their first turns."""
    config.limit = limit
    if benchmark == "validation":
        prompts = load_prompts(benchmark, config, target)
    else:
        prompts = instantiate(compose(f"benchmark/{benchmark}").benchmark, limit=limit).load()
    return [Conversation(each.id, each.messages[:1], each.category) for each in prompts]


def print_table(console: Console, benchmark: str, rows: dict[str, dict]) -> None:
    columns = ("decoder", "tokens/s", "τ", *PHASES, "ms per cycle: draft, verify", "over lower bound", "identical")
    table = Table(*columns, title=benchmark)
    for name, row in rows.items():
        speed = row["tokens_per_second"]
        ours = "tau" in row
        shares = [f"{row['shares'][phase]:.0%}" if ours else "–" for phase in PHASES]
        cycle, over = row.get("milliseconds_a_cycle", {}), row.get("over_floor", {})
        table.add_row(
            name,
            f"{speed['median']:.1f} [{speed['low']:.1f}, {speed['high']:.1f}]",
            f"{row['tau']:.2f}" if ours else "–",
            *shares,
            ", ".join(f"{cycle[phase]:.1f}" for phase in ("draft", "verify")) if ours else "–",
            ", ".join(f"{phase} {value:.2f}" for phase, value in sorted(over.items())) or "–",
            row["identical"] or "–",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", required=True, help="a run folder with a head")
    parser.add_argument("--benchmarks", nargs="*", help="names in conf/benchmark, instead of the default prompts")
    parser.add_argument("--limit", type=int, default=8, help="number of prompts per benchmark")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--tree", default="", help="nodes,depth,width, instead of conf/decoding/dynamic_tree.yaml")
    parser.add_argument("--decoders", nargs="*", default=[], help="names of decoders; default: all eight")
    parser.add_argument(
        "--override",
        nargs="*",
        default=[],
        help="overrides of conf/benchmark.yaml, such as target.device=cuda target.dtype=bfloat16",
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console(width=170)
    with initialize_config_dir(config_folder(), version_base="1.3"):
        config = compose("benchmark", overrides=arguments.override)
        target = instantiate(config.target)
        (models,) = decoding_models(load_drafts([arguments.draft]), target).values()
        chosen = compose("decoding/dynamic_tree").decoding
        tree = DynamicTree(*map(int, arguments.tree.split(","))) if arguments.tree else instantiate(chosen)
        decoders = {
            "autoregressive": Autoregressive(), "chain": Chain(), "dynamic_tree": tree, "prompt_lookup": PromptLookup(),
        }  # fmt: skip
        wanted = arguments.decoders
        if not wanted or any(name.startswith("hf_") for name in wanted):
            decoders |= transformers_decoders(target)
        decoders = {name: decoder for name, decoder in decoders.items() if not wanted or name in wanted}
        names = arguments.benchmarks or (PUBLIC if os.environ.get("HASS_LIGHTNING_DATA") else ("validation",))
        prompts = {name: load_first_turns(name, config, target, arguments.limit) for name in names}
    machine = rates(target.dtype, device=target.device)
    sizes = {"autoregressive": (1, 0, 1), "chain": (4, 3, 1), "dynamic_tree": (tree.num_nodes, tree.depth, tree.width)}
    sizes["prompt_lookup"] = (9, 0, 1)
    result: dict = {"tokens_per_second": {}, "ratios": {}, "rows": {}}
    for name in names:
        grouped: dict[str, list[Record]] = defaultdict(list)
        options = {"max_new_tokens": arguments.max_new_tokens, "benchmark": name, "keep_proposals": False}
        for record in run_benchmark({"head": models}, decoders, prompts[name], **options):
            grouped[record.decoder].append(record)
        rows = {d: row_of(grouped[d], lower_bounds(models, machine, *sizes.get(d, (1, 0, 1)))) for d in decoders}
        print_table(console, name, rows)
        result["rows"][name] = rows
        result["tokens_per_second"][name] = {d: row["tokens_per_second"]["median"] for d, row in rows.items()}
        pairs = [(d, "autoregressive") for d in ("chain", "dynamic_tree", "prompt_lookup")]
        pairs += [("autoregressive", d) for d in decoders if d.startswith("hf_")]
        pairs += [("dynamic_tree", "prompt_lookup"), ("dynamic_tree", "hf_prompt_lookup")]
        known = [pair for pair in pairs if set(pair) <= set(decoders)]
        result["ratios"][name] = {f"{first}/{second}": ratio(grouped, first, second) for first, second in known}
    result["machine"] = {
        "gflops": machine["flops"] / 1e9, "copy_gb_per_second": machine["copy"] / 1e9,
        "matrix_vector_gb_per_second": machine["matrix_vector"] / 1e9, "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "load": os.getloadavg()[0],
        "dtype": str(target.dtype),
    }  # fmt: skip
    console.print(result["machine"])
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
