"""Prompt lookup: propose what followed the same tokens earlier in the text (Saxena 2023). No model, no training."""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.decoding.tree import DraftTree, TreeShape, chain_shape


class LookupProposer:
    """An index from each n-gram so far to where it ended last, grown token by token.

    Args:
        max_ngram: longest suffix that is looked up, before shorter ones. num_tokens: tokens proposed after a match.
    """

    def __init__(self, prompt: list[int], max_ngram: int, num_tokens: int, device: torch.device):
        self.max_ngram, self.num_tokens, self.device = max_ngram, num_tokens, device
        self.max_nodes = num_tokens + 1
        self.tokens = prompt[:1]
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its latest occurrence
        self.shapes: dict[int, TreeShape] = {}

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree | None:
        """A chain copied from after the latest earlier occurrence of the longest suffix; None without a match."""
        for token in token_ids:
            # the n-grams that end here are indexed only now that a token follows them: a suffix never finds itself
            end = len(self.tokens)
            for n in range(1, min(self.max_ngram, end) + 1):
                self.ends[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)
        for n in range(min(self.max_ngram, len(self.tokens)), 0, -1):
            start = self.ends.get(tuple(self.tokens[-n:]))
            if start is not None:
                copied = self.tokens[start : start + self.num_tokens]
                ids = torch.tensor([self.tokens[-1], *copied], device=self.device)
                if len(copied) not in self.shapes:
                    self.shapes[len(copied)] = chain_shape(len(copied)).to(self.device)
                return DraftTree(ids, self.shapes[len(copied)])
        return None
