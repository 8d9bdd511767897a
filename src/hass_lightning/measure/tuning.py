"""Choice of a tree size by the cost model (`hass-benchmark tune=true`)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hass_lightning.data.tokens import encode_prompt
from hass_lightning.decoding import Autoregressive, Decoder, DecodingModels, DynamicTree
from hass_lightning.decoding.tree import num_candidates
from hass_lightning.measure.cost_model import TIMED_TREES, CostModel, Tree, time_cycles
from hass_lightning.measure.predictions import predicted_row, tree_of
from hass_lightning.measure.record import BASELINE
from hass_lightning.measure.tree_replay import RecordedTrees, record_trees, replay_sizes
from hass_lightning.runs.progress import progress_bar
from hass_lightning.types import Conversation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """A tree with its predicted τ and speedup."""

    num_nodes: int
    depth: int
    width: int
    tau: float
    speedup: float

    @property
    def tree(self) -> Tree:
        """The size of the tree."""
        return self.num_nodes, self.depth, self.width

    def decoding_yaml(self) -> str:
        """Return the text of a file for conf/decoding."""
        return (
            f"# Found by hass-benchmark tune=true: τ {self.tau:.2f}, speedup {self.speedup:.2f}× without prefill "
            "(predicted)\n"
            "_target_: hass_lightning.decoding.DynamicTree\n"
            f"num_nodes: {self.num_nodes}\ndepth: {self.depth}\nwidth: {self.width}\n"
        )


def predict(cost: CostModel, recorded: Sequence[RecordedTrees], trees: Iterable[Tree]) -> list[Prediction]:
    """Return replayed τ and predicted speedup of each tree, the fastest first.

    Raises:
        ValueError: a tree deeper or wider than recorded, or nothing recorded.
    """
    if not any(trees_of_answer.positions for trees_of_answer in recorded):
        raise ValueError("no position was recorded: the answers are shorter than the recorded depth.")
    sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for num_nodes, depth, width in trees:
        sizes[depth, width].append(num_nodes)
    predictions = [
        Prediction(num_nodes, *shape, tokens / forwards, cost.speedup(tokens / forwards, (num_nodes, *shape)))
        for shape, nodes in sizes.items()
        for num_nodes, (tokens, forwards) in replay_sizes(recorded, nodes, *shape).items()
    ]
    return sorted(predictions, key=lambda each: -each.speedup)


def tree_grid(
    depth: int = 6, width: int = 10, sizes: Sequence[int] = (2, 3, 4, 6, 8, 10, 12, 16, 20, 26, 32, 40, 50, 60)
) -> list[Tree]:
    """Return the trees up to this depth and width, including chains (width 1)."""
    widths = [each for each in (1, 2, 3, 4, 6, 8, 10) if each <= width]
    grid = {(each + 1, each, 1) for each in range(1, depth + 1)}
    for levels in range(1, depth + 1):
        for each in widths[1:]:
            largest = num_candidates(levels, each) + 1
            # a tree with fewer nodes than levels is a chain, which is drafted more cheaply as such
            grid |= {(size, levels, each) for size in sizes if levels + 1 < size <= largest}
    return sorted(grid)


def tune(
    models: DecodingModels,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    timed_prompts: int = 4,
    depth: int = 6,
    width: int = 10,
    seed: int = 0,
) -> tuple[CostModel, list[RecordedTrees], list[Prediction]]:
    """Return the trees up to this depth and width, the fastest first, predicted from a few timed calls and a replay.

    The best tree is selected on these prompts: measure it on others before claiming its speed.

    Args:
        models: the models.
        prompts: token ids; `timed_prompts` of them are timed with each of `TIMED_TREES`, all are recorded.
        max_new_tokens: maximum number of tokens per answer.
        timed_prompts: number of prompts to time.
        depth, width: size of the largest tree that is recorded; by default EAGLE-2's (6, 10), so that it can be
            predicted.
        seed: seed of the order of timing.

    Raises:
        ValueError: as `time_cycles` and `predict`.
    """
    width = min(width, len(models.draft_vocabulary))
    trees = [tree for tree in TIMED_TREES if tree[2] <= width]
    with progress_bar("tune", len(prompts) + 2, "step") as bar:
        timed = time_cycles(models, prompts[:timed_prompts], trees, max_new_tokens=max_new_tokens, seed=seed)
        bar.update()
        recorded = []
        for prompt in prompts:
            answer = Autoregressive().generate(models, list(prompt), max_new_tokens).token_ids
            recorded.append(record_trees(models, prompt, answer, depth, width))
            bar.update()
        cost = CostModel.fit(*timed)
        predictions = predict(cost, recorded, tree_grid(depth, width))
        bar.update()
    return cost, recorded, predictions


def compare_with_measured(
    cost: CostModel, recorded: Sequence[RecordedTrees], measured: Mapping[Tree, float]
) -> list[dict[str, float | int | str]]:
    """Return predicted and measured speedup (without prefill) of each tree, for the report.

    Args:
        cost: the cost model.
        recorded: the recorded trees.
        measured: speedup by tree. Use *other* prompts than the recorded ones to test the prediction.
    """
    predictions = {each.tree: each for each in predict(cost, recorded, measured)}
    return [
        {
            **predicted_row("{} nodes, depth {}, width {}".format(*tree), predictions[tree].speedup, speedup),
            **dict(zip(("num_nodes", "depth", "width"), tree, strict=True)),
            "predicted_acceptance_length": predictions[tree].tau,
        }
        for tree, speedup in measured.items()
    ]


@dataclass
class Tuned:
    """The result of `tune=true`, and the trees that are measured on other prompts than those used for tuning."""

    cost: CostModel
    recorded: list[RecordedTrees]
    decoders: dict[str, Decoder]

    def cost_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return predicted and measured speedup for the report, as means over benchmarks weighted by prompts."""
        measured = {}
        for name, decoder in self.decoders.items():
            found = [row for row in rows if row["decoder"] == name and row["speedup_without_prefill"]]
            tree = tree_of(decoder)
            if tree and found:
                speedups, weights = zip(
                    *((row["speedup_without_prefill"], row["num_prompts"]) for row in found), strict=True
                )
                measured[tree] = float(np.average(speedups, weights=weights))
        return compare_with_measured(self.cost, self.recorded, measured)


def tune_tree(
    models: dict[str, DecodingModels],
    prompts: list[Conversation],
    max_new_tokens: int,
    output_dir: Path,
    before: Tuned | None,
) -> tuple[list[Conversation], Tuned]:
    """Choose a tree on a quarter of the prompts (of the first benchmark); return the other prompts to measure it on.

    The file `tuned_tree.yaml` in the run folder can be copied to conf/decoding.

    Raises:
        ValueError: not exactly one head, or fewer than eight prompts.
    """
    if len(models) != 1 or next(iter(models)) == "":
        raise ValueError("tune=true needs exactly one head: set draft=<run folder>.")
    if before is not None:
        return prompts, before
    count = len(prompts) // 4
    if count < 2:
        raise ValueError(f"tune=true needs at least 8 prompts, got {len(prompts)}: increase limit.")
    (each,) = models.values()
    ids = [encode_prompt(each.target.tokenizer, prompt.messages[:1]) for prompt in prompts[:count]]
    cost, recorded, predictions = tune(each, ids, max_new_tokens=max_new_tokens)
    best = predictions[0]
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "tuned_tree.yaml").write_text(best.decoding_yaml())
    log.info("tuned on %d prompts: %s", count, best)
    decoders: dict[str, Decoder] = {
        BASELINE: Autoregressive(),
        "tuned_tree": DynamicTree(*best.tree),
        "eagle2_tree": DynamicTree(60, 6, 10),
    }
    others = {(4, 3, 1), (8, 3, 2), (16, 4, 4), (32, 5, 6)} - {best.tree}
    decoders |= {"tree_{}_{}_{}".format(*tree): DynamicTree(*tree) for tree in sorted(others)}
    return prompts[count:], Tuned(cost, recorded, decoders)
