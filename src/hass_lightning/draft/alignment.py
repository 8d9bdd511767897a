"""Harmonized context alignment (HCA, paper §3.2): several training steps that see what decoding will see.

Step j runs the head on features that are j-1 drafts deep. Row t then sees, for each position 0 … t exactly once, the
true feature (positions ≤ t-(j-1)) or the head's own estimate from step i (position t-(j-1-i)): hass.md §2.2.

Shapes: B batch, T rows, D hidden (types.py has the legend).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hass_lightning.draft.attention import Band, banded_attention
from hass_lightning.draft.eagle import EagleDraft


@dataclass(frozen=True)
class Alignment:
    """How training is aligned with decoding.

    Args:
        depth: number of alignment steps; 1 is EAGLE's own training, 3 the paper's choice.
        step_weights: weight of each step's loss, default 1 each (the official code sums the steps).
        mask: `exact`, or `leaky` as in the official code, which puts masked scores at 0 instead of -inf before the
            softmax (hass.md §7.1); for the ablation only.
        checkpoint: recompute the layer in the backward instead of keeping its activations (less memory, more time).
    """

    depth: int = 3
    step_weights: tuple[float, ...] | None = None
    mask: Literal["exact", "leaky"] = "exact"
    checkpoint: bool = False

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"model.alignment.depth={self.depth} must be at least 1 (1 = EAGLE, 3 = the paper).")
        if self.mask not in ("exact", "leaky"):
            raise ValueError(f"model.alignment.mask={self.mask} is neither exact nor leaky.")
        if self.step_weights is not None:
            object.__setattr__(self, "step_weights", tuple(float(weight) for weight in self.step_weights))
            if len(self.step_weights) != self.depth:
                raise ValueError(
                    f"model.alignment.step_weights has {len(self.step_weights)} values for depth {self.depth}: give "
                    "one a step, or null for equal weights."
                )

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight a step."""
        return self.step_weights or (1.0,) * self.depth


def needed_rows(rows: Tensor, depth: int) -> Tensor:
    """Rows [B, T] whose estimates the wanted `rows` depend on: themselves and the depth-1 rows before each."""
    needed = rows.clone()
    for distance in range(1, depth):
        needed[:, :-distance] |= rows[:, distance:]
    return needed


def _step(
    draft: EagleDraft,
    u: Tensor,
    rotary: tuple[Tensor, Tensor],
    bands: list[Band],
    alignment: Alignment,
    rows: Tensor | None,
) -> Tensor:
    """One alignment step from its fused input `u` [B, T, D] and all bands: the estimates [B, T, D]."""
    queries = draft.layer.self_attn.queries(u, rotary)
    attended = banded_attention(queries, bands, draft.attention, alignment.mask == "leaky")
    return draft.layer.finish(u, attended, rows)


def unroll(
    draft: EagleDraft, embeddings: Tensor, features: Tensor, alignment: Alignment, rows: Tensor | None = None
) -> Iterator[Tensor]:
    """The head's features f^1 … f^J, one alignment step after the other.

    Bands are projected once and keep their graph, so that one backward of the summed step losses has the gradient of
    the official code's J backwards. Between the steps features are detached (no back-propagation through time).

    Args:
        embeddings: [B, T, D] of tokens t+1. features: [B, T, D], the target's, of tokens t.
        rows: bool [B, T], the rows whose estimates are wanted (None: all). Prompts and padding then skip the larger
            part of the layer; what is yielded for other rows means nothing.

    Yields:
        [B, T, D], the estimate of feature t+1 by a draft j deep.
    """
    if rows is not None:
        rows = needed_rows(rows, alignment.depth)
    layer = draft.layer
    positions = torch.arange(features.shape[1], device=features.device)[None]
    rotary = draft.rotary(positions)
    u = draft.fuse(embeddings, features)
    bands: list[Band] = []
    for step in range(alignment.depth):
        bands.append(layer.self_attn.keys_values(u, rotary))
        if alignment.checkpoint and torch.is_grad_enabled():
            estimate = checkpoint(_step, draft, u, rotary, list(bands), alignment, rows, use_reentrant=False)
        else:
            estimate = _step(draft, u, rotary, bands, alignment, rows)
        yield estimate
        if step + 1 < alignment.depth:
            own = torch.cat([features[:, :1].to(estimate.dtype), estimate[:, :-1]], dim=1).detach()
            u = draft.fuse(embeddings, own)
