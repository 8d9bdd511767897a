"""`hass-benchmark`: heads × decoders × benchmarks × temperatures, measured side by side.

    hass-benchmark draft=runs/quickstart                                   # the validation questions again
    hass-benchmark 'drafts=[runs/a,runs/b]' 'decoders=[autoregressive,prompt_lookup,dynamic_tree]' \
        'benchmarks=[mt_bench,gsm8k]' 'temperatures=[0,1]' limit=20

Lists are lists: a bare comma is Hydra's sweep. Started again, it measures only what `records.jsonl` lacks.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hass_lightning.cli import command
from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding import Autoregressive, Decoder, DecodingModels, DynamicTree
from hass_lightning.draft import SavedDraft, load_draft
from hass_lightning.ledger import Ledger
from hass_lightning.measure.benchmark import run_benchmark, summarize
from hass_lightning.measure.cost_model import compare_with_measured, tune
from hass_lightning.measure.predicted import TIMED_PROMPTS, predicted_rows
from hass_lightning.measure.trace import BASELINE, Record
from hass_lightning.measure.verdicts import compare_benchmarks
from hass_lightning.provenance import write_provenance
from hass_lightning.report import benchmark_report
from hass_lightning.target.model import TargetModel
from hass_lightning.types import Conversation, Sampling

log = logging.getLogger(__name__)
ROW_KEYS = (
    "draft", "decoder", "benchmark", "temperature", "acceptance_length", "acceptance_length_low",
    "acceptance_length_high", "speedup", "speedup_low", "speedup_high", "num_prompts", "num_identical",
)  # fmt: skip


@command("benchmark")
def main(config: DictConfig) -> dict[str, Any]:
    """Measure saved heads; the records, tables and the report are in the run folder."""
    output_dir = Path(config.paths.run_dir)
    if config.tune and config.replay:
        raise ValueError("tune=true times trees and replay=true times nothing: set one of them to false.")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    samplings = [Sampling(float(t), float(config.top_p), config.top_k) for t in config.temperatures]
    decoders = {name: load_node("decoding", name) for name in config.decoders}
    paths = [config.draft] if config.draft else [head for path in config.drafts for head in heads_of(path)]
    saved = load_drafts(paths)
    write_provenance(output_dir, config)
    target: TargetModel = instantiate(config.target)
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
    questions: dict[str, str] = {}
    tuned: Tuned | None = None
    timed: list[list[int]] = []
    for name in config.benchmarks:
        prompts = load_prompts(name, config, target)
        if config.tune:
            prompts, tuned = tune_tree(models, prompts, config.max_new_tokens, output_dir, tuned)
            decoders = tuned.decoders
        questions |= {prompt.id: prompt.question for prompt in prompts}
        timed = timed or [encode_prompt(target.tokenizer, prompt.messages[:1]) for prompt in prompts[:TIMED_PROMPTS]]
        records += run_benchmark(
            models,
            decoders,
            prompts,
            max_new_tokens=config.max_new_tokens,
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
        cost_rows = []  # nothing was timed
    else:
        costs = output_dir / "cost_model.json"
        cost_rows = predicted_rows(next(iter(models.values())), decoders, timed, records, costs)
    benchmark_report(output_dir, rows, records, target.tokenizer, cost_rows, prompts=questions)
    result: dict[str, Any] = {
        "rows": [{key: row.get(key) for key in ROW_KEYS} for row in rows],
        "verdicts": verdicts(records, list(saved)),
        **({"cost_model": cost_rows, "tuned": tuned.decoders["tuned_tree"].__dict__} if tuned else {}),
        "run_dir": str(output_dir),
    }
    (output_dir / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


@dataclass
class Tuned:
    """What `tune=true` found, and the trees that are measured on other prompts than it was found on."""

    cost: Any
    recorded: Any
    decoders: dict[str, Decoder]

    def cost_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Predicted beside measured speedup, the mean over benchmarks weighted by prompts, for the report."""
        measured = {}
        for name, decoder in self.decoders.items():
            found = [row for row in rows if row["decoder"] == name and row["speedup_without_prefill"]]
            if isinstance(decoder, DynamicTree) and found:
                weights = [row["num_prompts"] for row in found]
                total = sum(row["speedup_without_prefill"] * weight for row, weight in zip(found, weights, strict=True))
                measured[decoder.num_nodes, decoder.depth, decoder.width] = total / sum(weights)
        return compare_with_measured(self.cost, self.recorded, measured)


def tune_tree(
    models: dict[str, DecodingModels],
    prompts: list[Conversation],
    max_new_tokens: int,
    output_dir: Path,
    before: Tuned | None,
) -> tuple[list[Conversation], Tuned]:
    """Choose a tree on a quarter of the prompts (of the first benchmark); the others are left to measure it on.

    `tuned_tree.yaml` in the run folder is the file for conf/decoding.

    Raises:
        ValueError: not exactly one head, or fewer than eight prompts.
    """
    if len(models) != 1 or next(iter(models)) == "":
        raise ValueError("tune=true takes exactly one head: give draft=<run folder>.")
    if before is not None:
        return prompts, before
    count = len(prompts) // 4
    if count < 2:
        raise ValueError(f"tune=true needs at least 8 prompts, and there are {len(prompts)}: raise limit.")
    (each,) = models.values()
    ids = [encode_prompt(each.target.tokenizer, prompt.messages[:1]) for prompt in prompts[:count]]
    cost, recorded, predictions = tune(each, ids, max_new_tokens=max_new_tokens)
    best = predictions[0]
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "tuned_tree.yaml").write_text(best.decoding_yaml())
    log.info("tuned on %d prompts: %s", count, best)
    decoders: dict[str, Decoder] = {
        BASELINE: Autoregressive(),
        "tuned_tree": DynamicTree(best.num_nodes, best.depth, best.width),
        "eagle2_tree": DynamicTree(60, 6, 10),
    }
    for nodes, depth, width in ((4, 3, 1), (8, 3, 2), (16, 4, 4), (32, 5, 6)):
        if (nodes, depth, width) != (best.num_nodes, best.depth, best.width):
            decoders[f"tree_{nodes}_{depth}_{width}"] = DynamicTree(nodes, depth, width)
    return prompts[count:], Tuned(cost, recorded, decoders)


def load_node(group: str, name: str) -> Any:
    """Instantiate `conf/<group>/<name>.yaml` (or a user's own on the search path).

    Raises:
        ValueError: there is no such file.
    """
    return instantiate(config_node(group, name))


def config_node(group: str, name: str) -> DictConfig:
    """The composed `conf/<group>/<name>.yaml`, folders of hydra.searchpath included.

    Raises:
        ValueError: there is no such file.
    """
    folders = ",".join(str(folder) for folder in HydraConfig.get().searchpath or [])
    try:
        composed = hydra.compose(overrides=[f"+{group}={name}", f"hydra.searchpath=[{folders}]"])
    except hydra.errors.MissingConfigException as error:
        raise ValueError(f"there is no conf/{group}/{name}.yaml: see `hass-benchmark --help` for the names.") from error
    return composed[group]


def heads_of(path: str) -> list[str]:
    """The finished cells of a sweep folder, or the folder itself.

    Raises:
        ValueError: a sweep folder of which no cell has a head.
    """
    ledger = Ledger(path)
    if not ledger.path.is_file():
        return [path]
    cells = [ledger.folder_of(entry) for entry in ledger.latest().values() if entry.status == "completed"]
    found = [str(cell) for cell in cells if (cell / "draft").is_dir()]
    if not found:
        raise ValueError(f"drafts names the sweep {path}, none of whose {len(cells)} finished cells has a head.")
    return found


def load_drafts(paths: list[str]) -> dict[str, SavedDraft]:
    """Heads by label: the run folder's name, made distinct by its parent's where two are alike."""
    saved: dict[str, SavedDraft] = {}
    for path in paths:
        label = Path(path).resolve().name
        if label in saved:
            label = f"{Path(path).resolve().parent.name}/{label}"
        if label in saved:
            raise ValueError(f"drafts names {path} twice.")
        saved[label] = load_draft(path)
    return saved


def decoding_models(
    saved: dict[str, SavedDraft], target: TargetModel, small: TargetModel | None = None
) -> dict[str, DecodingModels]:
    """What the decoders take, a label each; without heads one set that has none."""
    if not saved:
        return {"": DecodingModels(target, small=small)}
    return {
        label: DecodingModels(
            target,
            draft.for_decoding(target.dtype, target.device),
            target.head.draft_vocabulary(draft.token_ids),
            small,
        )
        for label, draft in saved.items()
    }


def load_prompts(name: str, config: DictConfig, target: TargetModel) -> list[Conversation]:
    """The prompts of a benchmark; `validation` are the questions that `data` holds out."""
    if name == "validation":
        data = instantiate(config.data)(target=target)
        data.tokens()
        held_out = data.validation_conversations[config.skip :]
        if not held_out:
            raise ValueError(
                f"skip={config.skip} leaves none of {len(data.validation_conversations)} validation questions: raise "
                "data.num_validation, or lower skip."
            )
        return [c.without_answers() for c in held_out[: config.limit]]
    node = config_node("benchmark", name)
    OmegaConf.set_struct(node, False)
    node.limit = config.limit or node.get("limit")
    return instantiate(node).load()


def verdicts(records: list[Record], drafts: list[str]) -> list[str]:
    """Each head against the first one, in plain words, decoder by decoder."""
    sentences = []
    for decoder in dict.fromkeys(record.decoder for record in records if record.draft):
        for temperature in dict.fromkeys(record.temperature for record in records):
            sides = [
                [r for r in records if (r.draft, r.decoder, r.temperature) == (d, decoder, temperature)] for d in drafts
            ]
            for label, side in zip(drafts[1:], sides[1:], strict=True):
                if side and sides[0]:
                    for comparison in compare_benchmarks(side, sides[0]).values():
                        text = f"{label} against {drafts[0]} ({decoder}, T={temperature:g}): {comparison.verdict}"
                        sentences.append(text)
    return sentences


if __name__ == "__main__":
    main()
