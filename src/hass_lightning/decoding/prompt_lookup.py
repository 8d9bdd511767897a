"""Prompt lookup: propose the tokens that followed the same n-gram earlier in the text (Saxena 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from hass_lightning.decoding.tree import DraftTree, TreeShape, chain_shape


class SuffixIndex:
    """Index of the last occurrence of each n-gram of a growing text, with `max_ngram` dictionary entries per token.

    Args:
        tokens: the text's first tokens, not yet indexed as n-grams. max_ngram: longest n-gram.
    """

    def __init__(self, tokens: list[int], max_ngram: int):
        self.tokens, self.max_ngram = list(tokens), max_ngram
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its latest occurrence

    def append(self, token: int) -> None:
        """Add a token; the n-grams before it are indexed only now that one follows: a suffix never finds itself."""
        end = len(self.tokens)
        for n in range(1, min(self.max_ngram, end) + 1):
            self._ends[tuple(self.tokens[end - n :])] = end
        self.tokens.append(token)

    def find(self) -> tuple[int, int] | None:
        """(length, index after its latest earlier occurrence) of the longest suffix that occurred before."""
        for n in range(min(self.max_ngram, len(self.tokens)), 0, -1):
            start = self._ends.get(tuple(self.tokens[-n:]))
            if start is not None:
                return n, start
        return None


class Chains:
    """Chain trees; the shape of each length is built once."""

    def __init__(self, device: torch.device):
        self.device = device
        self._shapes: dict[int, TreeShape] = {}

    def __call__(self, root: int, copied: list[int]) -> DraftTree:
        """`copied` as a path below `root`."""
        if len(copied) not in self._shapes:
            self._shapes[len(copied)] = chain_shape(len(copied)).to(self.device)
        return DraftTree(torch.tensor([root, *copied], device=self.device), self._shapes[len(copied)])


class LookupProposer:
    """A chain copied from after the latest earlier occurrence of the longest suffix.

    Args:
        prompt: token ids.
        max_ngram: longest suffix to look up; shorter ones are tried after it.
        num_tokens: number of draft tokens after a match.
        device: device of the proposed tensors.
    """

    def __init__(self, prompt: list[int], max_ngram: int, num_tokens: int, device: torch.device):
        self.num_tokens, self.max_nodes = num_tokens, num_tokens + 1
        self.index, self.chains = SuffixIndex(prompt[:1], max_ngram), Chains(device)

    def propose(self, token_ids: list[int], features: Tensor) -> DraftTree | None:
        """The copied chain; None without a match."""
        for token in token_ids:
            self.index.append(token)
        match = self.index.find()
        if match is None:
            return None
        tokens, (_, start) = self.index.tokens, match
        return self.chains(tokens[-1], tokens[start : start + self.num_tokens])
