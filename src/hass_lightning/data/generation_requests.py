"""Requests for texts that the target generates, and the sampling of their tokens.

Shapes: B rows of the running batch, V vocabulary (types.py has the legend).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """A text to be generated.

    Args:
        key: identifies the text for the caller. prompt: token ids. max_new_tokens: the text is truncated there.
        temperature: 0 is greedy. top_k: top-k sampling (None: off). seed: of the sampling.
    """

    key: Any
    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt and the longest text."""
        return len(self.prompt) + self.max_new_tokens


@dataclass(frozen=True)
class Text:
    """A generated text: its ids without the end token, and whether the target generated an end token."""

    request: Request
    token_ids: list[int]
    ended: bool


@dataclass
class Row:
    """A row of the batch: its cache holds the first `length` tokens of `prompt + token_ids`."""

    request: Request
    length: int
    forced: deque[int] = field(default_factory=deque)  # tokens of the prompt that are not computed yet
    token_ids: list[int] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.request.temperature > 0:
            generator = torch.Generator().manual_seed(self.request.seed)
            self.uniforms = torch.rand(self.request.max_new_tokens, generator=generator).tolist()

    def next_token(self) -> int:
        """Return the next input token of the row."""
        return self.forced.popleft() if self.forced else self.token_ids[-1]


def sample(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Return one token per row from logits [B, V]: argmax at temperature 0, else the inverse CDF at its number."""
    chosen = logits.max(-1).indices  # argmax is slow in bf16 on a CPU
    for top_k in {row.request.top_k for row in rows if row.request.temperature > 0}:
        drawn = [n for n, row in enumerate(rows) if row.request.temperature > 0 and row.request.top_k == top_k]
        picked = logits[drawn].float()
        picked /= picked.new_tensor([rows[n].request.temperature for n in drawn])[:, None]
        token_ids = None
        if top_k is not None:
            picked, token_ids = picked.topk(min(top_k, picked.shape[-1]))
        cumulative = picked.softmax(-1).cumsum(-1)
        uniform = picked.new_tensor([rows[n].uniforms[len(rows[n].token_ids)] for n in drawn])
        threshold = uniform[:, None] * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[-1] - 1)
        chosen[drawn] = (index if token_ids is None else token_ids.gather(1, index))[:, 0]
    return chosen.tolist()
