"""Proposers on an EAGLE head: fixed trees and greedy chains, sampled chains, EAGLE-2's dynamic trees.

In every cycle the head first reads the newly accepted tokens with the target's *true* features; what it drafted from
its own features is forgotten (hass.md §5.2). While it drafts, row t = (E[x_{t+1}], h_t) at position t sees true
features up to the root and its own from there on: what alignment step j trains, draft depth j sees (hass.md §2.2).

Shapes: K new rows, W rows of a level, N nodes, D hidden, Vd draft vocabulary (types.py has the legend).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.decoding import sampling as draws
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.decoding.tree import Candidates, DraftTree, StaticPlan, chain_shape, select_nodes
from hass_lightning.types import Sampling


class HeadRows:
    """The draft head over one growing sequence: accepted rows for good, drafted rows until the next cycle.

    Args:
        capacity: rows the sequence can reach, the drafted ones counted.
    """

    def __init__(self, models: DecodingModels, capacity: int):
        assert models.draft is not None
        self.draft, self.head, self.vocabulary = models.draft, models.target.head, models.draft_vocabulary
        self.cache = self.draft.new_cache(1, capacity)
        self.device = models.target.device
        self.num_rows = 0  # accepted rows; the cache also counts the drafted ones
        self._seen = torch.ones(1, capacity, dtype=torch.bool, device=self.device)

    def accept(self, token_ids: list[int], features: Tensor) -> Tensor:
        """Forget the drafted rows, add the K new true ones; the head's output [1, D] at the last."""
        cache, count = self.cache, len(token_ids)
        cache.length = self.num_rows
        embeddings = self.head.embed(torch.tensor([token_ids], device=self.device))
        output = self.draft(embeddings, features[None], cache, mask=cache.causal_mask(count))
        cache.advance(count)
        self.num_rows += count
        return output[0, -1:]

    def draft_rows(self, token_ids: Tensor, features: Tensor, mask: Tensor | None, level: int) -> Tensor:
        """Run drafted nodes `level` deep.

        Args:
            token_ids: [W]. features: [W, D], the head's own, of their parents. mask: bool [W, rows drafted so far + W]
                over drafted rows (None: a single row that sees all).

        Returns:
            the head's estimate [W, D] of the nodes' own features.
        """
        width = token_ids.shape[0]
        if mask is not None:
            mask = torch.cat([self._seen[:, : self.num_rows].expand(width, -1), mask], dim=1)[None, None]
        positions = torch.full((1, width), self.num_rows + level - 1, device=self.device)
        output = self.draft(self.head.embed(token_ids)[None], features[None], self.cache, positions, mask)
        self.cache.advance(width)
        return output[0]

    def guesses(self, features: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities (fp32, temperature 1) and target token ids, each [W, width], best first."""
        logits = self.vocabulary.logits(features).float()
        top = logits.topk(width, dim=-1)
        # never above 0: a child must not outscore its parent by rounding
        scores = (top.values - logits.logsumexp(-1, keepdim=True)).clamp(max=0)
        return scores, self.vocabulary.to_token_ids(top.indices)


class StaticTreeProposer:
    """A fixed tree (EAGLE-1) and, as its width-1 case, the greedy chain."""

    def __init__(self, models: DecodingModels, plan: StaticPlan, max_tokens: int):
        self.plan = plan
        self.max_nodes = len(plan.shape)
        self.rows = HeadRows(models, max_tokens + self.max_nodes)

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree:
        """The same tree in each cycle, with the draft's best tokens of that rank."""
        own = self.rows.accept(token_ids, features)  # [1, D]
        drafted = [torch.tensor(token_ids[-1:], device=self.rows.device)]
        for number, level in enumerate(self.plan.levels):
            if number > 0:
                source = level.source
                inputs = own[self.plan.levels[number - 1].slots[source]]
                mask = None if level.mask.shape == (1, number) else level.mask
                own = self.rows.draft_rows(drafted[-1][source], inputs, mask, number)
            _, ids = self.rows.guesses(own, level.width)
            drafted.append(ids[level.slots, level.ranks])
        return DraftTree(torch.cat(drafted), self.plan.shape)


class SampledChainProposer:
    """A chain whose tokens are drawn from the head's processed distribution: verified with min(1, p/q)."""

    def __init__(
        self,
        models: DecodingModels,
        depth: int,
        max_tokens: int,
        *,
        sampling: Sampling,
        generator: torch.Generator | None,
    ):
        self.max_nodes = depth + 1
        self.rows = HeadRows(models, max_tokens + self.max_nodes)
        self.vocab_size = models.target.head.vocab_size
        self.sampling, self.generator = sampling, generator
        self.shape = chain_shape(depth).to(self.rows.device)

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree:
        """Tokens and the distributions they were drawn from."""
        own = self.rows.accept(token_ids, features)
        vocabulary = self.rows.vocabulary
        drafted = [torch.tensor(token_ids[-1:], device=self.rows.device)]
        q: list[Tensor] = []
        for level in range(self.max_nodes - 1):
            if level > 0:
                own = self.rows.draft_rows(drafted[-1], own, None, level)
            q.append(draws.probabilities(vocabulary.logits(own), self.sampling))
            drafted.append(vocabulary.to_token_ids(draws.categorical(q[-1], self.generator)))
        rows = torch.cat(q)
        full = rows.new_zeros(self.max_nodes, self.vocab_size)
        if vocabulary.token_ids is None:
            full[:-1] = rows
        else:
            full[:-1, vocabulary.token_ids] = rows
        return DraftTree(torch.cat(drafted), self.shape, full)


class DynamicTreeProposer:
    """EAGLE-2 (arXiv 2406.16858): expand the best `width` nodes of each level, verify the best of all candidates."""

    def __init__(self, models: DecodingModels, num_nodes: int, depth: int, width: int, max_tokens: int):
        self.max_nodes, self.depth, self.width = num_nodes, depth, width
        self.rows = HeadRows(models, max_tokens + width * depth)
        self.candidates = Candidates.build(depth, width, self.rows.device)

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree:
        """The tree with the greatest expected number of accepted tokens, by the head's own probabilities."""
        rows, width, known = self.rows, self.width, self.candidates
        root = torch.tensor(token_ids[-1:], device=rows.device)
        own = rows.accept(token_ids, features)  # [1, D]
        level_scores, level_ids = rows.guesses(own, width)
        scores, ids = [level_scores[0]], [level_ids[0]]
        parents = [torch.full_like(ids[0], -1)]
        frontier = torch.arange(width, device=rows.device)  # the expanded nodes, as indices into the last level
        inputs, mask = own.expand(width, -1), known.eye
        for level in range(1, self.depth):
            frontier_scores = scores[-1][frontier]
            own = rows.draft_rows(ids[-1][frontier], inputs, mask if width > 1 else None, level)
            level_scores, level_ids = rows.guesses(own, width)
            scores.append((frontier_scores[:, None] + level_scores).flatten())
            ids.append(level_ids.flatten())
            parents.append((frontier + known.offsets[level - 1]).repeat_interleave(width))
            if level + 1 < self.depth:
                frontier = scores[-1].topk(width).indices
                slots = frontier // width
                inputs = own[slots]
                mask = torch.cat([mask[slots], known.eye], dim=1)
        chosen, shape = select_nodes(
            torch.cat(scores), torch.cat(parents), known.depths, self.max_nodes - 1, self.depth
        )
        return DraftTree(torch.cat([root, torch.cat(ids)[chosen]]), shape)
