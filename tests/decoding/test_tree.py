"""Draft trees: closure under ancestors (including ties), masks, depths, and plans of fixed trees."""

import pytest
import torch

from hass_lightning.decoding.tree import (
    Candidates,
    StaticPlan,
    ancestor_mask,
    chain_shape,
    num_candidates,
    select_nodes,
)


def random_candidates(seed, depth, width):
    """Create candidates as DynamicTreeProposer does; coarse scores give many ties, also between child and parent."""
    generator = torch.Generator().manual_seed(seed)
    known = Candidates.build(depth, width)

    def draw_scores(rows):
        values = -torch.randint(0, 3, (rows, width), generator=generator).float() / 2
        return values.sort(descending=True).values

    scores, parents, frontier = [draw_scores(1)[0]], [torch.full((width,), -1)], torch.arange(width)
    for level in range(1, depth):
        scores.append((scores[-1][frontier][:, None] + draw_scores(width)).flatten())
        parents.append((frontier + known.offsets[level - 1]).repeat_interleave(width))
        frontier = scores[-1].topk(width).indices
    return torch.cat(scores), torch.cat(parents), known.depths


@pytest.mark.parametrize("seed", range(30))
def test_selection_is_closed_under_ancestors(seed):
    depth, width = 1 + seed % 6, 1 + seed % 5
    scores, parents, depths = random_candidates(seed, depth, width)
    assert len(scores) == num_candidates(depth, width) == len(depths)
    for count in {1, min(2, len(scores)), width, len(scores) // 2 + 1, len(scores)}:
        chosen, shape = select_nodes(scores, parents, depths, count, depth)
        kept = set(chosen.tolist())
        assert len(kept) == count
        # the best `count` scores, for any order of ties
        assert torch.equal(scores[chosen].sort().values, scores.sort().values[-count:])
        for node, candidate in enumerate(chosen.tolist(), start=1):
            parent = int(parents[candidate])
            assert parent == -1 or parent in kept
            assert shape.parents[node] == (0 if parent == -1 else 1 + chosen.tolist().index(parent))
            assert shape.parents[node] < node
            assert shape.depths[node] == shape.depths[shape.parents[node]] + 1 == depths[candidate]
            path = [node]
            while path[-1]:
                path.append(int(shape.parents[path[-1]]))
            assert shape.mask[node].nonzero()[:, 0].tolist() == path[::-1]
        assert torch.equal(shape.mask.sum(-1), shape.depths + 1)


def test_mask_of_a_chain():
    shape = chain_shape(4)
    assert torch.equal(shape.mask, torch.ones(5, 5).tril().bool())
    assert torch.equal(shape.mask, ancestor_mask(shape.parents, 4))
    assert shape.parents.tolist() == [0, 0, 1, 2, 3] and shape.depths.tolist() == [0, 1, 2, 3, 4]


def test_plan_of_a_fixed_tree():
    plan = StaticPlan.build(((1, 2), (0,), (1,), (0, 0), (1, 2, 0)))  # nodes: (), 0, 1, 00, 12, 120
    assert plan.shape.parents.tolist() == [0, 0, 0, 1, 2, 4]
    assert plan.shape.depths.tolist() == [0, 1, 1, 2, 2, 3]
    first, second, third = plan.levels
    assert (first.slots.tolist(), first.ranks.tolist(), first.width) == ([0, 0], [0, 1], 2)
    # nodes 1 and 2 are run; each attends to itself among the drafted tokens
    assert (second.source.tolist(), second.mask.tolist()) == ([0, 1], [[True, False], [False, True]])
    assert (second.slots.tolist(), second.ranks.tolist(), second.width) == ([0, 1], [0, 2], 3)
    # only node 12 has a child; it attends to node 2 and itself, not to node 1
    assert (third.source.tolist(), third.mask.tolist()) == ([1], [[False, True, True]])
    assert (third.slots.tolist(), third.ranks.tolist(), third.width) == ([0], [0], 1)
