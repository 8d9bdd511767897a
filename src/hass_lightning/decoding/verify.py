"""Acceptance rules: which drafted tokens the target keeps, and the token it adds. All of them are lossless.

Greedy: a node is kept when it is the target's argmax after its parent. Deterministic proposals (the draft's best tokens
in order): sequential rejection without replacement (hass.md §5.3). Sampled proposals: min(1, p/q) with the residual
(p - q)+ (Leviathan et al. 2023, arXiv 2211.17192). No loop over nodes and no host synchronisation.

Shapes: N nodes, V vocabulary (types.py has the legend).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.decoding import sampling as draws
from hass_lightning.decoding.tree import DraftTree, TreeShape
from hass_lightning.types import Sampling


def verify(
    tree: DraftTree, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Compare a draft tree with the target.

    Args:
        logits: [N, V], the target's after each node.

    Returns:
        the accepted path as bool [N] (the root included), and the token [] that follows it.
    """
    if sampling.temperature == 0:
        choice = draws.best(logits)  # [N]
        path = accepted_path(tree.token_ids == choice[tree.shape.parents], tree.shape)
        return path, choice[last_node(path)][0]
    p = draws.probabilities(logits, sampling)
    accepted = draws.bernoulli(thresholds(tree, p), generator)
    path = accepted_path(first_sibling(accepted, tree.shape), tree.shape)
    return path, draws.categorical(residual(tree, p, last_node(path)), generator)


def earlier_siblings(shape: TreeShape) -> Tensor:
    """bool [N, N]: j is offered before i, below the same parent."""
    nodes = torch.arange(len(shape), device=shape.parents.device)
    same = shape.parents[:, None] == shape.parents[None, :]
    return same & (nodes[None, :] < nodes[:, None]) & (nodes[None, :] > 0)


def thresholds(tree: DraftTree, p: Tensor) -> Tensor:
    """Probability [N] of accepting each node, once its parent is accepted and its earlier siblings are rejected.

    Deterministic: p(x) over the mass that the rejected siblings leave. Sampled: min(1, p(x)/q(x)). The root: 1.
    `p` is [N, V].
    """
    parents = tree.shape.parents
    own = p[parents, tree.token_ids]  # [N] p(x | parent)
    if tree.q is not None:
        offered = tree.q[parents, tree.token_ids]
    else:
        offered = 1 - (earlier_siblings(tree.shape) * own[None, :]).sum(-1)
    result = (own / offered.clamp(min=torch.finfo(own.dtype).tiny)).clamp(max=1)
    result[0] = 1
    return result


def first_sibling(accepted: Tensor, shape: TreeShape) -> Tensor:
    """Of the accepted siblings the first alone [N]: the others would never have been offered."""
    return accepted & ~(earlier_siblings(shape) & accepted[None, :]).any(-1)


def accepted_path(taken: Tensor, shape: TreeShape) -> Tensor:
    """Nodes [N] all of whose ancestors are taken; the root is always on the path. One child a node is taken at most."""
    refused = ~taken
    refused[0] = False
    return ~(shape.mask & refused[None, :]).any(-1)


def last_node(path: Tensor) -> Tensor:
    """Index [1] of the deepest node of a path: parents precede children.

    Not []: the host waits for such an index.
    """
    return (path * torch.arange(path.shape[0], device=path.device)).amax(0, keepdim=True)


def residual(tree: DraftTree, p: Tensor, last: Tensor) -> Tensor:
    """Weights [V] of the token after the path's last node, all of whose children were rejected (or that has none)."""
    target = p[last][0]
    if tree.q is not None:
        left = (target - tree.q[last][0]).clamp(min=0)
    else:
        children = tree.shape.parents == last
        children[0] = False
        offered = torch.zeros_like(target).index_add_(0, tree.token_ids, children.to(target.dtype))
        left = target.masked_fill(offered > 0, 0)
    # rounding can reject the last token of the support: then any token of the target's distribution will do
    return torch.where(left.sum() > 0, left, target)
