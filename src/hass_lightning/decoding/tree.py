"""Draft trees as tensors, and the node selection of EAGLE-2.

A tree has N nodes. Node 0 is the root, the last token of the sequence so far. Each parent precedes its children.
Shapes: N nodes, C candidates, W width, V vocabulary (see the legend in types.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TreeShape:
    """Structure of a draft tree."""

    parents: Tensor  # [N] int64, parents[0] = 0
    depths: Tensor  # [N] int64, 0 for the root
    mask: Tensor  # [N, N] bool, mask[i, j]: j is i or an ancestor of i

    def __len__(self) -> int:
        return int(self.parents.shape[0])

    def to(self, device: torch.device | str) -> TreeShape:
        """Return the structure on another device."""
        return TreeShape(self.parents.to(device), self.depths.to(device), self.mask.to(device))


@dataclass
class DraftTree:
    """The draft tokens of one cycle.

    Attributes:
        token_ids: [N] int64.
        shape: structure of the tree.
        q: [N, V], for a sampled chain: q[i] is the distribution over the full vocabulary that the child of node i was
            sampled from (zeros for the last node). None for deterministic proposals.
    """

    token_ids: Tensor
    shape: TreeShape
    q: Tensor | None = None


def ancestor_mask(parents: Tensor, depth: int) -> Tensor:
    """Compute the mask [N, N] of each node and its ancestors from `parents` [N], for trees up to `depth` levels."""
    nodes = torch.arange(parents.shape[0], device=parents.device)
    mask, ancestors = nodes[:, None] == nodes[None, :], parents
    for _ in range(depth.bit_length()):  # each step sees twice as far up
        mask = mask | mask[ancestors]
        ancestors = ancestors[ancestors]
    return mask


def chain_shape(depth: int) -> TreeShape:
    """Structure of a chain with `depth` nodes below the root."""
    nodes = torch.arange(depth + 1)
    return TreeShape((nodes - 1).clamp(min=0), nodes, nodes[None, :] <= nodes[:, None])


@dataclass(frozen=True)
class Candidates:
    """Constants of a dynamic tree's candidates, which depend only on depth and width.

    Level 1 has `width` candidates. Each deeper level has width²: the best `width` children of each expanded node.
    """

    depths: Tensor  # [C] int64
    offsets: tuple[int, ...]  # index of the first candidate of each level, not counting the root
    eye: Tensor  # [W, W] bool

    @classmethod
    def build(cls, depth: int, width: int, device: torch.device | str = "cpu") -> Candidates:
        """Build the constants for `depth` levels with `width` expanded nodes each."""
        sizes = [width] + [width * width] * (depth - 1)
        levels = torch.arange(1, depth + 1).repeat_interleave(torch.tensor(sizes))
        offsets = tuple(sum(sizes[:level]) for level in range(depth))
        return cls(levels.to(device), offsets, torch.eye(width, dtype=torch.bool, device=device))


def num_candidates(depth: int, width: int) -> int:
    """Number of candidates in a search of this depth and width."""
    return width + (depth - 1) * width * width


def select_nodes(scores: Tensor, parents: Tensor, depths: Tensor, count: int, depth: int) -> tuple[Tensor, TreeShape]:
    """Select the `count` candidates with the highest cumulative log-probability (the reranking of EAGLE-2).

    The selection contains the ancestors of every selected node: no child scores above its parent (log-probabilities are
    fp32 and clamped at 0), parents come first and the sort is stable, so a tie keeps the parent. The official code can
    drop it (docs/method.md, Drafting).

    Args:
        scores: [C], cumulative log-probabilities.
        parents: [C], index of the parent candidate, -1 for the root.
        depths: [C].
        count: number of candidates to select.
        depth: levels of the tree.

    Returns:
        The selected candidates [count] in order of creation, and their tree (count + 1 nodes).
    """
    chosen = scores.sort(descending=True, stable=True).indices[:count].sort().values
    node_of = torch.zeros(scores.shape[0] + 1, dtype=torch.int64, device=scores.device)  # [-1]: the root
    node_of[chosen] = torch.arange(1, count + 1, device=scores.device)
    root = torch.zeros(1, dtype=torch.int64, device=scores.device)
    tree_parents = torch.cat([root, node_of[parents[chosen]]])
    shape = TreeShape(tree_parents, torch.cat([root, depths[chosen]]), ancestor_mask(tree_parents, depth))
    return chosen, shape


@dataclass(frozen=True)
class Level:
    """Index tensors to draft one level of a static tree: the nodes to run, and the draft tokens to keep."""

    source: Tensor  # [W] index of each expanded node within the level's nodes (empty: level below the root)
    mask: Tensor  # [W, tokens drafted so far] bool, the drafted tokens that an expanded node attends to
    slots: Tensor  # [K] for each node of the next level: its parent among the expanded nodes
    ranks: Tensor  # [K] for each node of the next level: its rank among the parent's draft tokens
    width: int  # draft tokens needed per expanded node


@dataclass(frozen=True)
class StaticPlan:
    """A fixed tree with the index tensors to draft it level by level."""

    shape: TreeShape
    levels: tuple[Level, ...]

    @classmethod
    def build(cls, paths: tuple[tuple[int, ...], ...], device: torch.device | str = "cpu") -> StaticPlan:
        """Build the plan from paths of ranks, which must contain each path's parent (checked by `StaticTree`)."""
        nodes = [(), *sorted(paths, key=lambda path: (len(path), path))]
        number = {path: index for index, path in enumerate(nodes)}
        parents = torch.tensor([number[path[:-1]] for path in nodes])
        depth = len(nodes[-1])
        shape = TreeShape(parents, torch.tensor([len(path) for path in nodes]), ancestor_mask(parents, depth))
        inner = {path[:-1] for path in nodes[1:]}
        levels, rows = [], []
        for level in range(depth):
            here = [path for path in nodes if len(path) == level]
            expanded = [path for path in here if path in inner]
            children = [path for path in nodes if len(path) == level + 1]
            if level > 0:
                rows += [number[path] for path in expanded]
            levels.append(
                Level(
                    source=torch.tensor([here.index(path) for path in expanded], device=device),
                    mask=shape.mask[[number[path] for path in expanded]][:, rows].to(device),
                    slots=torch.tensor([expanded.index(path[:-1]) for path in children], device=device),
                    ranks=torch.tensor([path[-1] for path in children], device=device),
                    width=max(path[-1] for path in children) + 1,
                )
            )
        return cls(shape.to(device), tuple(levels))
