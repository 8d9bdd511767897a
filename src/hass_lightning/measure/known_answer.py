"""Replay of a decoder on a known answer: its greedy acceptance, cycle by cycle, without a forward of the target.

A lossless decoder at temperature 0 writes what the target writes by itself, and its cycles depend on that text and on
the target's features of it alone. One pass over prompt and answer gives these to every head and every decoder. Engine,
proposers and verification are the real ones; the target is replaced by one that *looks up*. For a node that leaves the
answer it returns whatever stands at that position: no accepted path goes through such a node.

Shapes: T tokens of prompt and answer, N nodes, R rows, D hidden, V vocabulary (types.py has the legend).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hass_lightning.decoding import sampling as draws
from hass_lightning.target.cache import KVCache
from hass_lightning.target.model import TargetModel

MOST_BEYOND = 64  # tokens past the end of an answer that a draft can reach
RULE = "greedy, replayed"  # what records of a replay say of themselves; they have no seconds


class KnownAnswer:
    """Stands where a `TargetModel` stands, for one prompt whose greedy answer is known.

    The last cycle drafts past the end of the answer, and what it accepts there counts for τ: the target goes on for
    these few tokens, once for all decoders.

    Args:
        prompt, answer: token ids; the answer as a lossless decoder wrote it.
    """

    def __init__(self, target: TargetModel, prompt: Sequence[int], answer: Sequence[int]):
        self.target = target
        tokens = torch.tensor([*prompt, *answer], device=target.device)
        self._capacity = min(len(tokens) + MOST_BEYOND, target.max_length)
        self._cache = target.new_cache(1, self._capacity)
        self.features = self._read(tokens[:-1])  # [T-1, D]
        self.head = _KnownHead(target, tokens[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def _read(self, tokens: Tensor) -> Tensor:
        features = self.target.forward(tokens[None], self._cache)[0]
        self._cache.advance(len(tokens))
        return features

    def _go_on(self, position: int) -> None:
        """Let the target write until the token after `position` is known."""
        while len(self.features) <= min(position, self._capacity - 1):
            following = self.head.following
            features = self._read(following[-1:])
            self.features = torch.cat([self.features, features])
            self.head.following = torch.cat([following, draws.best(self.target.head.logits(features))])

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """A cache without layers: only its length is needed."""
        return KVCache(0, batch_size, 0, capacity, 0, self.target.dtype, self.target.device)

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, cache: KVCache, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The features [1, N, D] of the answer at the positions of the new tokens [1, N]."""
        if positions is None:
            positions = torch.arange(cache.length, cache.length + input_ids.shape[1], device=self.features.device)[None]
        self._go_on(int(positions.max()))
        self.head.rows = positions[0].clamp(max=len(self.features) - 1)
        return self.features[self.head.rows][None]


class _KnownHead:
    """The target's ends; its logits have the answer's next token as their only choice."""

    def __init__(self, target: TargetModel, following: Tensor):
        self.following = following  # [T-1 …] the token after each position
        self.rows = following[:0]  # of the last forward
        self._head = target.head

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def logits(self, features: Tensor) -> Tensor:
        """One-hot [R, V] for the last R rows of the forward just made."""
        chosen = self.following[self.rows[len(self.rows) - features.shape[0] :]]
        return torch.zeros(len(chosen), self._head.vocab_size, device=chosen.device).scatter_(1, chosen[:, None], 1.0)
