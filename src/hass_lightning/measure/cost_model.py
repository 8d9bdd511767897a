"""Cost model of a cycle with a draft tree on this machine, and the speedup that it predicts.

    speedup = τ · baseline / (draft(depth, width) + verify(num_nodes) + overhead)

Costs are fitted to a few timed calls of the decoders; τ comes from tree_replay.py or from records. Prefill is excluded:
compare with `speedup(…, prefill=False)`. A batch of B sequences drafts B·width rows and verifies B·num_nodes tokens,
with which the formula holds (other costs of a batch, such as different lengths, are not modeled).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy.optimize import isotonic_regression, nnls

from hass_lightning.decoding import Autoregressive, DynamicTree
from hass_lightning.decoding.models import Decoder, DecodingModels
from hass_lightning.decoding.tree import num_candidates
from hass_lightning.measure.benchmark_cells import Cell
from hass_lightning.types import DecodeResult, Sampling

Tree = tuple[int, int, int]  # num_nodes (including the root), depth, width
TIMED_TREES: tuple[Tree, ...] = ((2, 1, 1), (4, 3, 1), (8, 2, 4), (8, 5, 2), (16, 4, 4), (32, 4, 8), (60, 6, 10))


@dataclass(frozen=True)
class CycleSeconds:
    """Seconds of one cycle by phase."""

    draft: float
    verify: float
    overhead: float

    @property
    def total(self) -> float:
        """Seconds of the whole cycle."""
        return self.draft + self.verify + self.overhead

    @classmethod
    def of(cls, result: DecodeResult) -> CycleSeconds:
        """Return the means over the cycles of one answer.

        Raises:
            ValueError: if the answer ended in the prefill.
        """
        cycles = len(result.accepted)
        if not cycles:
            raise ValueError("an answer of one token has no cycle to time: raise max_new_tokens.")
        return cls(*(result.seconds[phase] / cycles for phase in ("draft", "verify", "bookkeeping")))


@dataclass(frozen=True)
class CostModel:
    """Fitted costs in seconds.

    Attributes:
        baseline: one autoregressive cycle.
        verify_nodes, verify_seconds: points of the verification cost, which is linear in between.
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
        """Fit the costs to timed cycles of autoregressive decoding and of several trees.

        Raises:
            ValueError: if no tree was timed.
        """
        if not timed:
            raise ValueError("a cost model needs at least one timed tree.")
        by_nodes = {1: [baseline.verify]}
        for (num_nodes, _, _), seconds in timed.items():
            by_nodes.setdefault(num_nodes, []).append(seconds.verify)
        nodes = sorted(by_nodes)
        verifying = np.array([median(by_nodes[count]) for count in nodes])
        # minimize relative errors; more nodes never cost less, and no cost is negative
        verify = isotonic_regression(verifying, weights=verifying**-2.0).x
        features = np.array([_draft_features(depth, width) for _, depth, width in timed])
        drafting = np.array([each.draft for each in timed.values()])
        draft, _ = nnls(features / drafting[:, None], np.ones(len(drafting)))
        overhead = median(each.overhead for each in timed.values())
        return cls(baseline.total, tuple(nodes), tuple(verify.tolist()), tuple(draft.tolist()), overhead)

    def verify_cost(self, num_nodes: int, batch_size: int = 1) -> float:
        """Return the seconds to verify `num_nodes` tokens of each of `batch_size` sequences."""
        count = num_nodes * batch_size
        nodes, seconds = self.verify_nodes, self.verify_seconds
        if count <= nodes[-1] or len(nodes) == 1:
            return float(np.interp(count, nodes, seconds))
        slope = (seconds[-1] - seconds[-2]) / (nodes[-1] - nodes[-2])
        return seconds[-1] + slope * (count - nodes[-1])

    def draft_cost(self, depth: int, width: int, batch_size: int = 1) -> float:
        """Return the seconds to draft a tree for each of `batch_size` sequences."""
        return float(np.dot(self.draft, _draft_features(depth, width, batch_size)))

    def cycle_cost(self, tree: Tree, batch_size: int = 1, drafting: float = 1.0) -> float:
        """Return the mean seconds of a cycle if the head drafts in a fraction `drafting` of the cycles."""
        num_nodes, depth, width = tree
        draft = drafting * self.draft_cost(depth, width, batch_size)
        return draft + self.verify_cost(num_nodes, batch_size) + self.overhead

    def speedup(self, tau: float, tree: Tree, batch_size: int = 1, drafting: float = 1.0) -> float:
        """Return the predicted speedup without prefill at acceptance length `tau` (including the bonus token)."""
        # a larger batch also makes the baseline's forward more expensive
        baseline = self.baseline + self.verify_cost(1, batch_size) - self.verify_cost(1)
        return tau * baseline / self.cycle_cost(tree, batch_size, drafting)


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
    """Time autoregressive decoding and each tree on every prompt: greedy, interleaved in random order, after a warm-up.

    Args:
        models: the models.
        prompts: token ids. Cycles get more expensive with length, so use prompts like those to be decoded. The median
            over prompts is used: pass three or more.
        trees: the trees to time.
        max_new_tokens: maximum number of tokens per answer.
        seed: seed of the order.

    Raises:
        ValueError: a tree wider than the draft vocabulary, no prompt, or answers of one token.
    """
    if not prompts:
        raise ValueError("the costs are timed on prompts, but there are none.")
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
        # relative to the baseline of the same prompt: a long context or other processes slow both
        parts = [[value * usual / run[None].total for value in vars(run[tree]).values()] for run in runs]
        return CycleSeconds(*(median(column) for column in zip(*parts, strict=True)))

    return typical(None), {tree: typical(tree) for tree in trees}
