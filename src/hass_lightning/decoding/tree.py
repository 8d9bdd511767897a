"""Draft trees as tensors: nodes, parents, ancestor mask, depths, and EAGLE-2's choice of the nodes worth verifying.

A tree has N nodes; node 0 is the root, the last token of the sequence so far, and each parent precedes its children.
Shapes: N nodes, C candidates, W width, V vocabulary (types.py has the legend).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TreeShape:
    """Who descends from whom."""

    parents: Tensor  # [N] int64, parents[0] = 0
    depths: Tensor  # [N] int64, 0 for the root
    mask: Tensor  # [N, N] bool, mask[i, j]: j is an ancestor of i or i itself

    def __len__(self) -> int:
        return int(self.parents.shape[0])

    def to(self, device: torch.device | str) -> TreeShape:
        """The same shape on another device."""
        return TreeShape(self.parents.to(device), self.depths.to(device), self.mask.to(device))


@dataclass
class DraftTree:
    """What one cycle offers to the target.

    `q`, for sampled proposals (a chain): row i is the distribution that node i's child was drawn from, over the full
    vocabulary; zeros for the last node, which has no child. None for deterministic proposals.
    """

    token_ids: Tensor  # [N] int64
    shape: TreeShape
    q: Tensor | None = None  # [N, V]


def ancestor_mask(parents: Tensor, depth: int) -> Tensor:
    """Ancestors-or-self [N, N] of `parents` [N] whose deepest node is at most `depth` deep: one step a level."""
    nodes = torch.arange(parents.shape[0], device=parents.device)
    mask = nodes[:, None] == nodes[None, :]
    ancestors = parents
    for _ in range(depth):
        mask[nodes, ancestors] = True
        ancestors = parents[ancestors]
    return mask


def chain_shape(depth: int) -> TreeShape:
    """A path of `depth` nodes below the root."""
    nodes = torch.arange(depth + 1)
    return TreeShape((nodes - 1).clamp(min=0), nodes, nodes[None, :] <= nodes[:, None])


@dataclass(frozen=True)
class Candidates:
    """The constants of a dynamic tree's candidates, which depend on (depth, width) alone.

    Level 1 has `width` candidates; each deeper level has width² (every frontier node's best `width` children).
    """

    depths: Tensor  # [C] int64
    offsets: tuple[int, ...]  # index of the first candidate of each level, the root (0) not counted
    eye: Tensor  # [W, W] bool

    @classmethod
    def build(cls, depth: int, width: int, device: torch.device | str = "cpu") -> Candidates:
        """For a tree of `depth` levels and a frontier of `width`."""
        sizes = [width] + [width * width] * (depth - 1)
        levels = torch.arange(1, depth + 1).repeat_interleave(torch.tensor(sizes))
        offsets = tuple(sum(sizes[:level]) for level in range(depth))
        return cls(levels.to(device), offsets, torch.eye(width, dtype=torch.bool, device=device))


def num_candidates(depth: int, width: int) -> int:
    """Draft nodes that a search of this depth and width looks at."""
    return width + (depth - 1) * width * width


def select_nodes(scores: Tensor, parents: Tensor, depths: Tensor, count: int, depth: int) -> tuple[Tensor, TreeShape]:
    """EAGLE-2's rerank: the `count` best candidates by cumulative log-probability, as a tree below the root.

    Closed under ancestors: no child scores above its parent (log-probabilities are clamped at 0, fp32), a parent comes
    earlier, and the sort is stable, so a tie keeps the parent (the official code loses it, hass.md §7.20).

    Args:
        scores, depths: [C]. parents: [C], the candidate's parent candidate, -1 for the root.

    Returns:
        the chosen candidates [count] in creation order, and their tree (count + 1 nodes).
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
    """How one level of a static tree is drafted: which rows are run, and which of their guesses become nodes."""

    source: Tensor  # [W] index of each expanded node within the level's nodes (empty: level below the root)
    mask: Tensor  # [W, rows so far] bool, which drafted rows an expanded node attends to
    slots: Tensor  # [K] for each node of the next level: the expanded node it hangs on
    ranks: Tensor  # [K] … and its rank among that node's guesses
    width: int  # guesses needed of each expanded node


@dataclass(frozen=True)
class StaticPlan:
    """A fixed tree with the index tensors that draft it level by level."""

    shape: TreeShape
    levels: tuple[Level, ...]

    @classmethod
    def build(cls, paths: tuple[tuple[int, ...], ...], device: torch.device | str = "cpu") -> StaticPlan:
        """From paths of child ranks; each path's parent must be among them (decoders.StaticTree checks)."""
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
