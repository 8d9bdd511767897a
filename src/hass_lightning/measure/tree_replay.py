"""Replay of draft trees: the greedy τ of every smaller tree and of the chain, from one recording of a large tree.

The head drafts a large tree at *every* position of known greedy answers, and the ranks of the tokens that the target
generated are recorded. A decoding run then visits a subset of these positions, so any num_nodes, depth and width up to
the recorded ones take milliseconds instead of a decoding run. In exact arithmetic, depth and num_nodes are replayed
exactly. A smaller width is exact unless its frontier contains a node that the wider search did not expand (rare).

Shapes: T tokens, D hidden, C candidates of one position, W recorded width (see the legend in types.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hass_lightning.decoding.drafting import DynamicTreeProposer, HeadRows
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.decoding.tree import num_candidates


@dataclass(frozen=True)
class Candidate:
    """All candidates of one position in the order of the search (parents first), without the root."""

    scores: NDArray[Any]  # [C] float32, cumulative log-probability
    parents: NDArray[Any]  # [C] index of the parent candidate, -1 for the root
    ranks: NDArray[Any]  # [C] rank among the children of its parent, 0 is the best
    depths: NDArray[Any]  # [C] from 1
    path: tuple[int, ...]  # candidates that equal the tokens of the target, from depth 1 until the first that differs


@dataclass(frozen=True)
class RecordedTrees:
    """Candidates at the positions of one answer: position p drafts after token p of it."""

    positions: tuple[Candidate, ...]
    depth: int
    width: int


class _RecordingRows(HeadRows):
    """Records the log-probabilities of a search, level by level."""

    def __init__(self, models: DecodingModels, capacity: int):
        super().__init__(models, capacity)
        self.levels: list[Tensor] = []

    def guesses(self, features: Tensor, width: int) -> tuple[Tensor, Tensor]:
        scores, ids = super().guesses(features, width)
        self.levels.append(scores)
        return scores, ids


@torch.inference_mode()
def record_trees(
    models: DecodingModels, prompt: Sequence[int], answer: Sequence[int], depth: int = 6, width: int = 8
) -> RecordedTrees:
    """Draft at every position of a greedy answer that is followed by `depth` more tokens (so no path is truncated).

    Args:
        models: the models.
        prompt, answer: token ids; the answer as decoded greedily by any lossless decoder.
        depth, width: size of the recorded tree.
    """
    count = num_candidates(depth, width)
    tokens = [*prompt, *answer]
    proposer = DynamicTreeProposer(models, count + 1, depth, width, len(tokens))
    rows = _RecordingRows(models, len(tokens) + width * depth)
    proposer.rows = rows
    features = models.target.encode(torch.tensor([tokens]))[0]  # [T, D]
    depths = proposer.candidates.depths.cpu().numpy()
    positions = []
    start = 1
    for end in range(len(prompt) + 1, len(tokens) - depth + 1):
        rows.levels.clear()
        tree = proposer.propose(tokens[start:end], features[start - 1 : end - 1])
        start = end
        parents = tree.shape.parents[1:].cpu().numpy() - 1  # the root is -1
        ids = tree.token_ids[1:].tolist()
        own = torch.cat([level.flatten() for level in rows.levels]).cpu().numpy()
        scores = np.zeros(count, np.float32)
        for index in range(count):  # in fp32 and in the order of the search's own sums
            scores[index] = own[index] + (scores[parents[index]] if parents[index] >= 0 else 0)
        ranks = np.arange(count) % width
        path, parent = [], -1
        for token in tokens[end : end + depth]:
            found = [index for index in np.flatnonzero(parents == parent) if ids[index] == token]
            if not found:
                break
            parent = int(found[0])
            path.append(parent)
        positions.append(Candidate(scores, parents, ranks, depths, tuple(path)))
    return RecordedTrees(tuple(positions), depth, width)


def _search(candidate: Candidate, depth: int, width: int) -> NDArray[Any]:
    """Return the candidates [≤ C] that a search of this depth and width visits, in its order."""
    allowed = np.flatnonzero((candidate.depths == 1) & (candidate.ranks < width))
    kept = [allowed]
    for level in range(2, depth + 1):
        best = allowed[np.argsort(-candidate.scores[allowed], kind="stable")[:width]] if level > 2 else allowed
        children = (candidate.depths == level) & (candidate.ranks < width) & np.isin(candidate.parents, best)
        allowed = np.flatnonzero(children)
        kept.append(allowed)
    return np.concatenate(kept)


def needed_nodes(trees: RecordedTrees, depth: int, width: int) -> NDArray[Any]:
    """Return for each position and path depth the smallest num_nodes (root included) with this path: [P, depth].

    The value is inf if no tree of this depth and width contains the path.

    Raises:
        ValueError: if `depth` or `width` is larger than recorded.
    """
    if depth > trees.depth or width > trees.width:
        raise ValueError(f"depth {depth}, width {width} exceeds the recorded {trees.depth}, {trees.width}.")
    needed = np.full((len(trees.positions), depth), np.inf)
    for row, candidate in enumerate(trees.positions):
        looked_at = _search(candidate, depth, width)
        order = looked_at[np.argsort(-candidate.scores[looked_at], kind="stable")]
        place = {int(index): number for number, index in enumerate(order)}
        for level, index in enumerate(candidate.path[:depth]):
            if index not in place:
                break
            needed[row, level] = place[index] + 2  # the root is node 1
    return needed


def walk(accepted: Sequence[int]) -> list[int]:
    """Return the positions at which the cycles of a run start if `accepted[p]` tokens are accepted at position p."""
    starts, position = [], 0
    while position < len(accepted):
        starts.append(position)
        position += int(accepted[position]) + 1
    return starts


def replay(recorded: Iterable[RecordedTrees], num_nodes: int, depth: int, width: int) -> tuple[int, int]:
    """Return (verified tokens, target forwards) of greedy decoding with this tree over all answers; their ratio is
    τ.
    """
    return replay_sizes(recorded, [num_nodes], depth, width)[num_nodes]


def replay_sizes(
    recorded: Iterable[RecordedTrees], sizes: Sequence[int], depth: int, width: int
) -> dict[int, tuple[int, int]]:
    """Return `replay` for several num_nodes, which share one search."""
    sums = dict.fromkeys(sizes, (0, 0))
    for trees in recorded:
        needed = needed_nodes(trees, depth, width)
        for size in sizes:
            accepted = (needed <= size).sum(axis=1)  # the nodes of a path are needed in increasing order
            starts = walk(accepted.tolist())
            tokens, forwards = sums[size]
            sums[size] = tokens + int(accepted[starts].sum()) + len(starts), forwards + len(starts)
    return sums
