"""Acceptance rules: which draft tokens are accepted, and the bonus token after them. All of them are lossless.

Greedy: a node is accepted if it is the target's argmax after its parent. Deterministic proposals (the draft's most
probable tokens in order): sequential rejection without replacement (docs/method.md, Verification). Sampled proposals:
min(1, p/q) with the residual (p - q)+ (Leviathan et al. 2023, arXiv 2211.17192). No loop over nodes and no
host synchronization.

Shapes: N nodes, V vocabulary (see the legend in types.py).
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
    """Verify a draft tree.

    Args:
        tree: the draft tree.
        logits: [N, V], target logits after each node.
        sampling: the sampling parameters.
        generator: a CPU generator.

    Returns:
        The accepted path as bool [N], including the root, and the bonus token [] after it.
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
    """Mask bool [N, N] that is True at (i, j) if j is an earlier child of i's parent."""
    nodes = torch.arange(len(shape), device=shape.parents.device)
    same = shape.parents[:, None] == shape.parents[None, :]
    return same & (nodes[None, :] < nodes[:, None]) & (nodes[None, :] > 0)


def thresholds(tree: DraftTree, p: Tensor) -> Tensor:
    """Probability [N] of accepting each node, given that its parent is accepted and its earlier siblings rejected.

    Deterministic proposals: p(x) divided by the mass that the rejected siblings leave. Sampled proposals:
    min(1, p(x)/q(x)). Root: 1. `p` is [N, V].
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
    """Keep only the first accepted sibling [N]; the later ones would not have been tried."""
    return accepted & ~(earlier_siblings(shape) & accepted[None, :]).any(-1)


def accepted_path(taken: Tensor, shape: TreeShape) -> Tensor:
    """Nodes [N] on the accepted path: accepted with all ancestors. At most one child per node may be in `taken`."""
    refused = ~taken
    refused[0] = False
    return ~(shape.mask & refused[None, :]).any(-1)


def last_node(path: Tensor) -> Tensor:
    """Index [1] of the deepest node of a path (the last one, because parents precede children).

    The shape is [1] because indexing with a 0-d tensor synchronizes with the host.
    """
    return (path * torch.arange(path.shape[0], device=path.device)).amax(0, keepdim=True)


def residual(tree: DraftTree, p: Tensor, last: Tensor) -> Tensor:
    """Unnormalized distribution [V] of the bonus token after the last accepted node."""
    target = p[last][0]
    if tree.q is not None:
        left = (target - tree.q[last][0]).clamp(min=0)
    else:
        children = tree.shape.parents == last
        children[0] = False
        offered = torch.zeros_like(target).index_add_(0, tree.token_ids, children.to(target.dtype))
        left = target.masked_fill(offered > 0, 0)
    # rounding can reject the last token of the support; sample from the target's distribution then
    return torch.where(left.sum() > 0, left, target)
