"""Proposers that use a draft head: fixed trees and greedy chains, sampled chains, and EAGLE-2's dynamic trees.

In every cycle the head first reads the newly accepted tokens with the target's features, and the cache entries of its
own drafts are discarded (docs/method.md, Drafting). While drafting, the input (E[x_{t+1}], h_t) at position t attends
to target features up to the root and to predicted features after it. Draft depth j sees the context of alignment step j
(docs/method.md, HCA).

Shapes: K new tokens, W nodes of a level (and width of the target's features), N nodes, D hidden, Vd draft vocabulary
(see the legend in types.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.decoding import sampling as draws
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.decoding.tree import Candidates, DraftTree, StaticPlan, chain_shape, select_nodes
from hass_lightning.types import Sampling


class HeadRows:
    """The draft head on one growing sequence; drafted tokens stay in its cache until the next cycle.

    Args:
        models: the models, with a draft head.
        capacity: maximum number of cached tokens, including drafted ones.
    """

    def __init__(self, models: DecodingModels, capacity: int):
        assert models.draft is not None
        self.draft, self.head, self.vocabulary = models.draft, models.target.head, models.draft_vocabulary
        self.cache = self.draft.new_cache(1, capacity)
        self.device = models.target.device
        self.num_rows = 0  # accepted tokens; `cache.length` also counts drafted ones
        self._seen = torch.ones(1, capacity, dtype=torch.bool, device=self.device)

    def accept(self, token_ids: list[int], features: Tensor) -> Tensor:
        """Discard the drafted tokens, read K accepted ones and return the head's output [1, D] at the last.

        Args:
            token_ids: the K accepted tokens.
            features: [K, W], target features of the tokens before them.
        """
        cache, count = self.cache, len(token_ids)
        cache.length = self.num_rows
        embeddings = self.head.embed(torch.tensor([token_ids], device=self.device))
        output = self.draft(embeddings, features[None], cache, mask=cache.causal_mask(count))
        cache.advance(count)
        self.num_rows += count
        return output[0, -1:]

    def draft_rows(self, token_ids: Tensor, features: Tensor, mask: Tensor | None, level: int) -> Tensor:
        """Run the head on drafted nodes at depth `level`.

        Args:
            token_ids: [W].
            features: [W, D], predicted features of their parents.
            mask: bool [W, tokens drafted so far + W] over drafted tokens (None: a single node that attends to all).
            level: depth of the nodes, from 1.

        Returns:
            Predicted features [W, D] of the nodes.
        """
        width = token_ids.shape[0]
        if mask is not None:
            mask = torch.cat([self._seen[:, : self.num_rows].expand(width, -1), mask], dim=1)[None, None]
        positions = torch.full((1, width), self.num_rows + level - 1, device=self.device)
        output = self.draft(self.head.embed(token_ids)[None], features[None], self.cache, positions, mask)
        self.cache.advance(width)
        return output[0]

    def logits(self, features: Tensor) -> Tensor:
        """Compute draft logits [W, Vd] of predicted features [W, D]."""
        return self.draft.logits(features, self.vocabulary)

    def guesses(self, features: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the `width` most probable next tokens: log-probabilities (fp32) and token ids, each [W, width]."""
        logits = self.logits(features).float()
        top = logits.topk(width, dim=-1)
        # clamped, so that rounding cannot give a child a higher score than its parent
        scores = (top.values - logits.logsumexp(-1, keepdim=True)).clamp(max=0)
        return scores, self.vocabulary.to_token_ids(top.indices)


class StaticTreeProposer:
    """Proposes a fixed tree (EAGLE-1) or, with width 1, a greedy chain."""

    def __init__(self, models: DecodingModels, plan: StaticPlan, max_tokens: int):
        self.plan = plan
        self.max_nodes = len(plan.shape)
        self.rows = HeadRows(models, max_tokens + self.max_nodes)

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree:
        """Return the fixed tree with the draft head's tokens of each rank."""
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
    """Proposes a chain sampled from the head's processed distribution, to be verified with min(1, p/q)."""

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
        """Return the chain with the distributions that its tokens were sampled from."""
        own = self.rows.accept(token_ids, features)
        vocabulary = self.rows.vocabulary
        drafted = [torch.tensor(token_ids[-1:], device=self.rows.device)]
        q: list[Tensor] = []
        for level in range(self.max_nodes - 1):
            if level > 0:
                own = self.rows.draft_rows(drafted[-1], own, None, level)
            q.append(draws.probabilities(self.rows.logits(own), self.sampling))
            drafted.append(vocabulary.to_token_ids(draws.categorical(q[-1], self.generator)))
        rows = torch.cat(q)
        full = rows.new_zeros(self.max_nodes, self.vocab_size)
        if vocabulary.token_ids is None:
            full[:-1] = rows
        else:
            full[:-1, vocabulary.token_ids] = rows
        return DraftTree(torch.cat(drafted), self.shape, full)


class DynamicTreeProposer:
    """EAGLE-2 (arXiv 2406.16858): expands the best `width` nodes of each level, proposes the best of all candidates."""

    def __init__(self, models: DecodingModels, num_nodes: int, depth: int, width: int, max_tokens: int):
        self.max_nodes, self.depth, self.width = num_nodes, depth, width
        self.rows = HeadRows(models, max_tokens + width * depth)
        self.candidates = Candidates.build(depth, width, self.rows.device)

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree:
        """Return the tree with the greatest expected number of accepted tokens under the head's probabilities."""
        scores, parents, ids = self.search(token_ids, features)
        chosen, shape = select_nodes(scores, parents, self.candidates.depths, self.max_nodes - 1, self.depth)
        root = torch.tensor(token_ids[-1:], device=self.rows.device)
        return DraftTree(torch.cat([root, ids[chosen]]), shape)

    def search(self, token_ids: list[int], features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the candidates: cumulative log-probabilities, parents (-1 for the root) and token ids, each [C]."""
        rows, width, known = self.rows, self.width, self.candidates
        own = rows.accept(token_ids, features)  # [1, D]
        level_scores, level_ids = rows.guesses(own, width)
        scores, ids = [level_scores[0]], [level_ids[0]]
        parents = [torch.full_like(ids[0], -1)]
        frontier = torch.arange(width, device=rows.device)  # expanded nodes, as indices into the last level
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
        return torch.cat(scores), torch.cat(parents), torch.cat(ids)
