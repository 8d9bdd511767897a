"""The accepted length that vLLM counts for an exported head, beside our chain's on the same prompts and answers.

    python experiments/serving_vllm.py prompts RECORDS BENCHMARK OUT   # prompts of a hass-benchmark run, as token ids
    <vllm's python> experiments/serving_vllm.py serve TARGET DRAFT PROMPTS OUT     # decode them with method: eagle
    python experiments/serving_vllm.py compare RECORDS PROMPTS SERVED ...          # τ, by position, texts

The first and the last step run in this project's environment, the second in vLLM's own (docs/serving.md). Every prompt
is decoded alone, so that the counters of vLLM's metrics can be read by prompt. experiments/serving_vllm.md has the
whole sequence of commands.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
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


def serve(target: Path, draft: Path | None, prompts: Path, out: Path, depth: int) -> None:
    """Decode every prompt greedily with vLLM in float32 and write what its counters added, as JSON lines."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    speculative = None
    if draft is not None:
        speculative = {"method": "eagle", "model": str(draft), "num_speculative_tokens": depth}
    llm = LLM(
        model=str(target), dtype="float32", max_model_len=2048, enforce_eager=True, max_num_seqs=1,
        enable_prefix_caching=False, disable_log_stats=False, speculative_config=speculative,
    )  # fmt: skip

    def counters() -> dict[str, Any]:
        found = {metric.name: getattr(metric, "value", getattr(metric, "values", None)) for metric in llm.get_metrics()}
        return {name: found.get(f"vllm:spec_decode_{name}") for name in COUNTERS}

    with out.open("w") as file:
        for line in map(json.loads, prompts.read_text().splitlines()):
            before = counters()
            sampling = SamplingParams(temperature=0, max_tokens=line["max_tokens"])
            output = llm.generate([{"prompt_token_ids": line["prompt"]}], sampling, use_tqdm=False)[0]
            after = counters() if draft is not None else {}
            added = {name: _minus(value, before[name]) for name, value in after.items()}
            answer = {"id": line["id"], "turn": line["turn"], "answer": list(output.outputs[0].token_ids)}
            file.write(json.dumps(answer | added) + "\n")
            file.flush()


def _minus(after: Any, before: Any) -> Any:
    if isinstance(after, list):
        return [one - other for one, other in zip(after, before or [0] * len(after), strict=True)]
    return after - (before or 0)


def compare(records: Path, prompts: Path, served: list[Path]) -> None:
    """Print both accepted lengths, over all answers and over those that both engines wrote alike."""
    from hass_lightning.measure import read_records

    expected = {
        (line["id"], line["turn"]): line["answer"] for line in map(json.loads, prompts.read_text().splitlines())
    }
    chains = {}
    for record in read_records(records):
        if record.decoder == "chain" and (record.prompt_id, record.turn) in expected:
            chains.setdefault(record.draft, {})[record.prompt_id, record.turn] = record
    for path in served:
        lines = {(line["id"], line["turn"]): line for line in map(json.loads, path.read_text().splitlines())}
        same = [key for key, line in lines.items() if line["answer"] == expected[key]]
        print(f"{path.name}: {len(same)} of {len(lines)} answers are ours token by token")
        for name, keys in (("all answers", list(lines)), ("equal answers", same)):
            if not keys or lines[keys[0]].get("num_drafts") is None:
                continue
            drafts = sum(lines[key]["num_drafts"] for key in keys)
            accepted = sum(lines[key]["num_accepted_tokens"] for key in keys)
            depths = zip(*(lines[key]["num_accepted_tokens_per_pos"] for key in keys), strict=True)
            by_position = [sum(column) / drafts for column in depths]
            print(
                f"  {name}, vLLM: τ {1 + accepted / drafts:.4f} over {drafts} drafts, by position {_shown(by_position)}"
            )
            for draft, chain in chains.items():
                cycles = [count for key in keys for count in chain[key].accepted]
                ours = [sum(count > level for count in cycles) / len(cycles) for level in range(len(by_position))]
                tau = 1 + sum(cycles) / len(cycles)
                print(f"  {name}, chain of {draft}: τ {tau:.4f} over {len(cycles)} drafts, by position {_shown(ours)}; "
                      f"vLLM's is {100 * ((1 + accepted / drafts) / tau - 1):+.2f} %")  # fmt: skip


def _shown(rates: list[float]) -> str:
    return " ".join(f"{rate:.4f}" for rate in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("prompts")
    for name in ("records", "benchmark", "out"):
        step.add_argument(name, type=Path)
    step = steps.add_parser("serve")
    for name in ("target", "draft", "prompts", "out"):
        step.add_argument(name, type=Path)
    step.add_argument("--depth", type=int, default=3)
    step = steps.add_parser("compare")
    for name in ("records", "prompts"):
        step.add_argument(name, type=Path)
    step.add_argument("served", type=Path, nargs="+")
    given = parser.parse_args()
    if given.step == "prompts":
        write_prompts(given.records, given.benchmark, given.out)
    elif given.step == "serve":
        draft = None if str(given.draft) == "none" else given.draft
        serve(given.target, draft, given.prompts, given.out, given.depth)
    else:
        compare(given.records, given.prompts, given.served)


if __name__ == "__main__":
    main()
