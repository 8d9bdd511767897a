"""`hass-benchmark`: heads × decoders × benchmarks × temperatures, measured together.

    hass-benchmark                                                         # the head that ships with the package
    hass-benchmark draft=runs/quickstart                                   # a head, on its validation questions
    hass-benchmark 'drafts=[runs/a,runs/b]' 'decoders=[autoregressive,prompt_lookup,dynamic_tree]' \
        'benchmarks=[mt_bench,gsm8k]' 'temperatures=[0,1]' limit=20

Lists need brackets, because Hydra treats a bare comma as a sweep. Running the same command again measures only what is
missing in `records.jsonl`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from hass_lightning.commands.command import command
from hass_lightning.data.from_config import answer_limit, load_prompts
from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding import Decoder
from hass_lightning.draft.checkpoint import packaged_head
from hass_lightning.measure.acceptance_profile import write_acceptance_profile
from hass_lightning.measure.benchmark import run_benchmark, summarize
from hass_lightning.measure.explain import explain
from hass_lightning.measure.heads import decoding_models, heads_of, load_drafts
from hass_lightning.measure.predictions import TIMED_PROMPTS, predicted_rows
from hass_lightning.measure.record import BASELINE, Record
from hass_lightning.measure.tuning import Tuned, tune_tree
from hass_lightning.measure.verdicts import verdicts
from hass_lightning.report import benchmark_report
from hass_lightning.report.explain import explain_report
from hass_lightning.runs.config import load_node
from hass_lightning.runs.folder import write_metrics
from hass_lightning.runs.from_config import followed, run_config
from hass_lightning.runs.provenance import write_provenance
from hass_lightning.runs.screen import stage
from hass_lightning.target_model.model import TargetModel
from hass_lightning.types import Conversation, Sampling

log = logging.getLogger(__name__)
ROW_KEYS = (
    "draft", "decoder", "benchmark", "temperature", "acceptance_length", "acceptance_length_low",
    "acceptance_length_high", "speedup", "speedup_low", "speedup_high", "num_prompts", "num_identical",
)  # fmt: skip


@command("benchmark")
def main(config: DictConfig) -> dict[str, Any]:
    """Measure saved heads and write records, tables and the report to the run folder."""
    output_dir = Path(config.paths.run_dir)
    if config.tune and config.replay:
        raise ValueError(
            "tune=true times decoding trees, but replay=true measures without timing: set one of them to false."
        )
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    samplings = [Sampling(float(t), float(config.top_p), config.top_k) for t in config.temperatures]
    decoders = chosen_decoders(config)
    saved = load_drafts(chosen_heads(config))
    write_provenance(output_dir, config)
    with stage("target") as loading:
        target: TargetModel = instantiate(config.target)
        loading.detail = target.name
    for label, draft in saved.items():
        draft.check_fit(label, target)
    small: TargetModel | None = load_node("target", config.small_model) if config.small_model else None
    models = decoding_models(saved, target, small)
    fp32 = (
        decoding_models(saved, target.in_fp32(), small and small.in_fp32())
        if config.num_checked and not config.replay
        else None
    )
    records: list[Record] = []
    asked: dict[str, list[Conversation]] = {}
    tuned: Tuned | None = None
    timed: list[list[int]] = []
    for name in config.benchmarks:
        prompts = load_prompts(name, config, target)
        if config.tune:
            prompts, tuned = tune_tree(models, prompts, config.max_new_tokens, output_dir, tuned)
            decoders = tuned.decoders
        asked[name] = prompts
        timed = timed or [encode_prompt(target.tokenizer, prompt.messages[:1]) for prompt in prompts[:TIMED_PROMPTS]]
        with stage("measuring"):
            records += run_benchmark(
                models,
                decoders,
                prompts,
                max_new_tokens=answer_limit(name, config.max_new_tokens),
                samplings=samplings,
                benchmark=name,
                seed=config.seed,
                records_path=output_dir / "records.jsonl",
                checked_prompts=config.num_checked if 0.0 in [s.temperature for s in samplings] else 0,
                fp32_models=fp32,
                replay=config.replay,
            )
    rows = summarize(records)
    if tuned:
        cost_rows = tuned.cost_rows(rows)
    elif config.replay:
        cost_rows = []  # a replay is not timed
    else:
        costs = output_dir / "cost_model.json"
        cost_rows = predicted_rows(next(iter(models.values())), decoders, timed, records, costs)
    questions = {prompt.id: prompt.question for prompts in asked.values() for prompt in prompts}
    with stage("report") as report:
        benchmark_report(output_dir, rows, records, target.tokenizer, cost_rows, prompts=questions)
        report.detail = "report.html"
        if config.explain:
            report.detail = explain_report(output_dir, explain(models, asked, records)).name
    result: dict[str, Any] = {
        "rows": [{key: row.get(key) for key in ROW_KEYS} for row in rows],
        "verdicts": verdicts(records, list(saved)),
        **({"cost_model": cost_rows, "tuned": tuned.decoders["tuned_tree"].__dict__} if tuned else {}),
        "run_dir": str(output_dir),
    }
    if config.profile:
        write_acceptance_profile(output_dir / "acceptance_profile.json", records)
    write_metrics(output_dir, result)
    return result


def chosen_decoders(config: DictConfig) -> dict[str, Decoder]:
    """The decoders of `decoders`; where the command line sets none, the baseline and the decoder of the head's run."""
    run = run_config(config)
    given = [override.partition("=")[0] for override in HydraConfig.get().overrides.task]
    if run is not None and "decoding" in run and "decoders" not in given:
        own: Decoder = instantiate(followed(run.decoding, "decoding"))
        return {BASELINE: load_node("decoding", BASELINE), own.name: own}
    return {name: load_node("decoding", name) for name in config.decoders}


def chosen_heads(config: DictConfig) -> list[str]:
    """Return the folders of the heads to measure: `drafts`, or `draft` if there are none."""
    if config.drafts:
        return [head for path in config.drafts for head in heads_of(path)]
    draft = packaged_head(config.target.name) if config.draft == "packaged" else config.draft
    return [draft] if draft else []


if __name__ == "__main__":
    main()
