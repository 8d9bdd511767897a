"""Drafting with a small causal LM of the same vocabulary (arXiv 2211.17192, 2302.01318)."""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.decoding import sampling as draws
from hass_lightning.decoding.models import DecodingModels
from hass_lightning.decoding.tree import DraftTree, chain_shape
from hass_lightning.types import Sampling


class SmallModelProposer:
    """Proposes a chain from the small model: its argmax at temperature 0, else samples of its processed distribution.

    The cache keeps the draft tokens that were accepted: unlike the draft head's, its entries depend only on tokens.
    """

    def __init__(
        self,
        models: DecodingModels,
        prompt: list[int],
        depth: int,
        limit: int,
        *,
        sampling: Sampling,
        generator: torch.Generator | None,
    ):
        assert models.small is not None
        self.model = models.small
        self.max_nodes = depth + 1
        self.sampling, self.generator = sampling, generator
        self.cache = self.model.new_cache(1, len(prompt) + limit + self.max_nodes)
        self.tokens = prompt[:1]  # the accepted sequence
        self.shape = chain_shape(depth).to(self.model.device)

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree:
        """Return the chain and, above temperature 0, the distributions it was sampled from."""
        # all new tokens but the last are accepted drafts and already in the cache (except the deepest one)
        self.cache.length += min(len(token_ids) - 1, self.max_nodes - 2) if self.cache.length else 0
        self.tokens += token_ids
        pending = torch.tensor([self.tokens[self.cache.length :]], device=self.model.device)
        ids, q = [pending[0, -1:]], []
        for _ in range(self.max_nodes - 1):
            logits = self._forward(pending)
            if self.sampling.temperature == 0:
                token = draws.best(logits)
            else:
                q.append(draws.probabilities(logits, self.sampling))
                token = draws.categorical(q[-1], self.generator)
            ids.append(token)
            pending = token[None]
        self.cache.length = len(self.tokens)
        full = torch.cat([*q, torch.zeros_like(q[0])]) if q else None
        return DraftTree(torch.cat(ids), self.shape, full)

    def _forward(self, token_ids: Tensor) -> Tensor:
        """Return the logits [1, V] after the last of `token_ids` [1, K]."""
        start, count = self.cache.length, token_ids.shape[1]
        positions = torch.arange(start, start + count, device=self.model.device)
        positions = positions.clamp(max=self.model.max_length - 1)
        features = self.model.forward(token_ids, self.cache, positions[None], self.cache.causal_mask(count))
        self.cache.advance(count)
        return self.model.head.logits(features[0, -1:])
