"""Harmonized context alignment (HCA, paper §3.2): training steps with the context that decoding has.

Step j runs the head on features predicted by step j-1. Position t then attends to each position 0 … t exactly once:
to the target feature at positions ≤ t-(j-1), and to the feature predicted by step i at position t-(j-1-i)
(docs/method.md, HCA).

Shapes: B batch, T positions, D hidden (see the legend in types.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hass_lightning.draft.attention import Band, banded_attention
from hass_lightning.draft.head import DraftHead
from hass_lightning.schedules import Scheduled, scheduled


@dataclass(frozen=True)
class Alignment:
    """Configuration of the alignment steps.

    Args:
        depth: number of alignment steps; 1 is EAGLE's training, 3 the paper's choice. May be a schedule (`at`).
        step_weights: weight of each step's loss. Default: 1 each (the official code sums the steps). A number β weights
            step j by β^(j-1) (the paper also re-weights its steps).
        mask: `exact`, or `leaky` as in the official code, which sets masked scores to 0 instead of -inf before the
            softmax (docs/method.md, HCA); for the ablation only.
        gradient: `detach` detaches the features between steps, as in the official code. `bptt` also back-propagates
            through them, which is back-propagation through time truncated at `depth` steps.
        checkpoint: activation checkpointing: recompute the layer in the backward pass (less memory, more time).
        edge: what the first j-1 rows of step j do, whose chain would start before the sequence: `keep` trains them on
            the target's features, as in the official HASS code; `drop` leaves them out of the loss, as EAGLE-3 does.
        alive: leave a row out of the loss of step j once its token was not among the draft's `alive` most probable ones
            in an earlier step (GRIFFIN, arXiv 2502.11018, with 3). None: never.
        inputs: the tokens that step j reads. `given` reads those of the text; `own_tokens` reads those that the head
            predicted in the steps before, with the target's features for them as labels (training/own_tokens.py).
        own_share: share of the optimizer steps with `own_tokens`; the others read the text.

    Raises:
        ValueError: if a value is not one of these, or `step_weights` does not match `depth`.
    """

    depth: Any = 3
    step_weights: tuple[float, ...] | float | None = None
    mask: Literal["exact", "leaky"] = "exact"
    gradient: Literal["detach", "bptt"] = "detach"
    checkpoint: bool = False
    edge: Literal["keep", "drop"] = "keep"
    alive: int | None = None
    inputs: Literal["given", "own_tokens"] = "given"
    own_share: float = 0.5

    def __post_init__(self) -> None:
        greatest = max(int(value) for value in self.depths.values)
        if self.mask not in ("exact", "leaky"):
            raise ValueError(f"model.alignment.mask={self.mask} is neither exact nor leaky.")
        if self.gradient not in ("detach", "bptt"):
            raise ValueError(f"model.alignment.gradient={self.gradient} is neither detach nor bptt.")
        if self.edge not in ("keep", "drop"):
            raise ValueError(f"model.alignment.edge={self.edge} is neither keep nor drop.")
        if self.alive is not None and (not isinstance(self.alive, int) or self.alive < 1):
            raise ValueError(f"model.alignment.alive={self.alive} must be a whole number from 1, or null.")
        if self.inputs not in ("given", "own_tokens"):
            raise ValueError(f"model.alignment.inputs={self.inputs} is neither given nor own_tokens.")
        if not 0 < self.own_share <= 1:
            raise ValueError(f"model.alignment.own_share={self.own_share} must lie in (0, 1].")
        if self.inputs == "own_tokens" and (self.alive is not None or self.edge == "drop"):
            raise ValueError(
                "model.alignment.inputs=own_tokens replaces the text's tokens, on which alive and edge=drop depend: "
                "set model.alignment.alive=null and model.alignment.edge=keep."
            )
        if isinstance(self.step_weights, int | float):
            if self.step_weights <= 0:
                raise ValueError(f"model.alignment.step_weights={self.step_weights}: β must be above 0.")
            weights = tuple(float(self.step_weights) ** step for step in range(greatest))
            object.__setattr__(self, "step_weights", weights)
        elif self.step_weights is not None:
            object.__setattr__(self, "step_weights", tuple(float(weight) for weight in self.step_weights))
            if len(self.step_weights) != greatest:
                raise ValueError(
                    f"model.alignment.step_weights has {len(self.step_weights)} values for depth {greatest}: give "
                    "one value per step, a number β for β^(step-1), or null for equal weights."
                )

    @property
    def depths(self) -> Scheduled:
        """Depth as a function of progress."""
        return scheduled("model.alignment.depth", self.depth, least=1, whole=True)

    def at(self, progress: float) -> Alignment:
        """Return the alignment with its depth at `progress` (0 to 1) of the run."""
        if not isinstance(self.depth, Mapping):
            return self
        depth = int(self.depths.at(progress))
        weights = self.step_weights and self.step_weights[:depth]  # type: ignore[index]
        return replace(self, depth=depth, step_weights=weights)

    def reads_own_tokens(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) reads the head's own tokens; such steps are evenly spaced."""
        number = math.floor((step + 1) * self.own_share + 1e-9) - math.floor(step * self.own_share + 1e-9)
        return self.inputs == "own_tokens" and number > 0

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each step."""
        return self.step_weights or (1.0,) * self.depth  # type: ignore[return-value]


def needed_rows(rows: Tensor, depth: int) -> Tensor:
    """Positions [B, T] whose predictions `rows` depends on: those in `rows` and the depth-1 before each of them."""
    needed = rows.clone()
    for distance in range(1, depth):
        needed[:, :-distance] |= rows[:, distance:]
    return needed


def _step(
    draft: DraftHead,
    u: Tensor,
    residual: Tensor,
    rotary: tuple[Tensor, Tensor],
    bands: list[Band],
    alignment: Alignment,
    rows: Tensor | None,
) -> Tensor:
    """Run one alignment step: its input `u`, the residual [B, T, D] and all bands to predicted features [B, T, D]."""
    queries = draft.layer.self_attn.queries(u, rotary)
    attended = banded_attention(queries, bands, draft.attention, alignment.mask == "leaky")
    return draft.layer.finish(residual, attended, rows)


def unroll(
    draft: DraftHead,
    embeddings: Tensor,
    features: Tensor,
    alignment: Alignment,
    rows: Tensor | None = None,
    watch: Callable[[Tensor, Sequence[Band]], object] | None = None,
    next_embeddings: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Run the alignment steps in order and yield the head's predicted features f^1 … f^J.

    The keys and values of each band are projected once and keep their graph, so one backward pass of the summed step
    losses gives the gradient of the J backward passes of the official code. Features are detached between steps unless
    `alignment.gradient` is bptt.

    Args:
        draft: the draft head.
        embeddings: [B, T, D], embeddings of tokens t+1.
        features: [B, T, W], target features of tokens t.
        alignment: the configuration, with `depth` an int (`Alignment.at`).
        rows: bool [B, T], positions whose predictions are needed (None: all). Prompts and padding then skip most of the
            layer; values yielded for other positions are undefined.
        watch: called in each step with the queries [B, H, T, d] and the bands of its attention.
        next_embeddings: returns the embeddings [B, T, D] that the next step reads, given the features that this step
            predicted. None: `embeddings` in every step.

    Yields:
        [B, T, D], feature t+1 as predicted at draft depth j.
    """
    if rows is not None:
        rows = needed_rows(rows, alignment.depth)
    layer = draft.layer
    positions = torch.arange(features.shape[1], device=features.device)[None]
    rotary = draft.rotary(positions)
    features = draft.read(features)  # [B, T, D]
    u, residual = draft.inputs(embeddings, features)
    bands: list[Band] = []
    for step in range(alignment.depth):
        bands.append(layer.self_attn.keys_values(u, rotary))
        if watch is not None:
            watch(layer.self_attn.queries(u, rotary), bands)
        if alignment.checkpoint and torch.is_grad_enabled():
            estimate = checkpoint(_step, draft, u, residual, rotary, list(bands), alignment, rows, use_reentrant=False)
        else:
            estimate = _step(draft, u, residual, rotary, bands, alignment, rows)
        yield estimate
        if step + 1 < alignment.depth:
            if next_embeddings is not None:
                embeddings = next_embeddings(estimate.detach())
            own = torch.cat([features[:, :1].to(estimate.dtype), estimate[:, :-1]], dim=1)
            u, residual = draft.inputs(embeddings, own if alignment.gradient == "bptt" else own.detach())
