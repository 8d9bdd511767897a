"""Data types shared by all stages.

Legend of the shapes in docstrings and comments of the package:
    B batch, T tokens of a sequence, R loss positions, D hidden size, V vocabulary, Vd draft vocabulary,
    J alignment steps, N nodes of a draft tree, H attention heads, d head size, C cache capacity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        tool_calls: of an assistant, in the format of the transformers chat templates.
        reasoning: what a reasoning model generates before the answer, without its tags.
        tool_call_id: of a tool result: the call that it belongs to. name: of the tool.
        in_loss: False for an answer that is only context (`weight: 0` in OpenAI's format).
    """

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    reasoning: str = ""
    tool_call_id: str = ""
    name: str = ""
    in_loss: bool = True


@dataclass(frozen=True)
class Conversation:
    """A question with its answers, or without them (a benchmark prompt).

    Attributes:
        category: group of a benchmark question, for results by category.
        finished: False if the last answer was truncated at the length limit. No end-of-turn token is trained on then.
        split: train, validation or test if the data set defines it, else empty. `test` is never trained on.
        tools: definitions of the tools that the target may call, as JSON schemas.
        place: file and line where it was read, for messages.
    """

    id: str
    messages: tuple[Message, ...]
    category: str = ""
    finished: bool = True
    split: str = ""
    tools: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    place: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        """The first user message."""
        return next((message.content for message in self.messages if message.role == "user"), "")

    def without_answers(self) -> Conversation:
        """Return the benchmark prompt: the same turns without those of the assistant and its tool results."""
        kept = tuple(m for m in self.messages if m.role not in ("assistant", "tool"))
        return Conversation(self.id, kept, self.category, tools=self.tools, place=self.place)


@dataclass(frozen=True)
class Tokens:
    """A tokenized conversation.

    At position t the draft head reads token t+1 and feature t and predicts token t+2. `loss_mask[t]` is True at loss
    positions: for an answer at tokens T_s … T_e these are T_s-1 … T_e-1 (docs/method.md, Loss positions; paper §3).
    """

    id: str
    input_ids: Tensor  # [T] int64
    loss_mask: Tensor  # [T] bool

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass
class FeatureBatch:
    """A batch of right-padded sequences with the target's features (last hidden state after the final norm)."""

    input_ids: Tensor  # [B, T] int64
    loss_mask: Tensor  # [B, T] bool, True at loss positions (see Tokens)
    lengths: Tensor  # [B] int64
    features: Tensor  # [B, T, D]
    target_ids: Tensor  # [B, T] int64: argmax of the target's logits at feature t, -1 where no loss position needs it
    ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FeatureBatch:
        """Return the batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> FeatureBatch:
        """Return the batch in page-locked memory (called by the DataLoader)."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, function: Callable[[Tensor], Tensor]) -> FeatureBatch:
        names = ("input_ids", "loss_mask", "lengths", "features", "target_ids")
        moved: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **moved)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Args:
        temperature: 0 is greedy decoding.
        top_p: nucleus sampling, applied to every distribution that is sampled from.
        top_k: top-k sampling, applied to every distribution that is sampled from. None: off.

    Raises:
        ValueError: if a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative: 0 is greedy, 1 samples from the target.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1].")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or null to turn it off.")


@dataclass
class DecodeResult:
    """One generated answer and the trace that every metric is computed from.

    Attributes:
        token_ids: the new tokens, including the end token, truncated at the length limit.
        accepted: number of draft tokens accepted in each verifying cycle, without the bonus token, never truncated.
        drafted: greatest depth of the draft tokens in each cycle.
        nodes: number of draft tokens verified in each cycle.
        seconds: time by phase (prefill, draft, verify, bookkeeping); their sum is the wall-clock time.
        proposals: drafted token ids of each cycle, for the report.
        logit_gaps: the target's top-1 minus top-2 logit at each new token.
    """

    token_ids: list[int]
    accepted: list[int]
    drafted: list[int]
    nodes: list[int]
    seconds: dict[str, float]
    proposals: list[list[int]] = field(default_factory=list)
    logit_gaps: list[float] = field(default_factory=list)

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds for the whole answer."""
        return sum(self.seconds.values())

    @property
    def acceptance_length(self) -> float:
        """Tokens per verifying forward of the target, with the bonus token (τ of this answer, measure/metrics.py).

        nan if the answer ended with the token of the prefill.
        """
        return 1 + sum(self.accepted) / len(self.accepted) if self.accepted else math.nan

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first one, divided by the seconds after the prefill; nan if there are none."""
        seconds = self.total_seconds - self.seconds.get("prefill", 0.0)
        return (len(self.token_ids) - 1) / seconds if self.accepted and seconds > 0 else math.nan
