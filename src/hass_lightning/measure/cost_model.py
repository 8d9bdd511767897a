"""What a cycle of a draft tree costs on this machine, and so which tree pays (field.md §6.3).

    speedup = τ · baseline / (draft(depth, width) + verify(num_nodes) + overhead)

Costs are fitted to a few timed calls of the real decoders; τ comes from replay.py or from records. Prefill is left out:
compare with `speedup(…, prefill=False)`. A batch of B sequences drafts B·width rows and verifies B·num_nodes tokens,
and the formula holds with those (what a batch costs beyond that, such as ragged rows, is not modelled).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy.optimize import nnls

from hass_lightning.decoding import Autoregressive, DynamicTree
from hass_lightning.decoding.models import Decoder, DecodingModels
from hass_lightning.decoding.tree import num_candidates
from hass_lightning.measure.cells import Cell
from hass_lightning.measure.replay import RecordedTrees, record_trees, replay_sizes
from hass_lightning.progress import progress_bar
from hass_lightning.types import DecodeResult, Sampling

Tree = tuple[int, int, int]  # num_nodes (root counted), depth, width
TIMED_TREES: tuple[Tree, ...] = ((2, 1, 1), (4, 3, 1), (8, 2, 4), (8, 5, 2), (16, 4, 4), (32, 4, 8), (60, 6, 10))


@dataclass(frozen=True)
class CycleSeconds:
    """Seconds of one cycle by phase."""

    draft: float
    verify: float
    overhead: float

    @property
    def total(self) -> float:
        """The whole cycle."""
        return self.draft + self.verify + self.overhead

    @classmethod
    def of(cls, result: DecodeResult) -> CycleSeconds:
        """Means over the cycles of one answer.

        Raises:
            ValueError: the answer ended in the prefill.
        """
        cycles = len(result.accepted)
        if not cycles:
            raise ValueError("an answer of one token has no cycle to time: raise max_new_tokens.")
        seconds = result.seconds
        return cls(seconds["draft"] / cycles, seconds["verify"] / cycles, seconds["bookkeeping"] / cycles)


@dataclass(frozen=True)
class CostModel:
    """Fitted costs in seconds.

    Attributes:
        baseline: one autoregressive cycle. verify_nodes, verify_seconds: points of the verify cost, linear in between.
        draft: coefficients of [1, levels below the first, rows of those levels, candidates of the search].
        overhead: bookkeeping of a cycle.
    """

    baseline: float
    verify_nodes: tuple[int, ...]
    verify_seconds: tuple[float, ...]
    draft: tuple[float, ...]
    overhead: float

    @classmethod
    def fit(cls, baseline: CycleSeconds, timed: Mapping[Tree, CycleSeconds]) -> CostModel:
        """From timed cycles of autoregressive decoding and of several trees.

        Raises:
            ValueError: no tree was timed.
        """
        if not timed:
            raise ValueError("a cost model needs at least one timed tree.")
        by_nodes: dict[int, list[float]] = defaultdict(list)
        by_nodes[1].append(baseline.verify)
        for (num_nodes, _, _), seconds in timed.items():
            by_nodes[num_nodes].append(seconds.verify)
        nodes = sorted(by_nodes)
        verifying = np.array([median(by_nodes[count]) for count in nodes])
        # isotonic: more nodes never cost less; as a sum of steps that are not negative
        steps = np.tril(np.ones((len(nodes), len(nodes))))
        verify = steps @ nnls(steps / verifying[:, None], np.ones(len(nodes)))[0]
        features = np.array([_draft_features(depth, width) for _, depth, width in timed])
        drafting = np.array([each.draft for each in timed.values()])
        # relative errors count, and no part of the work takes negative time
        draft, _ = nnls(features / drafting[:, None], np.ones(len(drafting)))
        return cls(
            baseline=baseline.total,
            verify_nodes=tuple(nodes),
            verify_seconds=tuple(float(value) for value in verify),
            draft=tuple(float(value) for value in draft),
            overhead=median(each.overhead for each in timed.values()),
        )

    def verify_cost(self, num_nodes: int, batch_size: int = 1) -> float:
        """Seconds to verify `num_nodes` tokens of each of `batch_size` sequences."""
        count = num_nodes * batch_size
        nodes, seconds = self.verify_nodes, self.verify_seconds
        if count <= nodes[-1] or len(nodes) == 1:
            return float(np.interp(count, nodes, seconds))
        slope = (seconds[-1] - seconds[-2]) / (nodes[-1] - nodes[-2])
        return seconds[-1] + slope * (count - nodes[-1])

    def draft_cost(self, depth: int, width: int, batch_size: int = 1) -> float:
        """Seconds to draft a tree for each of `batch_size` sequences."""
        return float(np.dot(self.draft, _draft_features(depth, width, batch_size)))

    def cycle_cost(self, tree: Tree, batch_size: int = 1) -> float:
        """Seconds of one cycle."""
        num_nodes, depth, width = tree
        return self.draft_cost(depth, width, batch_size) + self.verify_cost(num_nodes, batch_size) + self.overhead

    def speedup(self, tau: float, tree: Tree, batch_size: int = 1) -> float:
        """Predicted speedup without prefill, at acceptance length `tau` (the bonus token counted)."""
        # a larger batch makes the baseline's forward dearer, too
        baseline = self.baseline + self.verify_cost(1, batch_size) - self.verify_cost(1)
        return tau * baseline / self.cycle_cost(tree, batch_size)


def _draft_features(depth: int, width: int, batch_size: int = 1) -> list[float]:
    levels = depth - 1
    return [1.0, levels, levels * width * batch_size, num_candidates(depth, width) * batch_size]


def time_cycles(
    models: DecodingModels,
    prompts: Sequence[Sequence[int]],
    trees: Sequence[Tree] = TIMED_TREES,
    *,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> tuple[CycleSeconds, dict[Tree, CycleSeconds]]:
    """Autoregressive decoding and each tree on every prompt, greedy, interleaved in random order after a warm-up.

    Args:
        prompts: token ids; cycles get dearer with length, so take prompts like those to be decoded. The median over
            prompts is kept: take three or more.

    Raises:
        ValueError: a tree wider than the draft vocabulary, no prompt, or answers of one token.
    """
    if not prompts:
        raise ValueError("the costs are timed on prompts, and there is none.")
    decoders: dict[Tree | None, Decoder] = {None: Autoregressive()}
    decoders |= {tree: DynamicTree(*tree) for tree in trees}
    cells = {tree: Cell("", decoder.name, decoder, models, Sampling()) for tree, decoder in decoders.items()}
    for cell in cells.values():
        cell.decoder.check(models)
        cell.decode(list(prompts[0]), min(8, max_new_tokens))
    runs: list[dict[Tree | None, CycleSeconds]] = []
    shuffle = random.Random(seed).shuffle
    for prompt in prompts:
        order = list(cells)
        shuffle(order)
        results = {tree: cells[tree].decode(list(prompt), max_new_tokens) for tree in order}
        if all(result.accepted for result in results.values()):
            runs.append({tree: CycleSeconds.of(result) for tree, result in results.items()})
    if not runs:
        raise ValueError("all answers ended after one token: nothing can be timed on these prompts.")
    usual = median(run[None].total for run in runs)

    def typical(tree: Tree | None) -> CycleSeconds:
        # relative to the baseline of the same prompt: a long context or a busy minute slows both
        parts = [[value * usual / run[None].total for value in vars(run[tree]).values()] for run in runs]
        return CycleSeconds(*(median(column) for column in zip(*parts, strict=True)))

    return typical(None), {tree: typical(tree) for tree in trees}


@dataclass(frozen=True)
class Prediction:
    """A tree with what is expected of it."""

    num_nodes: int
    depth: int
    width: int
    tau: float
    speedup: float

    def decoding_yaml(self) -> str:
        """The text of a conf/decoding file."""
        return (
            f"# Found by hass-benchmark tune=true: τ {self.tau:.2f}, speedup {self.speedup:.2f}× without prefill "
            "(predicted)\n"
            "_target_: hass_lightning.decoding.DynamicTree\n"
            f"num_nodes: {self.num_nodes}\ndepth: {self.depth}\nwidth: {self.width}\n"
        )


def predict(cost: CostModel, recorded: Sequence[RecordedTrees], trees: Iterable[Tree]) -> list[Prediction]:
    """Replayed τ and predicted speedup of each tree, the fastest first.

    Raises:
        ValueError: a tree deeper or wider than recorded, or nothing recorded.
    """
    if not any(trees_of_answer.positions for trees_of_answer in recorded):
        raise ValueError("no position was recorded: the answers are shorter than the recorded depth.")
    grouped: dict[tuple[int, int], list[int]] = defaultdict(list)
    for num_nodes, depth, width in trees:
        grouped[depth, width].append(num_nodes)
    predictions = []
    for (depth, width), sizes in grouped.items():
        for num_nodes, (tokens, forwards) in replay_sizes(recorded, sizes, depth, width).items():
            tau = tokens / forwards
            speedup = cost.speedup(tau, (num_nodes, depth, width))
            predictions.append(Prediction(num_nodes, depth, width, tau, speedup))
    return sorted(predictions, key=lambda each: -each.speedup)


def tree_grid(
    depth: int = 6, width: int = 10, sizes: Sequence[int] = (2, 3, 4, 6, 8, 10, 12, 16, 20, 26, 32, 40, 50, 60)
) -> list[Tree]:
    """Trees up to this depth and width, chains (width 1) among them: what a search looks through."""
    widths = [each for each in (1, 2, 3, 4, 6, 8, 10) if each <= width]
    grid = {(each + 1, each, 1) for each in range(1, depth + 1)}
    for levels in range(1, depth + 1):
        for each in widths[1:]:
            largest = num_candidates(levels, each) + 1
            # a tree with fewer nodes than levels is a chain, which is drafted more cheaply as one
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
    """The trees up to this depth and width, the one that pays most first: a few timed calls, then a replay.

    A recommendation is chosen for being good on these prompts: measure it on others before claiming its speed.

    Args:
        depth, width: of the largest tree that is recorded; EAGLE-2's (6, 10), so that it can be predicted, too.
        prompts: token ids; `timed_prompts` of them are timed with each of `TIMED_TREES`, all are recorded.

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
    """Predicted beside measured speedup (without prefill) of each tree, for the report.

    Args:
        measured: speedup of trees that were decoded on *other* prompts than the recorded ones, if it is to be a test.
    """
    predictions = {(each.num_nodes, each.depth, each.width): each for each in predict(cost, recorded, measured)}
    return [
        {
            "name": f"{tree[0]} nodes, depth {tree[1]}, width {tree[2]}",
            "num_nodes": tree[0],
            "depth": tree[1],
            "width": tree[2],
            "predicted_acceptance_length": predictions[tree].tau,
            "predicted_speedup": predictions[tree].speedup,
            "measured_speedup": speedup,
            "relative_error": predictions[tree].speedup / speedup - 1,
        }
        for tree, speedup in measured.items()
    ]
