"""The nouns every stage shares.

Shape legend, used in every tensor file of the package:
    B batch, T tokens of a sequence, R masked rows, D hidden size, V vocabulary, Vd draft vocabulary,
    J alignment steps, N nodes of a draft tree, H attention heads, d head size, C cache capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `tool_calls` (of an assistant) as the chat templates of transformers take them."""

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = field(default=(), hash=False)


@dataclass(frozen=True)
class Conversation:
    """A question with its answers, or a question alone (a benchmark prompt).

    `category` groups benchmark results; `finished` is False when the last answer was cut at the length limit, so that
    nothing learns an end of turn which the target did not write; `split` is train or validation where the data says.
    """

    id: str
    messages: tuple[Message, ...]
    category: str = ""
    finished: bool = True
    split: str = ""

    @property
    def question(self) -> str:
        """The first user message."""
        return next((message.content for message in self.messages if message.role == "user"), "")

    def without_answers(self) -> Conversation:
        """What a benchmark asks: the same turns without the assistant's, and without the tool results it asked for."""
        asked = tuple(m for m in self.messages if m.role not in ("assistant", "tool"))
        return Conversation(self.id, asked, self.category)


@dataclass(frozen=True)
class Tokens:
    """A tokenised conversation.

    `loss_mask[t]` marks *row* t: the draft head reads token t+1 and feature t there and is asked for token t+2. Rows
    T_s-1 … T_e-1 are marked for an answer at tokens T_s … T_e (hass.md §4.4; paper §3).
    """

    id: str
    input_ids: Tensor  # [T] int64
    loss_mask: Tensor  # [T] bool

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass
class FeatureBatch:
    """Right-padded sequences with the target's features (last hidden state after the final norm)."""

    input_ids: Tensor  # [B, T] int64
    loss_mask: Tensor  # [B, T] bool, on rows (see Tokens)
    lengths: Tensor  # [B] int64
    features: Tensor  # [B, T, D]
    target_ids: Tensor  # [B, T] int64: argmax of the target's logits at feature t, -1 where no row asks for it
    ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FeatureBatch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> FeatureBatch:
        """The same batch in page-locked memory (called by the DataLoader)."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, function: Callable[[Tensor], Tensor]) -> FeatureBatch:
        names = ("input_ids", "loss_mask", "lengths", "features", "target_ids")
        moved: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **moved)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; `top_p`, `top_k` cut every distribution that is sampled from."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative: 0 is greedy, 1 samples as the target does.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1].")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or null for no cut.")


@dataclass
class DecodeResult:
    """One generated answer and the trace every metric is computed from.

    `accepted[c]` is the number of draft tokens accepted in verifying cycle c (the bonus token not counted, nothing
    truncated); `drafted[c]` the greatest depth that was offered in it; `nodes[c]` the number of draft tokens verified.
    """

    token_ids: list[int]  # the new tokens, end token included, cut at the limit
    accepted: list[int]
    drafted: list[int]
    nodes: list[int]
    seconds: dict[str, float]  # by phase: prefill, draft, verify, bookkeeping; their sum is the wall-clock time
    proposals: list[list[int]] = field(default_factory=list)  # the drafted token ids of each cycle, for the report
    logit_gaps: list[float] = field(default_factory=list)  # the target's top-1 minus top-2 logit at each new token

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds of the whole answer."""
        return sum(self.seconds.values())
