"""The accepted length and the speed of an exported head in vLLM, beside our chain's on the same prompts and answers.

    python experiments/serving_vllm.py prompts RECORDS BENCHMARK OUT   # prompts of a hass-benchmark run, as token ids
    <vllm's python> experiments/serving_vllm.py serve TARGET DRAFT PROMPTS OUT     # decode them with DRAFT, or `none`
    python experiments/serving_vllm.py compare RECORDS PROMPTS SERVED ...          # τ, by position, texts
    python experiments/serving_vllm.py speed SERVED ...                            # tokens per second, τ, load

`serve` runs in vLLM's own environment (docs/serving.md). It decodes every prompt alone, so that the counters of vLLM's
metrics can be read by prompt; `--profile` accepts draft tokens with the rates of an acceptance profile.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")


def write_prompts(records: Path, benchmark: Path, out: Path) -> None:
    """The prompts of the autoregressive records of MT-bench (both turns, with the answers given), as JSON lines."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from hass_lightning.data.tokens import encode_prompt
    from hass_lightning.measure import read_records
    from hass_lightning.types import Message

    tokenizer = instantiate(OmegaConf.load("conf/target/smollm2_135m.yaml")).tokenizer
    node = OmegaConf.load(benchmark)
    asked = {prompt.id: [m.content for m in prompt.messages if m.role == "user"] for prompt in instantiate(node).load()}
    history: dict[str, tuple[Message, ...]] = {}
    baseline = [r for r in read_records(records) if r.decoder == "autoregressive" and r.benchmark == node.name]
    with out.open("w") as file:
        for record in sorted(baseline, key=lambda each: (each.prompt_id, each.turn)):
            question = asked[record.prompt_id][record.turn]
            messages = (*history.get(record.prompt_id, ()), Message("user", question))
            ids = encode_prompt(tokenizer, messages)
            assert len(ids) == record.num_prompt_tokens, f"{record.prompt_id}: another prompt than the recorded one"
            line = {"id": record.prompt_id, "turn": record.turn, "prompt": ids, "answer": record.token_ids}
            file.write(json.dumps(line | {"max_tokens": record.max_new_tokens}) + "\n")
            answer = Message("assistant", tokenizer.decode(record.token_ids, skip_special_tokens=True))
            history[record.prompt_id] = (*messages, answer)


def serve(given: argparse.Namespace) -> None:
    """Decode every prompt greedily with vLLM in float32; write seconds, load and what its counters added."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    speculative, acceptance, ahead = None, "none", int(given.profile is not None)
    if str(given.draft) != "none":
        speculative = {"method": given.method, "model": str(given.draft), "num_speculative_tokens": given.depth}
        if given.profile:
            profiles = json.loads(given.profile.read_text())["profiles"]
            speculative |= next(profile["vllm"] for profile in profiles if profile["decoder"] == "chain")
            add_synthetic_acceptance()
        acceptance = "synthetic" if given.profile else "real"
    limits = {"max_model_len": 2048, "max_num_seqs": 1, "enable_prefix_caching": False, "disable_log_stats": False}
    llm = LLM(str(given.target), dtype="float32", enforce_eager=True, seed=given.seed, speculative_config=speculative,
              **limits)  # fmt: skip

    def counters() -> dict[str, Any]:
        found = {metric.name: getattr(metric, "value", getattr(metric, "values", None)) for metric in llm.get_metrics()}
        return {name: found.get(f"vllm:spec_decode_{name}") for name in COUNTERS}

    with given.out.open("w") as file:
        for number, line in enumerate(_read(given.prompts)):
            while given.turns and not (given.turns.exists() and given.turns.read_text().count("\n") >= number + ahead):
                time.sleep(0.02)
            sampling = SamplingParams(temperature=0, max_tokens=line["max_tokens"])
            if given.same_length:
                sampling = SamplingParams(temperature=0, max_tokens=len(line["answer"]), ignore_eos=True)
            before, start, cpu = counters(), time.perf_counter(), time.process_time()
            output = llm.generate([{"prompt_token_ids": line["prompt"]}], sampling, use_tqdm=False)[0]
            measured = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            added = {name: _minus(value, before[name]) for name, value in counters().items() if value is not None}
            answer = {"id": line["id"], "turn": line["turn"], "answer": list(output.outputs[0].token_ids)}
            measured |= {"load": os.getloadavg()[0], "acceptance": acceptance}
            file.write(json.dumps(answer | measured | added) + "\n")
            file.flush()


def add_synthetic_acceptance() -> None:
    """Add vLLM's synthetic acceptance to its CPU kernel of greedy verification, which refuses it.

    The rule is that of the Triton kernel of the same name (vllm/v1/sample/rejection_sampler.py): token k is accepted if
    a uniform number is below the rate of k, given that all earlier ones were accepted.
    """
    from vllm.utils import cpu_triton_utils as kernels

    def kernel(output, ends, drafted, wanted, bonus, is_greedy, most, uniform, rates, synthetic):
        assert is_greedy is None, "only requests at temperature 0"
        start = 0
        for row, end in enumerate(ends.tolist()):
            accepted = (uniform[start:end] < rates[: end - start]) & (drafted[start:end] >= 0)
            count = int(accepted.long().cumprod(0).sum())
            output[row, :count] = drafted[start : start + count]
            output[row, count] = bonus[row, 0] if start + count == end else wanted[start + count]
            start = end

    kernels._rejection_greedy_sample_kernel_impl = kernel


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _minus(after: Any, before: Any) -> Any:
    if isinstance(after, list):
        return [one - other for one, other in zip(after, before or [0] * len(after), strict=True)]
    return after - (before or 0)


def compare(records: Path, prompts: Path, served: list[Path]) -> None:
    """Print both accepted lengths, over all answers and over those that both engines wrote alike."""
    from hass_lightning.measure import read_records

    expected = {(line["id"], line["turn"]): line["answer"] for line in _read(prompts)}
    chains = {}
    for record in read_records(records):
        if record.decoder == "chain" and (record.prompt_id, record.turn) in expected:
            chains.setdefault(record.draft, {})[record.prompt_id, record.turn] = record
    for path in served:
        lines = {(line["id"], line["turn"]): line for line in _read(path)}
        same = [key for key, line in lines.items() if line["answer"] == expected[key]]
        print(f"{path.name}: {len(same)} of {len(lines)} answers are ours token by token")
        for name, keys in (("all answers", list(lines)), ("equal answers", same)):
            if not keys or lines[keys[0]].get("num_drafts") is None:
                continue
            drafts, accepted = (sum(lines[key][each] for key in keys) for each in ("num_drafts", "num_accepted_tokens"))
            depths = zip(*(lines[key]["num_accepted_tokens_per_pos"] for key in keys), strict=True)
            by_position = [sum(column) / drafts for column in depths]
            tau = 1 + accepted / drafts
            print(f"  {name}, vLLM: τ {tau:.4f} over {drafts} drafts, by position {_shown(by_position)}")
            for draft, chain in chains.items():
                cycles = [count for key in keys for count in chain[key].accepted]
                ours = [sum(count > level for count in cycles) / len(cycles) for level in range(len(by_position))]
                mine = 1 + sum(cycles) / len(cycles)
                shown = f"τ {mine:.4f} over {len(cycles)} drafts, by position {_shown(ours)}"
                print(f"  {name}, chain of {draft}: {shown}; vLLM's is {100 * (tau / mine - 1):+.2f} %")


def speed(served: list[Path]) -> None:
    """Print tokens per second, τ and load of each file, then the medians of the real and the synthetic ones."""
    kinds: dict[str, list[list[float]]] = {}
    for path in served:
        lines = _read(path)
        drafts, accepted = (sum(line.get(name, 0) for line in lines) for name in ("num_drafts", "num_accepted_tokens"))
        tokens, loads = sum(len(line["answer"]) for line in lines), [line["load"] for line in lines]
        row = [tokens / sum(line[unit] for line in lines) for unit in ("seconds", "cpu_seconds")]
        row.append(1 + accepted / max(drafts, 1))
        kinds.setdefault(lines[0]["acceptance"], []).append(row)
        print(f"{path.name}: {tokens} tokens, {row[0]:.2f} per second, {row[1]:.2f} per second of CPU time, "
              f"τ {row[2]:.4f} over {drafts} drafts, load {min(loads):.1f} to {max(loads):.1f}")  # fmt: skip
    for kind, rows in kinds.items():
        shown = [f"{median(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in zip(*rows, strict=True)]
        print(f"{kind}, {len(rows)} runs: {shown[0]} per second, {shown[1]} per second of CPU time, τ {shown[2]}")


def _shown(rates: list[float]) -> str:
    return " ".join(f"{rate:.4f}" for rate in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for name, paths in (
        ("prompts", "records benchmark out"), ("serve", "target draft prompts out"), ("compare", "records prompts"),
        ("speed", ""),
    ):  # fmt: skip
        step = steps.add_parser(name)
        for path in paths.split():
            step.add_argument(path, type=Path)
        if name in ("compare", "speed"):
            step.add_argument("served", type=Path, nargs="+")
        if name == "serve":
            step.add_argument("--method", default="eagle", choices=("eagle", "eagle3"))
            step.add_argument("--depth", type=int, default=3)
            step.add_argument("--profile", type=Path, help="acceptance_profile.json; its depth replaces --depth")
            step.add_argument("--same-length", action="store_true", help="as many tokens as the recorded answers")
            step.add_argument("--seed", type=int, default=0)
            step.add_argument("--turns", type=Path, help="OUT of another process: one answer each; the real one first")
    given = parser.parse_args()
    functions = {"prompts": write_prompts, "compare": compare, "speed": speed}
    if given.step == "serve":
        serve(given)
    else:
        functions[given.step](**{name: value for name, value in vars(given).items() if name != "step"})


if __name__ == "__main__":
    main()
